"""``unichar convert``, ``inspect`` and ``diff``: weights from and to PyTorch, adapters, and a look at them.

Thin: each function calls ``unichar_jax.checkpoint`` and prints what it returned.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from unichar_jax.app.engines import portraits
from unichar_jax.checkpoint import convert as convert_lib
from unichar_jax.checkpoint import inspect as inspect_lib
from unichar_jax.checkpoint import lora as lora_lib
from unichar_jax.checkpoint import low_rank, runs
from unichar_jax.checkpoint import stages as stages_lib
from unichar_jax.checkpoint.memory import PeakMemory
from unichar_jax.errors import UserError

_GIB = 2**30


def convert(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC DST")],
    /,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    verify: bool = False,
    dry_run: bool = False,
    base: str | None = None,
    item: str | None = None,
    max_shard_gib: float | None = None,
    merge: Path | None = None,
    lora_export: bool = False,
    adapters_of: bool = False,
    lora: Annotated[int | None, tyro.conf.arg(metavar="RANK")] = None,
    keep: Literal["none", "vectors", "all"] = "vectors",
    character: Path | None = None,
) -> None:
    """Converts weights: PyTorch safetensors to Orbax, or Orbax back to a complete BAGEL directory.

    Four more things it does, all streamed as well:
      unichar convert --lora RANK FINETUNE BASE DST    adapters from the difference of two models
      unichar convert --lora-export RUN DST            the adapters of a run with trainable = "lora"
      unichar convert --adapters-of RUN DST            the same with those of the runs it started from, as one folder
      unichar convert --merge ADAPTERS SRC DST         a model with adapters merged into it

    Args:
      paths: a BAGEL directory, safetensors file, converted directory, run or checkpoint step; and the
        directory to write, which must not exist.
      dtype: of what is written; by default as stored (adapters from a difference: bfloat16).
      verify: read both sides again and compare every array with its source, bit for bit or, in another dtype,
        within one rounding.
      dry_run: print what would be done, and write nothing.
      base: model that supplies what SRC lacks (the rest of a model, configs, tokenizer, autoencoder): a directory
        of any kind, a run, or one that ships, as mini.
      item: of a checkpoint step, weights or ema.
      max_shard_gib: split an export into files of at most this size.
      merge: a folder of adapters to merge into SRC.
      lora_export: write the adapters of a run as a folder that PEFT reads.
      adapters_of: write the adapters of both stages as one such folder, exact, for the base of the first.
      lora: rank of the adapters that are to stand for the difference of two models.
      keep: with --lora, what to keep whole of the rest that changed: nothing, vectors (norms and biases), or
        all (embeddings and heads, too).
      character: with --lora or --lora-export, folder of the character that the adapters play; "unichar chat"
        then knows it.
    """
    console = Console()
    if lora is not None:
        finetune, old, dst = _exactly(paths, "--lora RANK FINETUNE BASE DST")
        who = None if character is None else portraits(old, character)[0].persona
        return _difference(console, finetune, old, dst, lora, keep, dtype, item, who)
    usage = "--lora-export RUN DST" if lora_export else "--adapters-of RUN DST" if adapters_of else "SRC DST"
    src, dst = _exactly(paths, usage)
    if lora_export or adapters_of:
        played = portraits(src, character)
        who = played[0].persona if played else None
        if adapters_of:
            stages = stages_lib.export(src, dst, dtype=_dtype(dtype), character=who)
            console.print(f"wrote {dst}: the adapters of {src} and what it stands on, {stages} stages in one")
        else:
            lora_lib.export(src, dst, item=item, dtype=_dtype(dtype), character=who)
            console.print(f"wrote {dst}: the adapters of {src}, as PEFT reads them")
        return None
    if runs.is_run(src):
        src = runs.resolve(src)
        item = item or runs.weights_item(src)
    made = convert_lib.plan(src, dst, dtype=dtype, base=base, item=item, adapters=merge)
    console.print(accounting(made))
    for note in made.notes:
        console.print(f"note: {note}", markup=False)
    if made.tokenizer_from is None:
        console.print("[yellow]no tokenizer files were found beside the weights: none are written")
    if dry_run:
        console.print("dry run: nothing was written")
        return None
    started = time.perf_counter()
    with PeakMemory() as memory, _progress(console) as progress:
        task = progress.add_task("converting", total=convert_lib.total_bytes(made, verify))
        convert_lib.execute(
            made,
            verify=verify,
            max_shard_bytes=None if max_shard_gib is None else int(max_shard_gib * _GIB),
            on_bytes=lambda n: progress.advance(task, n),
        )
    checked = ", every array compared" if verify else ""
    console.print(f"wrote {dst} {_took(started, memory)}{checked}")
    return None


def _progress(console: Console) -> Progress:
    """A bar of bytes."""
    told = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*told, TimeRemainingColumn(), console=console)


def _took(started: float, memory: PeakMemory) -> str:
    used = "" if memory.peak is None else f", peak memory {memory.peak / _GIB:.2f} GiB"
    return f"in {time.perf_counter() - started:.0f} s{used}"


def _table(title: str, *heads: str) -> Table:
    """A table; what stands under a head that begins with ``>`` are numbers."""
    table = Table(title=title)
    for head in heads:
        table.add_column(
            head.removeprefix(">"), justify="right" if head[0] == ">" else "left", overflow="fold"
        )
    return table


def _exactly(paths: tuple[Path, ...], usage: str) -> tuple[Path, ...]:
    wanted = [word for word in usage.split() if word.isupper() and word != "RANK"]
    if len(paths) != len(wanted):
        raise UserError(
            f"expected {len(wanted)} paths, got {len(paths)}. Usage: unichar convert [OPTIONS] {usage}"
        )
    return paths


def _dtype(name: str | None) -> np.dtype | None:
    return None if name is None else convert_lib.DTYPES[name]


def _difference(
    console: Console,
    finetune: Path,
    base: Path,
    dst: Path,
    rank: int,
    keep: low_rank.Keep,
    dtype: str | None,
    item: str | None,
    character: dict[str, str] | None,
) -> None:
    started = time.perf_counter()
    with PeakMemory() as memory, _progress(console) as progress:
        task = progress.add_task("comparing", total=None)
        report = low_rank.difference(
            finetune,
            base,
            dst,
            rank,
            keep=keep,
            dtype=_dtype(dtype or "bfloat16"),
            item=item,
            character=character,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    table = _table(f"what {finetune} changed of {base}", "array", "kept", ">change / base", ">lost / change")
    for row in report.rows:
        relative = f"{row.change / row.base:.3g}" if row.base else "base is 0"
        table.add_row(row.name, row.kept, relative, f"{row.relative_loss:.3g}")
    console.print(table)
    left_out = sum(row.kept == "left out" for row in report.rows)
    hint = f"; {left_out} arrays are left out (--keep all keeps them whole)" if left_out else ""
    console.print(f"in all, {report.relative_loss:.3g} of the change is lost (Frobenius norm){hint}")
    size = sum(f.stat().st_size for f in dst.iterdir()) / 2**20
    console.print(f"wrote {dst} ({size:.1f} MiB) {_took(started, memory)}")


def accounting(made: convert_lib.Plan) -> Table:
    """The accounting of a conversion as a table."""
    kinds = ("PyTorch safetensors", "Orbax")
    source, target = kinds if made.to_orbax else kinds[::-1]
    heads = ("part", "from", ">arrays", ">parameters", ">GiB", "dtype")
    table = _table(f"{source} to {target}: {made.flavour}", *heads)
    table.caption_justify = "left"
    for part in made.parts:
        stored, written = ", ".join(part.stored_dtypes), ", ".join(part.written_dtypes)
        table.add_row(
            part.name,
            part.source,
            f"{len(part.entries):,}",
            f"{part.parameters:,}",
            f"{part.nbytes / _GIB:.2f}",
            stored if stored == written else f"{stored} to {written}",
        )
    frozen = "checked against" if made.to_orbax else "written from"
    table.caption = (
        f"each array is used once and filled once; {len(made.frozen)} frozen tables {frozen} their formula"
    )
    return table


def inspect(
    path: Annotated[Path, tyro.conf.Positional], /, item: str | None = None, arrays: bool = True
) -> None:
    """Lists the arrays, shapes, dtypes, parameter counts and configuration of a model on disk.

    Args:
      path: BAGEL directory, converted directory, or checkpoint step of a run.
      item: of a checkpoint step, weights or ema.
      arrays: list every array; --no-arrays prints the totals only.
    """
    console = Console()
    found = inspect_lib.inspect(path, item)
    if arrays:
        table = _table(f"arrays of {path}", "name", "PyTorch name", "shape", "dtype", "in")
        for row in found.rows:
            shape = " x ".join(map(str, row.info.shape))
            table.add_row(row.name, row.torch, shape, str(row.info.dtype), row.info.where)
        console.print(table)
    total = f"{sum(found.parameters.values()):,} parameters in {len(found.rows):,} arrays"
    table = _table(f"{path}: {total}", "part", ">parameters")
    for group, count in found.parameters.items():
        table.add_row(group, f"{count:,}")
    console.print(table)
    console.print(found.cfg.to_dict())


def diff(
    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    /,
    item_a: str | None = None,
    item_b: str | None = None,
) -> int:
    """Says which arrays of two models differ, and by how much; exits with 1 if any do.

    Args:
      a: BAGEL directory, converted directory, or checkpoint step of a run.
      b: the other; may be of another kind.
      item_a: of a checkpoint step A, weights or ema.
      item_b: of a checkpoint step B, weights or ema.
    """
    console = Console()
    table = _table(f"{a} and {b}", "array", ">largest difference", ">relative L2")
    for found in inspect_lib.diff(a, b, item_a=item_a, item_b=item_b):
        numbers = (found.note, "") if found.note else (f"{found.max_abs:.3g}", f"{found.rel_l2:.3g}")
        table.add_row(found.name, *numbers)
    if not table.row_count:
        console.print(f"{a} and {b}: no array differs")
        return 0
    console.print(table)
    console.print(f"{table.row_count} arrays differ")
    return 1

"""``unichar convert``, ``inspect`` and ``diff``: weights from and to PyTorch, and a look at them.

Thin: each function calls ``unichar_jax.checkpoint`` and prints what it returned.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from unichar_jax.checkpoint import convert as convert_lib
from unichar_jax.checkpoint import inspect as inspect_lib
from unichar_jax.checkpoint.memory import PeakMemory

_GIB = 2**30


def convert(
    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    /,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    verify: bool = False,
    dry_run: bool = False,
    base: Path | None = None,
    item: str | None = None,
    max_shard_gib: float | None = None,
) -> None:
    """Converts weights: PyTorch safetensors to Orbax, or Orbax back to a complete BAGEL directory.

    Args:
      src: BAGEL directory, safetensors file, converted directory, or checkpoint step of a run.
      dst: directory to write; must not exist.
      dtype: of the written model; by default as stored.
      verify: read both sides again and compare every array bit for bit.
      dry_run: print what would be done, and write nothing.
      base: directory that supplies what SRC lacks (the rest of a model, configs, tokenizer, autoencoder).
      item: of a checkpoint step, weights or ema.
      max_shard_gib: split an export into files of at most this size.
    """
    console = Console()
    made = convert_lib.plan(src, dst, dtype=dtype, base=base, item=item)
    console.print(accounting(made))
    if made.tokenizer_from is None:
        console.print("[yellow]no tokenizer files were found beside the weights: none are written")
    if dry_run:
        console.print("dry run: nothing was written")
        return
    started = time.perf_counter()
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with PeakMemory() as memory, Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=convert_lib.total_bytes(made, verify))
        convert_lib.execute(
            made,
            verify=verify,
            max_shard_bytes=None if max_shard_gib is None else int(max_shard_gib * _GIB),
            on_bytes=lambda n: progress.advance(task, n),
        )
    used = "" if memory.peak is None else f", peak memory {memory.peak / _GIB:.2f} GiB"
    checked = ", every array compared" if verify else ""
    console.print(f"wrote {dst} in {time.perf_counter() - started:.0f} s{used}{checked}")


def accounting(made: convert_lib.Plan) -> Table:
    """The accounting of a conversion as a table."""
    kinds = ("PyTorch safetensors", "Orbax")
    source, target = kinds if made.to_orbax else kinds[::-1]
    table = Table(title=f"{source} to {target}: {made.flavour}", caption_justify="left")
    for column in ("part", "from"):
        table.add_column(column)
    for column in ("arrays", "parameters", "GiB"):
        table.add_column(column, justify="right")
    table.add_column("dtype")
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
        table = Table(title=f"arrays of {path}")
        for column in ("name", "PyTorch name", "shape", "dtype", "in"):
            table.add_column(column, overflow="fold")
        for row in found.rows:
            shape = " x ".join(map(str, row.info.shape))
            table.add_row(row.name, row.torch, shape, str(row.info.dtype), row.info.where)
        console.print(table)
    table = Table(
        title=f"{path}: {sum(found.parameters.values()):,} parameters in {len(found.rows):,} arrays"
    )
    table.add_column("part")
    table.add_column("parameters", justify="right")
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
    table = Table(title=f"{a} and {b}")
    table.add_column("array", overflow="fold")
    table.add_column("largest difference", justify="right")
    table.add_column("relative L2", justify="right")
    for found in inspect_lib.diff(a, b, item_a=item_a, item_b=item_b):
        numbers = (found.note, "") if found.note else (f"{found.max_abs:.3g}", f"{found.rel_l2:.3g}")
        table.add_row(found.name, *numbers)
    if not table.row_count:
        console.print(f"{a} and {b}: no array differs")
        return 0
    console.print(table)
    console.print(f"{table.row_count} arrays differ")
    return 1

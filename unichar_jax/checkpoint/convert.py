"""Conversion between BAGEL's PyTorch files and this package's Orbax directories, streamed, with
accounting.

``plan`` opens the headers, finds out what the source is (a full model, a full-precision SFT file, a
language model alone to be merged over a base, an Orbax directory or a training step), and proves that
every source tensor is used exactly once and every target is filled exactly once; whatever is wrong is
listed in one error. ``execute`` then moves one group of arrays at a time, so that no more than about
two of the largest are in memory, into a temporary folder that becomes the destination when it is whole
(and, if asked, compared bit for bit with the source).

Frozen position tables are computed, never copied: checked on the way in, written on the way out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from unichar_jax.checkpoint import lora, runs, store, table, torch_files, writing
from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.arrays import is_rounding, not_finite, overflowing
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.checkpoint.torch_files import TorchTensors, open_model
from unichar_jax.checkpoint.weights import (
    AE_FILE,
    AUTOENCODER,
    MODEL,
    ArrayInfo,
    Problems,
    TorchWeights,
    Weights,
)
from unichar_jax.checkpoint.writing import OnBytes
from unichar_jax.config.model import LLM_FILE, ModelConfig, has_tied_head
from unichar_jax.errors import UserError, did_you_mean, listed

DTYPES = {name: np.dtype(name) for name in ("float32", "bfloat16", "float16")}


# -- the plan -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part (model or autoencoder) of a conversion: its arrays, and their dtype (None: as stored)."""

    name: str
    source: str
    entries: tuple[table.Entry, ...]
    weights: Weights
    dtype: np.dtype | None = None

    def target_dtype(self, ours: str) -> np.dtype:
        return self.dtype or self.weights.infos[ours].dtype

    @property
    def names(self) -> list[str]:
        return [e.ours for e in self.entries]

    @property
    def parameters(self) -> int:
        return sum(math.prod(e.shape) for e in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return sum(self._written_bytes())

    @property
    def largest_bytes(self) -> int:
        return max(self._written_bytes())

    def _written_bytes(self) -> list[int]:
        return [math.prod(e.shape) * self.target_dtype(e.ours).itemsize for e in self.entries]

    @property
    def stored_dtypes(self) -> list[str]:
        return sorted({str(self.weights.infos[n].dtype) for n in self.names})

    @property
    def written_dtypes(self) -> list[str]:
        return sorted({str(self.target_dtype(n)) for n in self.names})


@dataclass(frozen=True)
class Plan:
    """A conversion that is known to work out: nothing unmapped, missing, doubled or misshapen."""

    src: Path
    dst: Path
    to_orbax: bool
    flavour: str
    cfg: ModelConfig
    parts: tuple[Part, ...]
    config_from: Path
    tokenizer_from: Path | None
    base: Path | None = None
    frozen: Mapping[str, np.dtype] = field(default_factory=dict)
    shard_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


class MergedWeights:
    """``Weights`` in which some arrays of a base are replaced."""

    def __init__(self, over: Weights, base: Weights):
        self._over, self._base = over, base
        self.infos = {**base.infos, **over.infos}

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for replaced, run in itertools.groupby(names, lambda n: n in self._over.infos):
            yield from (self._over if replaced else self._base).read(list(run))


def plan(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    item: str | None = None,
    adapters: str | Path | None = None,
) -> Plan:
    """Reads headers and metadata, and accounts for every tensor; writes nothing.

    Args:
      src: a BAGEL directory or one of its safetensors files (converted to Orbax), or a model directory or
        training step (exported to safetensors). Of a directory with both ``ema.safetensors`` and
        ``model.safetensors`` the former is taken; name the file to take the latter.
      dst: the directory that ``execute`` will write.
      dtype: of the written model, ``float32``, ``bfloat16`` or ``float16``; by default each array keeps its
        own. The autoencoder always keeps its own.
      base: a directory of either kind that supplies what ``src`` lacks: the rest of the model where ``src``
        is a language model alone, configs, tokenizer, autoencoder.
      item: for a training step, the item to export: ``weights`` (the default) or ``ema``. Adapters of a step
        are merged.
      adapters: a folder of adapters to merge, as well.

    Raises:
      UserError: with every problem that was found.
    """
    src, dst = Path(src), Path(dst)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"dtype '{dtype}' is unknown{did_you_mean(dtype, DTYPES)}; expected {', '.join(DTYPES)}."
        )
    base = None if base is None else runs.find(base)
    target = None if dtype is None else DTYPES[dtype]
    if not src.exists():
        raise UserError(f"{src}: no such file or directory.")
    if src.is_dir() and weights_lib.orbax_item(src, MODEL, item) is not None:
        made = _plan_export(src, dst, target, base, item)
    else:
        made = _plan_import(src, dst, target, base)
    return made if adapters is None else _with_adapters(made, Path(adapters))


def _with_adapters(made: Plan, folder: Path) -> Plan:
    model, *others = made.parts
    opened = lora.open_lora(folder, made.cfg)
    lora.require_base(opened, model.weights)
    weights = lora.WithAdapters(model.weights, opened)
    merged = replace(model, weights=weights, source=f"{model.source} with {folder}")
    return replace(made, flavour=f"{made.flavour}, adapters merged", parts=(merged, *others))


def _plan_import(src: Path, dst: Path, dtype: np.dtype | None, base: Path | None) -> Plan:
    folder = src if src.is_dir() else src.parent
    homes = _homes(folder, base)
    files = weights_lib.model_files(src) if src.is_dir() else [src]
    if base is None and not (folder / store.CONFIG_FILE).is_file():
        torch_files.refuse_language_model_alone(src, dst, TorchTensors(files))
    config_home = _config_home(homes)
    cfg = ModelConfig.from_bagel(config_home)
    tensors = open_model(files, cfg, config_home)
    table_ = table.model_table(cfg)
    absent = torch_files.absent_parts(src, tensors, table_)
    if absent and base is None:
        raise torch_files.incomplete(src, dst, absent)
    entries = tuple(e for e in table_ if table.group_of(e.ours) not in absent)
    source: Weights = TorchWeights(tensors, entries)
    problems = {str(src): weights_lib.check_torch(cfg, tensors, entries)}
    notes = list(tensors.notes)
    if absent and base is not None:
        rest, problems[str(base)] = weights_lib.examine(
            base, cfg, MODEL, runs.weights_item(base), adapters=True
        )
        source = MergedWeights(source, lora.merged(rest))
        notes.append(f"from the base: {', '.join(absent)}")
    autoencoder = _autoencoder(src, homes, folder, cfg, problems)
    names = ", ".join(f.name for f in files) if len(files) < 3 else f"{len(files)} shards"
    stored = tensors.infos
    alone = absent.keys() == torch_files.BESIDE_LANGUAGE_MODEL
    part = "language model merged over the base" if alone else "part of a model"
    return Plan(
        src,
        dst,
        to_orbax=True,
        flavour=part if absent else "full model",
        cfg=cfg,
        parts=(Part(MODEL, names, table_, source, dtype), autoencoder),
        config_from=config_home,
        tokenizer_from=_tokenizer_home(homes),
        base=base,
        frozen={n: stored[n].dtype for n in table.frozen_tables(cfg) if n in stored},
        shard_bytes=max(f.nbytes for f in tensors.files) if len(files) > 1 else None,
        notes=tuple(notes),
    )


def _plan_export(src: Path, dst: Path, dtype: np.dtype | None, base: Path | None, item: str | None) -> Plan:
    config_home = store.config_folder(src)
    homes = [src, *_homes(config_home, base)]
    cfg = ModelConfig.from_bagel(config_home)
    written = writing.read_format(config_home)
    problems: dict[str, Problems] = {}
    stored, problems[str(src)] = weights_lib.examine(src, cfg, MODEL, item, adapters=True)
    model = lora.merged(stored)
    autoencoder = _autoencoder(src, homes, src, cfg, problems)
    part = Part(MODEL, item or MODEL, table.model_table(cfg), model, dtype)
    default = part.target_dtype(part.names[0])
    kept = {} if dtype else written.get("frozen_dtype", {})
    return Plan(
        src,
        dst,
        to_orbax=False,
        flavour="full model" if model is stored else "adapters merged",
        cfg=cfg,
        parts=(part, autoencoder),
        config_from=config_home,
        tokenizer_from=_tokenizer_home(homes),
        base=base,
        frozen={n: DTYPES[kept[n]] if n in kept else default for n in table.frozen_tables(cfg)},
        shard_bytes=written.get("shard_bytes"),
    )


def _homes(folder: Path, base: Path | None) -> list[Path]:
    """Where to look for what goes with the weights, nearest first."""
    return [folder] if base is None else [folder, base, store.config_folder(base)]


def _config_home(homes: Sequence[Path]) -> Path:
    for home in homes:
        if (home / store.CONFIG_FILE).is_file():
            return home
    raise UserError(
        f"{homes[0]}: no {store.CONFIG_FILE}. Copy llm_config.json and vit_config.json of the download"
        " there, or name a directory that has them with --base."
    )


def _tokenizer_home(homes: Sequence[Path]) -> Path | None:
    return next((home for home in homes if writing.has_tokenizer(home)), None)


def _autoencoder_home(src: Path, homes: Sequence[Path]) -> Path:
    for home in homes:
        if (home / AE_FILE).is_file() or weights_lib.orbax_item(home, AUTOENCODER) is not None:
            return home
    raise UserError(
        f"{src}: no {AE_FILE} beside the weights. Copy it there, or name a directory that has it with --base."
    )


def _autoencoder(
    src: Path, homes: Sequence[Path], folder: Path, cfg: ModelConfig, problems: dict[str, Problems]
) -> Part:
    """The autoencoder of a model in ``folder``; refuses all ``problems``, its own among them."""
    home = _autoencoder_home(src, homes)
    weights, problems[f"{home} (autoencoder)"] = weights_lib.examine(home, cfg, AUTOENCODER)
    weights_lib.raise_problems(problems)
    name = AE_FILE if (home / AE_FILE).is_file() else AUTOENCODER
    source = name if home == folder else str(home / name)  # briefly where it is beside the model
    return Part(AUTOENCODER, source, table.autoencoder_table(cfg.autoencoder), weights)


# -- the work -----------------------------------------------------------------------------------------------


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    item: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Plan:
    """Converts a model in the direction that its source asks for; see ``plan`` and ``execute``."""
    made = plan(src, dst, dtype=dtype, base=base, item=item)
    if not dry_run:
        execute(made, verify=verify, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
    return made


def execute(
    made: Plan, *, verify: bool = False, max_shard_bytes: int | None = None, on_bytes: OnBytes | None = None
) -> None:
    """Writes what a plan says.

    Args:
      made: the plan.
      verify: read both sides again and compare every array with the source before the destination appears:
        bit for bit, or within one rounding where it was written in another dtype.
      max_shard_bytes: for safetensors, the size above which the model is split; by default as its source was,
        and otherwise one file, as BAGEL's own loader wants it.
      on_bytes: called with numbers of bytes written and, with ``verify``, compared; see ``total_bytes``.

    Raises:
      UserError: the destination exists, the disk is too small, or ``verify`` found a difference.
    """
    with writing.staging(made.dst, made.nbytes) as folder:
        if made.to_orbax:
            _write_orbax(made, folder, on_bytes)
        else:
            _write_torch(made, folder, max_shard_bytes or made.shard_bytes, on_bytes)
        writing.write_companions(folder, made.cfg, made.config_from, made.tokenizer_from, made.base)
        _untie(folder)
        if verify:
            _verify(made, folder, on_bytes)


def _untie(folder: Path) -> None:
    """A head is always written, so the settings beside it must not tell other loaders to take the embedding."""
    if has_tied_head(folder):
        settings = json.loads((folder / LLM_FILE).read_text("utf-8-sig"))
        writing.write_json(folder / LLM_FILE, settings | {"tie_word_embeddings": False})


def _write_orbax(made: Plan, folder: Path, on_bytes: OnBytes | None) -> None:
    for part in made.parts:
        arrays = _finite(made, part, part.names)
        group = max(weights_lib.GROUP_BYTES, part.largest_bytes)
        writing.write_item(folder / part.name, arrays, part.dtype, on_bytes, group)
    writing.write_format(
        folder,
        source={"name": made.src.name, "flavour": made.flavour},
        dtype={p.name: ", ".join(p.written_dtypes) for p in made.parts},
        parameters={p.name: p.parameters for p in made.parts},
        frozen_dtype={n: str(made.parts[0].dtype or d) for n, d in made.frozen.items()},
        shard_bytes=made.shard_bytes,
    )


def _write_torch(made: Plan, folder: Path, max_shard_bytes: int | None, on_bytes: OnBytes | None) -> None:
    model, autoencoder = made.parts
    specs = _torch_specs(model)
    for name, dtype in made.frozen.items():
        side, width = table.frozen_tables(made.cfg)[name]
        specs[name] = ArrayInfo((side * side, width), dtype, MODEL)
    specs = dict(sorted(specs.items()))

    def read(names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for frozen, run in itertools.groupby(names, lambda n: n in made.frozen):
            if frozen:
                yield from ((n, table.frozen_table(made.cfg, n)) for n in run)
            else:
                yield from _read_torch(made, model, list(run))

    writing.write_torch(folder, specs, read, max_shard_bytes, on_bytes)
    specs = dict(sorted(_torch_specs(autoencoder).items()))
    write_file(
        folder / AE_FILE,
        {n: (i.shape, i.dtype) for n, i in specs.items()},
        _read_torch(made, autoencoder, list(specs)),
        on_write=on_bytes,
    )


def _torch_specs(part: Part) -> dict[str, ArrayInfo]:
    return {e.torch: ArrayInfo(e.torch_shape, part.target_dtype(e.ours), part.name) for e in part.entries}


def _read_torch(made: Plan, part: Part, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of a part under their PyTorch names and in PyTorch's layout, as views."""
    by_torch = {e.torch: e for e in part.entries}
    arrays = _finite(made, part, [by_torch[n].ours for n in names])
    for name in names:
        yield name, by_torch[name].to_torch(next(arrays)[1])


def _finite(made: Plan, part: Part, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads arrays, and refuses the first that is not finite, as it is stored or as it will be written."""
    torch = {e.ours: e.torch for e in part.entries}
    for name, x in part.weights.read(names):
        target = part.target_dtype(name)
        bad = not_finite(x)
        if bad or (lost := overflowing(x, target)):
            what, remedy = "are not finite", "the checkpoint is damaged, or its training had failed"
            if not bad:
                what = f"do not fit {target}, whose largest is {ml_dtypes.finfo(target).max:g}"
                remedy = "take --dtype bfloat16"
            raise UserError(
                f"{made.src}: {torch[name]}: {bad or lost:,} of {x.size:,} values {what}; nothing was written. Remedy:"
                f" {remedy}."
            )
        yield name, x


def _verify(made: Plan, folder: Path, on_bytes: OnBytes | None) -> None:
    different = []
    for part in made.parts:
        written = weights_lib.open_weights(folder, made.cfg, part.name)
        sources, targets = part.weights.read(part.names), written.read(part.names)
        for name in part.names:
            expected, got = next(sources)[1], next(targets)[1]
            if got.dtype != part.target_dtype(name) or not is_rounding(expected, got):
                different.append(f"{part.name}: {name}")
            if on_bytes is not None:
                on_bytes(got.nbytes)
            del expected, got  # before the next pair is read
    if different:
        raise UserError(
            f"{made.dst}: {len(different)} arrays differ from {made.src} after writing; nothing was kept:"
            f"{listed(different, len(different))}\n"
            "The disk or the memory of this machine may be faulty: try another one."
        )


def total_bytes(made: Plan, verify: bool) -> int:
    """What ``on_bytes`` adds up to, for a progress bar (but for the frozen tables)."""
    return made.nbytes * (2 if verify else 1)

"""One reading interface over the two kinds of directory that hold a model.

A *BAGEL directory* holds PyTorch safetensors (``ema.safetensors``, ``model.safetensors`` or shards with an index,
and ``ae.safetensors``); a *model directory* holds Orbax items (``model/``, ``autoencoder/``). ``open_weights`` returns
the same thing for both: the arrays of one part by on-disk name, in this package's layout, checked against the table
before a byte is read. Everything that is wrong is listed in one error. Nothing here writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.safetensors_io import TensorFile, open_file
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError

MODEL, AUTOENCODER = "model", "autoencoder"
AE_FILE = "ae.safetensors"
SINGLE_FILES = (
    "ema.safetensors",
    "model.safetensors",
)  # in order of preference, as BAGEL's loaders
INDEX_FILE = "model.safetensors.index.json"
FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of a stored array, and the file or item that it is in."""

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str


class Weights(Protocol):
    """The arrays of one part (model or autoencoder) by on-disk name, in this package's layout."""

    @property
    def infos(self) -> Mapping[str, ArrayInfo]: ...

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays in the order of ``names``, of which few are in memory at a time."""
        ...


# -- accounting ---------------------------------------------------------------------------------------------


@dataclass
class Problems:
    """What keeps stored arrays from filling a model, by kind; all of it goes into one error."""

    unmapped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    _TITLES = {
        "unmapped": "in the file, but not in the model",
        "missing": "in the model, but not in the file",
        "doubled": "in more than one file",
        "shapes": "wrong shape",
        "dtypes": "wrong dtype (expected float32, bfloat16 or float16)",
        "frozen": "frozen position tables that differ from the computed ones",
    }

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in self._TITLES)

    def raise_if_any(self, where: str | Path) -> None:
        if not self:
            return
        lines = [f"{where}: the weights do not fit the model; nothing was written."]
        for kind, title in self._TITLES.items():
            if names := getattr(self, kind):
                lines.append(f"  {title} ({len(names)}):")
                lines += [f"    {name}" for name in names]
        lines.append(
            "Check that llm_config.json, vit_config.json and extra_config.json belong to these weights."
        )
        raise UserError("\n".join(lines))


def check_arrays(
    problems: Problems,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, ArrayInfo],
) -> None:
    """Adds every difference between the expected shapes and the stored arrays."""
    problems.unmapped += [f"{n} {list(i.shape)}" for n, i in found.items() if n not in expected]
    problems.missing += [f"{n} {list(s)}" for n, s in expected.items() if n not in found]
    for name in (n for n in expected if n in found):
        info, shape = found[name], expected[name]
        if info.shape != tuple(shape):
            problems.shapes.append(f"{name}: expected {list(shape)}, got {list(info.shape)}")
        if info.dtype not in FLOATS:
            problems.dtypes.append(f"{name}: got {info.dtype}")


# -- BAGEL directories --------------------------------------------------------------------------------------


def model_files(folder: Path) -> list[Path]:
    """The files of a BAGEL directory that hold the unified model: one, or the shards that the index names."""
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not a safetensors index ({error!r}).") from None
        absent = [s for s in shards if not (folder / s).is_file()]
        if absent:
            raise UserError(
                f"{index}: names {len(shards)} shards, of which {len(absent)} are missing in {folder}:"
                f" {', '.join(absent)}. Download them again."
            )
        return [folder / s for s in shards]
    raise UserError(
        f"{folder}: no weights; expected {' or '.join(SINGLE_FILES)}, or {INDEX_FILE} with its shards."
    )


class TorchTensors:
    """The tensors of one or several safetensors files under their PyTorch names; doubled names are remembered."""

    def __init__(self, paths: Iterable[Path]):
        self.files: list[TensorFile] = [open_file(p) for p in paths]
        self.doubled: list[str] = []
        self._file: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._file:
                    self.doubled.append(f"{name}: {self._file[name].path.name}, {file.path.name}")
                else:
                    self._file[name] = file

    @property
    def infos(self) -> dict[str, ArrayInfo]:
        return {
            n: ArrayInfo(f.tensors[n].shape, f.tensors[n].dtype, f.path.name)
            for n, f in self._file.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def read(self, name: str) -> np.ndarray:
        return self._file[name].read(name)


class TorchWeights:
    """``Weights`` over PyTorch tensors: every read is a view of a mapped file, transposed without a copy."""

    def __init__(self, tensors: TorchTensors, entries: Sequence[table.Entry]):
        self._tensors = tensors
        self._entries = {e.ours: e for e in entries}
        infos = tensors.infos
        self.infos = {
            e.ours: ArrayInfo(e.shape, infos[e.torch].dtype, infos[e.torch].where) for e in entries
        }

    def view(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        return entry.from_torch(self._tensors.read(entry.torch))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.view(name)) for name in names)


def check_torch(
    cfg: ModelConfig, tensors: TorchTensors, entries: Sequence[table.Entry], frozen: bool
) -> Problems:
    """The accounting of a set of PyTorch tensors; with ``frozen``, the two tables must be there and right."""
    problems = Problems(doubled=list(tensors.doubled))
    tables = table.frozen_tables(cfg) if frozen else {}
    expected = {e.torch: e.torch_shape for e in entries}
    expected |= {n: (side * side, width) for n, (side, width) in tables.items()}
    found = tensors.infos
    check_arrays(problems, expected, found)
    for name in tables:
        if name in found and found[name].shape == expected[name] and found[name].dtype in FLOATS:
            error = frozen_error(cfg, name, tensors.read(name))
            if error is not None:
                problems.frozen.append(f"{name}: {error}")
    return problems


def frozen_error(cfg: ModelConfig, name: str, stored: np.ndarray) -> str | None:
    """How far a stored frozen table is from the computed one, beyond the rounding of its dtype; None if it is not.

    float32 files may differ by one rounding of sin and cos between libraries; narrower ones by one step of their dtype.
    """
    ours = table.frozen_table(cfg, name).astype(stored.dtype).astype(np.float32)
    distance = np.abs(ours - stored.astype(np.float32))
    allowed = float(ml_dtypes.finfo(stored.dtype).eps)
    worst = float(distance.max(initial=0.0)) if np.isfinite(distance).all() else float("nan")
    if worst <= allowed:
        return None
    return f"largest difference {worst:.3g}, allowed {allowed:.3g} (one rounding of {stored.dtype})"


# -- model directories --------------------------------------------------------------------------------------


class OrbaxWeights:
    """``Weights`` over one Orbax item: arrays are read in groups of at most ``group_bytes`` (or one array)."""

    def __init__(self, folder: Path, item: str, group_bytes: int = 256 << 20):
        self._folder, self._item, self._group_bytes = folder, item, group_bytes
        self.infos = orbax_infos(folder, item)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for group in self._groups(names):
            arrays = self.load({n: _like(self.infos[n]) for n in group})
            while group:  # popping frees each array once the caller has moved on
                name = group.pop(0)
                yield name, arrays.pop(name)

    def load(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Loads some of the arrays: to numpy for array targets, to devices for shape structs with shardings."""
        return load_item(self._folder, self._item, targets, self.infos)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        group, size = [], 0
        for name in names:
            nbytes = array_bytes(self.infos[name])
            if group and size + nbytes > self._group_bytes:
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        if group:
            yield group


def _like(info: ArrayInfo) -> np.ndarray:
    """A target that asks Orbax for a numpy array, without memory of its own."""
    return np.broadcast_to(np.zeros((), info.dtype), info.shape)


def array_bytes(info: ArrayInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def orbax_infos(folder: Path, item: str) -> dict[str, ArrayInfo]:
    """Shapes and dtypes of an Orbax item, from its metadata alone."""
    from orbax.checkpoint import v1 as ocp

    try:
        tree = ocp.checkpointables_metadata(folder).metadata[item]
    except Exception as error:  # Orbax raises many kinds for a damaged item
        raise UserError(
            f"{folder}: the item '{item}' cannot be read ({type(error).__name__}: {error})."
            " It is damaged or unfinished; convert or save it again."
        ) from error
    return {n: ArrayInfo(tuple(a.shape), np.dtype(a.dtype), item) for n, a in tree.items()}


def load_item(
    folder: Path, item: str, targets: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Loads the ``targets`` (arrays or shape structs with shardings) of an item that holds ``names``."""
    from orbax.checkpoint import v1 as ocp

    tree = {n: targets.get(n, ocp.PLACEHOLDER) for n in names}
    try:
        loaded = ocp.load_checkpointables(folder, {item: tree})[item]
    except Exception as error:
        raise UserError(
            f"{folder}: the item '{item}' cannot be read ({type(error).__name__}: {error})."
            " It is damaged; convert or save it again."
        ) from error
    return {n: loaded[n] for n in targets}


# -- either kind --------------------------------------------------------------------------------------------


def is_orbax(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").is_file()


def expected_arrays(cfg: ModelConfig, part: str) -> tuple[table.Entry, ...]:
    """The table of one part, ``model`` or ``autoencoder``."""
    return (
        table.autoencoder_table(cfg.autoencoder) if part == AUTOENCODER else table.model_table(cfg)
    )


def open_weights(
    folder: str | Path, cfg: ModelConfig, part: str = MODEL, item: str | None = None
) -> TorchWeights | OrbaxWeights:
    """Opens one part of a directory of either kind and checks it against the model.

    Args:
      folder: a BAGEL directory, a model directory, or a training step whose ``item`` holds the weights.
      cfg: the model that the arrays must fill.
      part: ``model`` or ``autoencoder``.
      item: the name of the Orbax item; by default that of the part.

    Raises:
      UserError: no weights, a damaged file, or arrays that do not fit; every problem is listed.
    """
    folder, entries = Path(folder), expected_arrays(cfg, part)
    if is_orbax(folder):
        weights = OrbaxWeights(folder, item or part)
        problems = Problems()
        check_arrays(problems, {e.ours: e.shape for e in entries}, weights.infos)
        problems.raise_if_any(folder / (item or part))
        return weights
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not a directory. Expected a BAGEL directory (safetensors) or a converted model."
        )
    tensors = TorchTensors(model_files(folder) if part == MODEL else [folder / AE_FILE])
    check_torch(cfg, tensors, entries, frozen=part == MODEL).raise_if_any(folder)
    return TorchWeights(tensors, entries)

"""One reading interface over the two kinds of directory that hold a model.

A *BAGEL directory* holds PyTorch safetensors (``ema.safetensors``, ``model.safetensors`` or shards with
an index, and ``ae.safetensors``); a *model directory* holds two Orbax checkpoints (``model/``,
``autoencoder/``), and a training step holds its weights as one item of an Orbax checkpoint.
``open_weights`` returns the same thing for all: the arrays of one part by on-disk name, in this
package's layout, checked against the table before a byte is read. Everything that is wrong is listed in
one error. Nothing here writes (``writing.py`` does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.arrays import ArrayInfo, grouped
from unichar_jax.checkpoint.torch_files import AE_FILE, HEAD, UNTIED, TorchTensors, model_files, open_model
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models.lora import is_adapter

MODEL, AUTOENCODER = "model", "autoencoder"
STEP_ITEM = "weights"  # the item of a training step that holds the model
GROUP_BYTES = 256 << 20  # arrays that are read or written by one Orbax call, unless one alone is larger
FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))


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

    _TITLES: ClassVar[dict[str, str]] = {
        "unmapped": "in the file, but not in the model",
        "missing": "in the model, but not in the file",
        "doubled": "in more than one file",
        "shapes": "wrong shape",
        "dtypes": "wrong dtype (expected float32, bfloat16 or float16)",
        "frozen": "frozen position tables that differ from the computed ones",
    }

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in self._TITLES)

    def lines(self) -> list[str]:
        out = []
        for kind, title in self._TITLES.items():
            if names := getattr(self, kind):
                out.append(f"  {title} ({len(names)}):")
                out += [f"    {name}" for name in names]
        return out


def raise_problems(problems: Mapping[str, Problems]) -> None:
    """One error for everything that is wrong, by the file or item where it is; nothing if nothing is."""
    lines = []
    for where, found in problems.items():
        if found:
            lines += [f"{where}: the weights do not fit the model.", *found.lines()]
    if lines:
        head = [f"    {n}" for found in problems.values() for n in found.missing if n.startswith(HEAD)]
        together = (
            "Check that llm_config.json, vit_config.json and extra_config.json belong to these weights."
        )
        lines.append(UNTIED if head and lines[2:] == head else together)
        raise UserError("\n".join(lines))


def check_arrays(
    problems: Problems, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, ArrayInfo]
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


class TorchWeights:
    """``Weights`` over PyTorch tensors: every read is a view of a mapped file, transposed without a copy."""

    def __init__(self, tensors: TorchTensors, entries: Sequence[table.Entry]):
        self._tensors = tensors
        self._entries = {e.ours: e for e in entries}
        infos = tensors.infos
        self.infos = {
            e.ours: ArrayInfo(e.shape, infos[e.torch].dtype, infos[e.torch].where)
            for e in entries
            if e.torch in infos  # what is missing is the accounting's to report
        }

    def view(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        return entry.from_torch(self._tensors.read(entry.torch))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.view(name)) for name in names)


def check_torch(
    cfg: ModelConfig, tensors: TorchTensors, entries: Sequence[table.Entry], part: str = MODEL
) -> Problems:
    """The accounting of a set of PyTorch tensors.

    The frozen position tables are computed, never loaded: a file may leave them out, but what it has must be
    right.
    """
    problems = Problems(doubled=list(tensors.doubled))
    expected = {e.torch: e.torch_shape for e in entries}
    found = tensors.infos
    for name, (side, width) in table.frozen_tables(cfg).items():
        if part != MODEL or name not in found:
            continue
        expected[name] = (side * side, width)
        readable = found[name].shape == expected[name] and found[name].dtype in FLOATS
        error = frozen_error(cfg, name, tensors.read(name)) if readable else None
        if error is not None:
            problems.frozen.append(f"{name}: {error}")
    check_arrays(problems, expected, found)
    return problems


def frozen_error(cfg: ModelConfig, name: str, stored: np.ndarray) -> str | None:
    """How far a stored frozen table is from the computed one; None where that is one rounding or less.

    The allowance is one step of the stored dtype at 1: sin and cos differ by that between libraries.
    """
    ours = table.frozen_table(cfg, name).astype(stored.dtype).astype(np.float32)
    distance = np.abs(ours - stored.astype(np.float32))
    allowed = float(ml_dtypes.finfo(stored.dtype).eps)
    worst = float(distance.max(initial=0.0)) if np.isfinite(distance).all() else float("nan")
    if worst <= allowed:
        return None
    return f"largest difference {worst:.3g}, allowed {allowed:.3g} (one rounding of {stored.dtype})"


# -- Orbax --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrbaxItem:
    """A flat tree of arrays on disk: a whole Orbax checkpoint (``name`` None), or one item of one."""

    folder: Path
    name: str | None = None

    def __str__(self) -> str:
        return str(self.folder if self.name is None else self.folder / self.name)

    def infos(self) -> dict[str, ArrayInfo]:
        """Shapes and dtypes of the arrays, from the metadata alone."""
        from orbax.checkpoint import v1 as ocp

        try:
            if self.name is None:
                tree = ocp.metadata(self.folder).metadata
            else:
                tree = ocp.checkpointables_metadata(self.folder).metadata[self.name]
            where = self.name or self.folder.name
            return {n: ArrayInfo(tuple(a.shape), np.dtype(a.dtype), where) for n, a in tree.items()}
        except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
            raise self._damaged(error) from error

    def load(self, targets: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Loads the ``targets`` out of all the ``names`` that are stored.

        Args:
          targets: by name, an array for a numpy result or a shape struct with a sharding for a device array.
          names: everything that the item holds.
        """
        from orbax.checkpoint import v1 as ocp

        tree = {n: targets.get(n, ocp.PLACEHOLDER) for n in names}
        try:
            if self.name is None:
                loaded = ocp.load(self.folder, tree)
            else:
                loaded = ocp.load_checkpointables(self.folder, {self.name: tree})[self.name]
        except Exception as error:
            raise self._damaged(error) from error
        return {n: loaded[n] for n in targets}

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self}: cannot be read ({type(error).__name__}: {error}). It is damaged or unfinished;"
            " convert or save it again."
        )


def orbax_item(folder: Path, part: str, item: str | None = None) -> OrbaxItem | None:
    """Where a directory keeps a part, if Orbax wrote it: ``folder/part``, or the item of a training step."""
    if _is_checkpoint(folder / part):
        return OrbaxItem(folder / part)
    if part == MODEL and _is_checkpoint(folder):
        return OrbaxItem(folder, item or STEP_ITEM)
    return None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").is_file()


class OrbaxWeights:
    """``Weights`` over an Orbax item, read in groups of at most ``GROUP_BYTES`` or of one array."""

    def __init__(self, item: OrbaxItem):
        self.item, self.infos = item, item.infos()

    def load(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        return self.item.load(targets, self.infos)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for group in grouped(names, lambda n: array_bytes(self.infos[n]), GROUP_BYTES):
            arrays = self.load({n: _like(self.infos[n]) for n in group})
            while group:  # popping frees each array once the caller has moved on
                name = group.pop(0)
                yield name, arrays.pop(name)


def array_bytes(info: ArrayInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _like(info: ArrayInfo) -> np.ndarray:
    """A target that asks Orbax for a numpy array, without memory of its own."""
    return np.broadcast_to(np.zeros((), info.dtype), info.shape)


# -- either kind --------------------------------------------------------------------------------------------


def expected_arrays(cfg: ModelConfig, part: str) -> tuple[table.Entry, ...]:
    """The table of one part, ``model`` or ``autoencoder``."""
    return table.autoencoder_table(cfg.autoencoder) if part == AUTOENCODER else table.model_table(cfg)


def open_weights(
    folder: str | Path,
    cfg: ModelConfig,
    part: str = MODEL,
    item: str | None = None,
    *,
    adapters: bool = False,
) -> TorchWeights | OrbaxWeights:
    """Opens one part of a directory of either kind and checks it against the model.

    Args:
      folder: a BAGEL directory, a model directory, or a training step.
      cfg: the model that the arrays must fill.
      part: ``model`` or ``autoencoder``.
      item: for a training step, the item that holds the weights (``weights`` by default).
      adapters: low-rank adapters may be there too; otherwise they are a problem, so that none is lost.

    Raises:
      UserError: no weights, a damaged file, or arrays that do not fit; every problem is listed.
    """
    weights, problems = examine(Path(folder), cfg, part, item, adapters=adapters)
    raise_problems({str(folder): problems})
    return weights


def examine(
    folder: Path, cfg: ModelConfig, part: str, item: str | None = None, *, adapters: bool = False
) -> tuple[TorchWeights | OrbaxWeights, Problems]:
    """``open_weights`` that returns the problems, for a caller that lists those of several parts together.

    The weights may be read only if there are none.
    """
    entries = expected_arrays(cfg, part)
    folder = folder.absolute()  # Orbax takes no relative path
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not a directory. Expected a BAGEL directory (safetensors), or one that"
            " 'unichar convert' wrote."
        )
    if (found := orbax_item(folder, part, item)) is not None:
        weights, problems = OrbaxWeights(found), Problems()
        stored = {n: i for n, i in weights.infos.items() if not (adapters and is_adapter(n))}
        check_arrays(problems, {e.ours: e.shape for e in entries}, stored)
        return weights, problems
    if part == MODEL:
        tensors = open_model(model_files(folder), cfg, folder)
    else:
        tensors = TorchTensors([folder / AE_FILE])
    return TorchWeights(tensors, entries), check_torch(cfg, tensors, entries, part)

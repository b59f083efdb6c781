"""What is in a model on disk, and where two models differ; streamed, for directories of either kind.

``inspect`` reads headers and metadata only. ``diff`` reads both sides block by block, in this package's
layout and under its names, so that a PyTorch file and an Orbax directory compare like with like.
Nothing here writes or prints.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unichar_jax.checkpoint import store, table
from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.arrays import bits, row_blocks
from unichar_jax.checkpoint.weights import AE_FILE, AUTOENCODER, MODEL, ArrayInfo, Weights
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError


@dataclass(frozen=True)
class Row:
    """One stored array: this package's name and shape, the PyTorch name, the part that it belongs to."""

    name: str
    torch: str
    group: str
    info: ArrayInfo

    @property
    def parameters(self) -> int:
        return math.prod(self.info.shape)


@dataclass(frozen=True)
class Inspection:
    """A model on disk: its sizes and its arrays."""

    path: Path
    cfg: ModelConfig
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part, in the order of the model."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row.group] += row.parameters
        return dict(counts)


@dataclass(frozen=True)
class Difference:
    """How one array differs: a note (absent, other shape), or the largest and the relative L2 difference."""

    name: str
    note: str = ""
    max_abs: float = 0.0
    rel_l2: float = 0.0


def inspect(path: str | Path, item: str | None = None) -> Inspection:
    """Names, shapes, dtypes and configs of a model; the autoencoder too where it is there.

    Args:
      path: a BAGEL directory, a model directory, or a training step.
      item: for a training step, the item to look at.

    Raises:
      UserError: the arrays do not fit the configs; every problem is listed.
    """
    path = Path(path)
    cfg = store.load_config(path)
    rows: list[Row] = []
    for part, weights in _parts(path, cfg, item).items():
        for entry in weights_lib.expected_arrays(cfg, part):
            group = AUTOENCODER if part == AUTOENCODER else table.group_of(entry.ours)
            rows.append(Row(entry.ours, entry.torch, group, weights.infos[entry.ours]))
    return Inspection(path, cfg, tuple(rows))


def diff(
    a: str | Path, b: str | Path, *, item_a: str | None = None, item_b: str | None = None
) -> Iterator[Difference]:
    """Every array that is not the same on both sides, as it is found.

    Two arrays are the same if they have the same shape, dtype and bits, or the same values in two dtypes.
    ``rel_l2`` is relative to ``a``.

    Raises:
      UserError: a side cannot be read, or lacks a part that the other has not.
    """
    sides = [_parts(Path(p), store.load_config(p), i) for p, i in ((a, item_a), (b, item_b))]
    for part in (MODEL, AUTOENCODER):
        left, right = (side.get(part) for side in sides)
        if left is None and right is None:
            continue
        if left is None or right is None:
            yield Difference(part, f"only in {b if left is None else a}")
            continue
        yield from _diff_part(left, right, str(a), str(b))


def _parts(path: Path, cfg: ModelConfig, item: str | None) -> dict[str, Weights]:
    if not path.is_dir():
        raise UserError(f"{path}: not a directory.")
    parts: dict[str, Weights] = {MODEL: weights_lib.open_weights(path, cfg, MODEL, item)}
    if (path / AE_FILE).is_file() or weights_lib.orbax_item(path, AUTOENCODER) is not None:
        parts[AUTOENCODER] = weights_lib.open_weights(path, cfg, AUTOENCODER)
    return parts


def _diff_part(left: Weights, right: Weights, a: str, b: str) -> Iterator[Difference]:
    common = []
    for name in dict.fromkeys([*left.infos, *right.infos]):
        if name not in left.infos or name not in right.infos:
            yield Difference(name, f"only in {a if name in left.infos else b}")
        elif left.infos[name].shape != right.infos[name].shape:
            shapes = f"{list(left.infos[name].shape)} and {list(right.infos[name].shape)}"
            yield Difference(name, f"shapes {shapes}")
        else:
            common.append(name)
    for (name, x), (_, y) in zip(left.read(common), right.read(common), strict=True):
        found = compare(name, x, y)
        if found is not None:
            yield found


def compare(name: str, x: np.ndarray, y: np.ndarray) -> Difference | None:
    """The difference of two arrays of one shape, block by block; None if there is none."""
    largest, square, norm, same = 0.0, 0.0, 0.0, True
    x, y = np.atleast_1d(x, y)
    for rows in row_blocks(x.shape):
        p, q = x[rows], y[rows]
        if x.dtype == y.dtype and np.array_equal(bits(p), bits(q)):
            norm += float(np.square(p, dtype=np.float32).sum(dtype=np.float64))
            continue
        p, q = p.astype(np.float32), q.astype(np.float32)
        with np.errstate(invalid="ignore"):
            distance = np.where(p == q, 0, np.abs(p - q))  # equal infinities are no distance apart
        norm += float(np.square(p).sum(dtype=np.float64))
        if not distance.any():
            continue
        same = False
        largest = float(np.maximum(largest, distance.max()))  # keeps NaN
        square += float(np.square(distance).sum(dtype=np.float64))
    if same:
        return None
    return Difference(name, "", largest, math.sqrt(square / norm) if norm else math.inf)

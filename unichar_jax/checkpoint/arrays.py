"""Copies, bit patterns and checks of numpy arrays in any layout and dtype, for files that want them row-major."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

_TILE = 512  # side of the tiles in which a matrix is copied: two of them stay in cache


T = TypeVar("T")


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of a stored array, and the file or item that it is in."""

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str


def bits(x: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: exact to compare, and fast to copy in every dtype."""
    return x.view(f"u{x.dtype.itemsize}")


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source`` (and cast); a transposed matrix is several times faster than so."""
    if target.dtype == source.dtype and target.dtype.kind != "b":
        target, source = bits(target), bits(source)
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for i in range(0, source.shape[0], _TILE):
        for j in range(0, source.shape[1], _TILE):
            target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def materialize(x: np.ndarray, dtype: Any = None) -> np.ndarray:
    """``x`` in row-major order and in ``dtype``; ``x`` itself, not a copy, if it is both already."""
    dtype = np.dtype(dtype or x.dtype)
    if x.flags.c_contiguous and x.dtype == dtype:
        return x
    out = np.empty(x.shape, dtype)
    copy_into(out, x)
    return out


_BLOCK_ELEMENTS = 1 << 24


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """All elements in the order of memory (no copy of a transposed array), in one-dimensional blocks."""
    flat = x.ravel(order="K")
    return (flat[i : i + _BLOCK_ELEMENTS] for i in range(0, flat.size, _BLOCK_ELEMENTS))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension that hold about 16 million numbers each."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    return (slice(at, at + rows) for at in range(0, shape[0], rows))


def grouped(items: Iterable[T], size: Callable[[T], int], limit: float) -> Iterator[list[T]]:
    """Items in groups that end before one that would pass the limit; a larger one is a group of its own."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def not_finite(x: np.ndarray) -> int:
    """How many values of a float array are infinite or no number."""
    top = bits(np.array(np.inf, x.dtype))  # the exponent's bits
    return sum(int(np.count_nonzero((bits(block) & top) == top)) for block in blocks(x))


def overflowing(x: np.ndarray, dtype: np.dtype) -> int:
    """How many finite values of a float array another dtype cannot hold."""
    if dtype == x.dtype:
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        return sum(not_finite(block.astype(dtype)) - not_finite(block) for block in blocks(x))


def is_rounding(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether ``y`` is ``x`` within one rounding to its own dtype: half a step, and half of its smallest number."""
    if x.dtype == y.dtype:
        return np.array_equal(bits(x), bits(y))
    kind = ml_dtypes.finfo(y.dtype)
    half, least = float(kind.eps) / 2, float(kind.smallest_subnormal) / 2
    x, y = np.atleast_1d(x, y)
    for rows in row_blocks(x.shape):
        p, q = x[rows].astype(np.float64), y[rows].astype(np.float64)
        if not (np.abs(p - q) <= np.maximum(half * np.abs(p), least)).all():
            return False
    return True

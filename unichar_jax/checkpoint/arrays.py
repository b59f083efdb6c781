"""Copies and bit patterns of numpy arrays in any layout and dtype, for files that want them row-major."""

from __future__ import annotations

from typing import Any

import numpy as np

_TILE = 512  # side of the tiles in which a matrix is copied: two of them stay in cache


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

"""What a query sees, as at most two intervals of keys: how a kernel without a mask in memory knows the mask.

Keys that stand in a good order have this property. Two orders do:

- packed rows (``storage_order``): sample by sample, in each the clean tokens and then its noised images. A query
  sees its sample up to itself (or to the end of its image) and, if it is noised, its own image;
- cached keys with the new ones behind them: a query sees a part of the cache and a part of the new keys.

The intervals are read off ``streams.visible`` itself, so the rule of who sees whom is written once. Pairs are
looked at, some queries at a time: time of L^2 once in a forward pass (integers, on a GPU well under one layer's
attention), memory of L. Where what a query sees is not two intervals, that is told, and its attention is to be NaN.

Which tiles of keys meet which tiles of queries follows from the intervals (``Walks``), forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.models.streams import TokenMeta, visible

_AT_ONCE = 256
"""Queries whose pairs are looked at together: the compiler keeps these pairs for a moment."""


def storage_order(meta: TokenMeta) -> jax.Array:
    """The token at each place, int32 ``[B, L]``: by sample, clean before noised, in sequence order; padding last."""
    key = (meta.segment << 1 | (meta.noisy != 0)).astype(jnp.uint32) << 16 | meta.order.astype(jnp.uint32)
    return jnp.argsort(jnp.where(meta.segment == 0, jnp.uint32(2**32 - 1), key), axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intervals:
    """What queries see.

    Attributes:
      bounds: int32 ``[B, 4, Lq]``: a start and an end, and the same of a second interval. It is empty where the
        start is not below the end.
      exact: bool ``[B, Lq]``, the two intervals are what the query sees.
    """

    bounds: jax.Array
    exact: jax.Array

    @classmethod
    def of(cls, q: TokenMeta, k: TokenMeta, second: jax.Array) -> Intervals:
        """The intervals of queries ``[B, Lq]`` over keys ``[B, Lk]``; ``second`` (bool, like the keys) says which
        keys the second interval is of."""
        at = jnp.arange(k.shape[1])

        def of_row(q: TokenMeta, k: TokenMeta, second: jax.Array) -> tuple[jax.Array, jax.Array]:
            def of_query(query: TokenMeta) -> tuple[jax.Array, jax.Array]:
                mask = visible(*(jax.tree.map(jnp.atleast_2d, x) for x in (query, k)))[0, 0]
                bounds, exact = [], jnp.array(True)
                for sees in (mask & ~second, mask & second):
                    start, end = jnp.where(sees, at, at.size).min(), jnp.where(sees, at + 1, 0).max()
                    exact &= sees.sum() == jnp.maximum(end - start, 0)
                    bounds += [start, end]
                return jnp.stack(bounds).astype(jnp.int32), exact

            bounds, exact = jax.lax.map(of_query, q, batch_size=_AT_ONCE)
            return bounds.T, exact

        return cls(*jax.vmap(of_row)(q, k, second))


def walks(bounds: jax.Array, keys: int, tile: tuple[int, int], over_keys: bool) -> jax.Array:
    """Which tiles a kernel visits, int32 ``[B, tiles, 9]``, the longest walk first.

    Args:
      bounds: of ``Intervals``, ``[B, 4, Lq]``.
      keys: number of keys.
      tile: queries and keys of a tile; they divide both lengths.
      over_keys: a line for each tile of queries, over tiles of keys; else the reverse.

    Returns:
      Lines of: two runs of tiles where somebody may see something, two where everybody sees everything (each a
      start and an end), and whose line it is. The runs to visit are never too short, the full ones never too long.
    """

    def of_row(bounds: jax.Array) -> jax.Array:
        live, full = _pairs(bounds, keys, *tile)
        return _lines(live, full) if over_keys else _lines(live.T, full.T)

    return jax.vmap(of_row)(bounds)


def _pairs(bounds: jax.Array, keys: int, q_tile: int, k_tile: int) -> tuple[jax.Array, jax.Array]:
    """Bool ``[query tiles, key tiles]``: may somebody see something there; does everybody see everything?"""
    first = jnp.arange(0, keys, k_tile)
    live = full = jnp.zeros((bounds.shape[1] // q_tile, first.size), bool)
    for start, end in (bounds[:2], bounds[2:]):
        empty = (start >= end).reshape(-1, q_tile)
        start, end = start.reshape(-1, q_tile), jnp.where(empty, 0, end.reshape(-1, q_tile))
        lowest = jnp.where(empty, keys, start).min(axis=1, keepdims=True)
        live |= (first < end.max(axis=1, keepdims=True)) & (first + k_tile > lowest)
        full |= (first >= start.max(axis=1, keepdims=True)) & (
            first + k_tile <= end.min(axis=1, keepdims=True)
        )
    return live, full


def _lines(live: jax.Array, full: jax.Array) -> jax.Array:
    """Int32 ``[n, 9]`` from bool ``[n, m]``, see ``walks``.

    The first run of live tiles ends at the first gap, the second spans the rest; full ones are the first run and
    the last: exact where there are at most two, which is what the mask gives.
    """
    index = jnp.arange(live.shape[1])

    def first_run(x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first run of true at or after ``start``; empty at the end if there is none."""
        start = jnp.where(x & (index >= start[:, None]), index, index.size).min(axis=1)
        return start, jnp.where(~x & (index >= start[:, None]), index, index.size).min(axis=1)

    zero = jnp.zeros(live.shape[0], jnp.int32)
    a0, a1 = first_run(live, zero)
    b0, _ = first_run(live, a1)
    b1 = jnp.maximum(b0, jnp.where(live, index + 1, 0).max(axis=1))
    c0, c1 = first_run(full, zero)
    d0, d1 = (index.size - x for x in first_run(full[:, ::-1], zero))
    lines = jnp.stack([a0, a1, b0, b1, c0, c1, d1, d0, jnp.arange(live.shape[0])], axis=1)
    return lines[jnp.argsort(a0 - a1 + b0 - b1)].astype(jnp.int32)

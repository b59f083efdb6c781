"""Attention on NVIDIA GPUs under the hybrid mask: any packing with one compilation, no L^2 memory, and what the
mask hides is not computed, forward or backward.

Tokens are put into an order in which a query sees two intervals of keys at most (``intervals.py``), once around the
kernels (``flash_kernels.py``). From the intervals follows which tiles of keys each tile of queries visits, and the
reverse. All of it is data:

- forward: one program for a tile of queries of one head, with a running softmax; the log-sum-exp is kept;
- backward: one kernel for dq; one for dk and dv that goes through all query heads of its key head and sums in
  registers. Nothing is added atomically: gradients are the same at every run.

Over a cache the keys are the cached ones with the new ones behind them, put together in every layer: a copy of some
megabytes, beside scores that are read and written for every query of every head. What a query sees is one interval
of the cached keys and one of the new, so ragged contexts need no moving and slots no alignment.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.models.kernels import flash_kernels as run_kernel
from unichar_jax.models.kernels.flash_kernels import Tile
from unichar_jax.models.kernels.intervals import Intervals, storage_order, walks
from unichar_jax.models.kernels.layout import move
from unichar_jax.models.kernels.sharded import device_kind, per_device
from unichar_jax.models.streams import TokenMeta

_LARGE = re.compile(r"\b(G?H(100|200|20|800)|G?B(100|200|300))\b")
"""GPUs with 227 KiB of shared memory for a program; the others have 99 (cards for desktops) to 163 (A100)."""


@dataclass(frozen=True)
class Tiles:
    """One tile for each kernel: the largest that neither spill registers nor exceed the shared memory."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @classmethod
    def of(cls, device_kind: str, head_dim: int, dtype: jnp.dtype) -> Tiles:
        if jnp.dtype(dtype).itemsize > 2:
            return cls(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
        if not _LARGE.search(device_kind):
            return cls(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
        if head_dim > 80:
            return cls(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2))
        return cls(Tile(128, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2))

    def whole(self, queries: int, keys: int) -> tuple[int, int]:
        """Both lengths rounded up to whole tiles of all three kernels."""
        q, k = (max(getattr(t, x) for t in (self.forward, self.dq, self.dkv)) for x in "qk")
        return -(-queries // q) * q, -(-keys // k) * k


_INTERPRETED = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 32, 4, 2))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """What queries see (by place); ``source`` and ``place``, int32 ``[B, L]``: the token at each place and the place
    of each token. Both are None over a cache, where keys stay where they are."""

    sees: Intervals
    source: jax.Array | None = None
    place: jax.Array | None = None


class Flash:
    """The kernel. ``interpret`` runs it step by step on any backend: for tests, far too slow for work."""

    over_cache = True

    def __init__(self, interpret: bool = False):
        self.interpret = interpret

    def unsupported(self, platform: str) -> str | None:
        if not self.interpret and platform not in ("gpu", "cuda"):
            return f"it is a kernel for NVIDIA GPUs, and this is '{platform}'"
        return None

    def prepare(self, q: TokenMeta, k: TokenMeta) -> Prepared:
        """The queries are the last of the keys: all of them, or new ones behind cached keys."""
        cached = k.shape[1] - q.shape[1]
        return per_device(_prepare_cached if cached else _prepare_packed, (q, k))

    def run(self, data: Prepared, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention ``[B, Lq, heads, d]``; what sees nothing is zero, what sees more than two intervals is NaN."""
        return per_device(self._attend, data, q, k, v)

    def _attend(self, data: Prepared, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if data.source is not None:
            q, k, v = (move(x, data.source, data.place) for x in (q, k, v))
        tiles = _INTERPRETED if self.interpret else Tiles.of(device_kind(), q.shape[-1], q.dtype)
        out = attention(tiles, self.interpret, data.sees.bounds, q, k, v)
        out = jnp.where(data.sees.exact[..., None, None], out, jnp.nan)
        return out if data.source is None else move(out, data.place, data.source)


def _prepare_packed(metas: tuple[TokenMeta, TokenMeta]) -> Prepared:
    meta, _ = metas
    source = storage_order(meta)
    meta = jax.tree.map(lambda x: jnp.take_along_axis(x, source, axis=1), meta)
    return Prepared(Intervals.of(meta, meta, meta.noisy != 0), source, jnp.argsort(source, axis=1))


def _prepare_cached(metas: tuple[TokenMeta, TokenMeta]) -> Prepared:
    q, k = metas
    new = jnp.arange(k.shape[1]) >= k.shape[1] - q.shape[1]
    return Prepared(Intervals.of(q, k, jnp.broadcast_to(new, k.shape)))


def attention(
    tiles: Tiles, interpret: bool, bounds: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Softmax attention over intervals of keys, with grouped queries.

    Args:
      tiles: how the work is cut.
      interpret: run the kernels step by step.
      bounds: of ``Intervals``, int32 ``[B, 4, Lq]``.
      q: ``[B, Lq, heads, d]``.
      k, v: ``[B, Lk, kv_heads, d]``.

    Returns:
      ``[B, Lq, heads, d]``; what sees nothing is zero and takes no gradient.
    """
    lq, lk = tiles.whole(q.shape[1], k.shape[1])

    def pad(x: jax.Array, length: int) -> jax.Array:
        # Heads in steps of 16, the least that a tensor core sums over: 72 becomes 80.
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -x.shape[-1] % 16)))

    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, lq - bounds.shape[2])))
    visit = tuple(  # named, so that a backward pass that keeps anything of attention keeps these few numbers
        checkpoint_name(walks(bounds, lk, (tile.q, tile.k), over_keys), "attention_out")
        for tile, over_keys in ((tiles.forward, True), (tiles.dq, True), (tiles.dkv, False))
    )
    settings = run_kernel.Settings(q.shape[-1] ** -0.5, interpret)
    out = _attention(tiles, settings, bounds, visit, pad(q, lq), pad(k, lk), pad(v, lk))
    return out[:, : q.shape[1], :, : q.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(tiles, settings, bounds, visit, q, k, v):
    return run_kernel.forward(tiles.forward, settings, visit[0], bounds, q, k, v)[0]


def _attention_forward(tiles, settings, bounds, visit, q, k, v):
    out, lse = run_kernel.forward(tiles.forward, settings, visit[0], bounds, q, k, v)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_out")
    return out, (bounds, visit, q, k, v, out, lse)


def _attention_backward(tiles, settings, residuals, g):
    bounds, (_, over_keys, over_queries), q, k, v, out, lse = residuals
    delta = jnp.einsum("blhd,blhd->bhl", out, g, preferred_element_type=jnp.float32)
    arrays = (bounds, q, k, v, g, lse, delta)
    dq = run_kernel.backward_q(tiles.dq, settings, over_keys, *arrays)
    dk, dv = run_kernel.backward_kv(tiles.dkv, settings, over_queries, *arrays)
    return None, None, dq, dk, dv


_attention.defvjp(_attention_forward, _attention_backward)

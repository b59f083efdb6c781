"""Attention chunk by chunk with a running softmax: memory of L x chunk, on any backend, in plain JAX.

Scores exist for one chunk of queries and one of keys at a time; the mask is evaluated where it is needed, and
a pair of chunks in which nobody sees anybody is not computed. So that there are many such pairs, each sample's
tokens are put together first (``storage_order``). The backward pass recomputes scores from the saved
log-sum-exp.

Source: online softmax and its backward pass as in FlashAttention (arXiv 2205.14135, 2307.08691).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.models.kernels.intervals import storage_order
from unichar_jax.models.kernels.layout import move
from unichar_jax.models.kernels.reference import in_blocks
from unichar_jax.models.kernels.sharded import per_device, platform
from unichar_jax.models.streams import TokenMeta, visible

_MASKED = -1e30
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """Metadata ``[B, n, chunk]`` of the tokens in their new order, padded, and ``live [B, n, n]``: does chunk i see
    chunk j? ``source``, ``place`` ``[B, L]``: the token at each place, and the place of each token."""

    meta: TokenMeta
    live: jax.Array
    source: jax.Array
    place: jax.Array

    def fold(self, axis: int, at: jax.Array, step: Callable[[jax.Array, T], T], carry: T) -> T:
        """``step(other, carry)`` for every chunk that ``at`` sees (axis 2) or is seen by (axis 1).

        The loop's bounds are data: one with constant bounds would become a scan, which rematerialisation takes
        apart and saves scores of.
        """
        live = jax.lax.dynamic_index_in_dim(self.live, at, 3 - axis, keepdims=False).any(axis=0)
        first, past = jnp.argmax(live), live.shape[0] - jnp.argmax(live[::-1])

        def maybe(other: jax.Array, carry: T) -> T:
            return jax.lax.cond(live[other], functools.partial(step, other), lambda c: c, carry)

        return jax.lax.fori_loop(first, jnp.where(live.any(), past, first), maybe, carry)

    def mask(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """``[B, chunk, chunk]`` for queries of chunk i and keys of chunk j."""
        queries, keys = (jax.tree.map(lambda x, at=at: x[:, at], self.meta) for at in (i, j))
        return visible(queries, keys)


class Chunked:
    """``chunk``: tokens of a chunk at most; 0: as many as suit the platform."""

    def __init__(self, chunk: int = 0):
        self._chunk = chunk

    @property
    def chunk(self) -> int:
        # What a CPU computes on stays in its cache.
        return self._chunk or (128 if platform() == "cpu" else 512)

    def unsupported(self, platform: str) -> str | None:
        return None

    def prepare(self, q: TokenMeta, k: TokenMeta) -> Chunks:
        if k.shape != q.shape:
            raise ValueError(f"chunked is self-attention: {q.shape[1]} queries, {k.shape[1]} keys")
        return per_device(self._prepare, q)

    def _prepare(self, meta: TokenMeta) -> Chunks:
        source = storage_order(meta)
        meta = jax.tree.map(lambda x: self._split(jnp.take_along_axis(x, source, axis=1)), meta)

        def sees(i: jax.Array) -> jax.Array:
            queries = jax.tree.map(lambda x: x[:, i], meta)
            one = lambda keys: visible(queries, keys).any(axis=(1, 2))  # noqa: E731
            return jax.lax.map(one, jax.tree.map(lambda x: x.swapaxes(0, 1), meta))

        live = jax.lax.map(sees, jnp.arange(meta.shape[1]))
        return Chunks(meta, jnp.moveaxis(live, 2, 0), source, jnp.argsort(source, axis=1))

    def _split(self, x: jax.Array) -> jax.Array:
        return in_blocks(x, min(self.chunk, x.shape[1]))

    def run(self, data: Chunks, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return per_device(self._attend, data, q, k, v)

    def _attend(self, data: Chunks, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        b, length, heads, d = q.shape
        groups = k.shape[2]
        q, k, v = (move(x, data.source, data.place) for x in (q, k, v))
        q = self._split(q.reshape(b, length, groups, heads // groups, d))
        out = _attention(data, q, self._split(k), self._split(v))
        return move(out.reshape(b, -1, heads, d)[:, :length], data.place, data.source)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    s = jnp.einsum("bqghd,bkgd->bghqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], s * q.shape[-1] ** -0.5, _MASKED)


@jax.custom_vjp
def _attention(data: Chunks, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q ``[B, n, chunk, groups, heads, d]``, k and v ``[B, n, chunk, groups, d]``; the result is like q."""
    return _forward(data, q, k, v)[0]


def _forward(data: Chunks, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    b, n, chunk, groups, heads, d = q.shape

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(j: jax.Array, carry: tuple) -> tuple:
            top, total, out = carry
            mask = data.mask(i, j)
            s = _scores(q[:, i], k[:, j], mask)
            new_top = jnp.maximum(top, s.max(axis=-1))
            p = jnp.where(mask[:, None, None], jnp.exp(s - new_top[..., None]), 0)
            keep = jnp.exp(top - new_top)
            o = jnp.einsum(
                "bghqk,bkgd->bghqd", p.astype(v.dtype), v[:, j], preferred_element_type=jnp.float32
            )
            return new_top, keep * total + p.sum(axis=-1), keep[..., None] * out + o

        rows = (b, groups, heads, chunk)
        start = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, d)))
        top, total, out = data.fold(2, i, add, start)
        out = out / jnp.where(total > 0, total, 1)[..., None]
        # Padding sees nothing: an infinite log-sum-exp gives it no weight in the backward pass.
        return jnp.where(total > 0, top + jnp.log(total), jnp.inf), out.astype(q.dtype)

    lse, out = jax.lax.map(queries, jnp.arange(n))
    out = checkpoint_name(jnp.moveaxis(out, (0, 4), (1, 2)), "attention_out")
    lse = checkpoint_name(lse, "attention_out")
    return out, (data, q, k, v, out, lse)


def _backward(residuals: tuple, g: jax.Array) -> tuple:
    data, q, k, v, out, lse = residuals
    n = q.shape[1]
    delta = jnp.einsum("bnqghd,bnqghd->nbghq", out, g, preferred_element_type=jnp.float32)

    def keys(dq: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple]:
        def add(i: jax.Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            p = jnp.exp(_scores(q[:, i], k[:, j], data.mask(i, j)) - lse[i][..., None])
            dv += product("bghqk,bqghd->bkgd", p.astype(g.dtype), g[:, i])
            dp = product("bqghd,bkgd->bghqk", g[:, i], v[:, j])
            ds = (p * (dp - delta[i][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            dk += product("bghqk,bqghd->bkgd", ds, q[:, i])
            return dq.at[:, i].add(product("bghqk,bkgd->bqghd", ds, k[:, j])), dk, dv

        zeros = jnp.zeros(k[:, 0].shape, jnp.float32)
        dq, dk, dv = data.fold(1, j, add, (dq, zeros, zeros))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(n))
    dk, dv = (jnp.moveaxis(x, 0, 1).astype(k.dtype) for x in (dk, dv))
    return None, dq.astype(q.dtype), dk, dv


_attention.defvjp(_forward, _backward)

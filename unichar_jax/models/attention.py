"""One attention function with several kernels behind it.

A forward pass prepares its attention once (``prepare``): from the tokens' metadata to whatever the kernel
wants (a dense mask for the reference). Every layer then calls ``attend`` with its q, k, v. Which kernel runs
is chosen by name in ``Compute.attention``; a name that cannot run is an error, never a silent fallback.

Keys may come in parts: cached prefixes and the tokens of this call. They are scored separately and share one
softmax, so that a cache is never copied to append to it. Queries of a big picture are taken some hundred at a
time: each has its own softmax, so the numbers stay and the memory is that of one block of scores, in the backward
pass too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from unichar_jax.models.streams import TokenMeta, visible

QUERIES_AT_ONCE = 512
"""Over a cache: more queries are attended in blocks; a picture of 512 pixels has 1,024, one of 1,024 pixels 4,096."""

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """What a kernel needs besides q, k, v, shared by all layers of one forward pass."""

    kernel: str = field(metadata=dict(static=True))
    data: Any
    prefix_masks: tuple[jax.Array, ...] = ()


def prepare(
    q: TokenMeta, k: TokenMeta, kernel: str = "reference", prefixes: Sequence[TokenMeta] = ()
) -> Prepared:
    """Prepares attention of queries over keys (and over cached prefixes, by their metadata)."""
    from unichar_jax.models import kernels

    if prefixes:
        # Sampling: what a query sees differs by row and grows, so scores are dense, a block at a time.
        return Prepared("reference", visible(q, k), tuple(visible(q, p) for p in prefixes))
    return Prepared(kernel, kernels.get(kernel).prepare(q, k))


def attend(
    prepared: Prepared,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prefixes: Sequence[tuple[jax.Array, jax.Array]] = (),
) -> jax.Array:
    """Softmax attention with grouped queries.

    Args:
      prepared: from ``prepare``.
      q: ``[B, Lq, num_heads, d]``.
      k, v: ``[B, Lk, num_kv_heads, d]``; kv head j serves query heads j*g .. (j+1)*g - 1.
      prefixes: cached keys and values ``[B, num_kv_heads, Lp, d]``, as many as ``prepared`` has.

    Returns:
      ``[B, Lq, num_heads, d]`` in q's dtype; rows that see nothing (padding) are zero.
    """
    from unichar_jax.models import kernels

    if not prepared.prefix_masks:
        return kernels.get(prepared.kernel).run(prepared.data, q, k, v)
    cached = [(*kv, mask) for kv, mask in zip(prefixes, prepared.prefix_masks, strict=True)]
    return _blockwise(q, [*cached, (*_heads_first(k, v), prepared.data)])


def dense_attention(mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The reference: full scores under a boolean mask ``[B, Lq, Lk]``; softmax in float32."""
    return _dense(q, [(*_heads_first(k, v), mask)])


def _heads_first(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """``[B, L, ...]`` to ``[B, n, size, ...]``, padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _blockwise(q: jax.Array, parts: list[tuple[jax.Array, jax.Array, Any]]) -> jax.Array:
    """``_dense`` for blocks of queries of one size, one after another."""
    b, lq = q.shape[:2]
    count = -(-lq // QUERIES_AT_ONCE)
    if count == 1:
        return _dense(q, parts)
    size = -(-lq // count)
    split = lambda x: jnp.moveaxis(in_blocks(x, size), 1, 0)  # noqa: E731

    @jax.checkpoint  # else the backward pass would keep the scores of all blocks
    def block(q: jax.Array, masks: list[jax.Array]) -> jax.Array:
        return _dense(q, [(k, v, mask) for (k, v, _), mask in zip(parts, masks, strict=True)])

    out = jax.lax.map(lambda x: block(*x), (split(q), [split(mask) for *_, mask in parts]))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * size, *q.shape[2:])[:, :lq]


def _dense(q: jax.Array, parts: list[tuple[jax.Array, jax.Array, Any]]) -> jax.Array:
    """Keys and values come with their heads first; queries that share a key head are rows of one matmul."""
    b, lq, heads, d = q.shape
    groups = parts[0][0].shape[1]
    rows = jnp.moveaxis(q.reshape(b, lq, groups, -1, d), 1, 3).reshape(b, groups, -1, d)
    scores = []
    for k, _, mask in parts:
        s = jnp.einsum("bhmd,bhkd->bhmk", rows, k, preferred_element_type=jnp.float32) * d**-0.5
        s = s.reshape(b, groups, -1, lq, s.shape[-1])
        scores.append(jnp.where(mask[:, None, None], s, _MASKED))
    top = jnp.max(jnp.stack([s.max(axis=-1) for s in scores]), axis=0)[..., None]
    top = jax.lax.stop_gradient(top)
    # Masked scores underflow to exactly 0 unless a row sees nothing; such rows are zeroed below.
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    outs = [
        jnp.einsum(
            "bhmk,bhkd->bhmd",
            (w / total).astype(v.dtype).reshape(b, groups, -1, w.shape[-1]),
            v,
            preferred_element_type=jnp.float32,
        )
        for w, (_, v, _) in zip(weights, parts, strict=True)
    ]
    out = functools.reduce(jnp.add, outs)
    out = jnp.moveaxis(out.reshape(b, groups, -1, lq, d), 3, 1)
    sees = jnp.any(jnp.stack([mask.any(axis=-1) for _, _, mask in parts]), axis=0)
    out = jnp.where(sees[:, :, None, None, None], out, 0)
    return out.reshape(b, lq, heads, d).astype(q.dtype)

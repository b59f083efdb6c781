"""Dense attention: the whole mask, all scores. Right everywhere, memory of L^2; the other kernels are tested
against it.

Keys may come in parts, scored separately under one softmax: so a cache is never copied to append to it. Queries
of a big picture are taken some hundred at a time: each has its own softmax, so the numbers stay and the memory
is that of one block of scores, in the backward pass too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.models.streams import TokenMeta, visible

QUERIES_AT_ONCE = 512
"""Over a cache: more queries are attended in blocks; a picture of 512 pixels has 1,024, one of 1,024 pixels 4,096."""

_MASKED = -1e30

Part = tuple[jax.Array, jax.Array, jax.Array]


class Reference:
    """Dense mask, full scores."""

    def prepare(self, q: TokenMeta, k: TokenMeta) -> jax.Array:
        return visible(q, k)

    def run(self, data: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return checkpoint_name(dense_attention(data, q, k, v), "attention_out")

    def unsupported(self, platform: str) -> str | None:
        return None


def dense_attention(mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The reference: full scores under a boolean mask ``[B, Lq, Lk]``; softmax in float32."""
    return _dense(q, [(*heads_first(k, v), mask)])


def heads_first(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B, L, heads, d]`` to ``[B, heads, L, d]``: as a cache stores keys and values."""
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """``[B, L, ...]`` to ``[B, n, size, ...]``, padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def blockwise(q: jax.Array, parts: list[Part]) -> jax.Array:
    """Softmax attention over keys in parts, for blocks of queries of one size, one after another.

    Args:
      q: ``[B, Lq, num_heads, d]``.
      parts: (keys, values ``[B, num_kv_heads, L, d]``, mask ``[B, Lq, L]``); all parts share one softmax.

    Returns:
      ``[B, Lq, num_heads, d]`` in q's dtype; rows that see nothing are zero.
    """
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


def _dense(q: jax.Array, parts: list[Part]) -> jax.Array:
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

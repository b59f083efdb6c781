"""One attention function with several kernels behind it.

A forward pass prepares its attention once (``prepare``): from the tokens' metadata to whatever the kernel
wants (a dense mask for the reference). Every layer then calls ``attend`` with its q, k, v. Which kernel runs
is chosen by name in ``Compute.attention``; a name that cannot run is an error, never a silent fallback.

Keys may come in parts: cached prefixes and the tokens of this call, which share one softmax. A kernel that can
(``over_cache``) takes them as one array, the new behind the cached. Else they are scored densely, part by part and
in blocks of queries (``kernels/reference.py``): also for a few queries, as in decoding, whose scores are small and
which would leave a kernel's tiles almost empty, and where the new tokens of a loop are a part of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from unichar_jax.models import kernels
from unichar_jax.models.kernels.reference import blockwise, heads_first
from unichar_jax.models.streams import TokenMeta, visible

FEW_QUERIES = 64
"""Over a cache, fewer queries than these are scored densely."""


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
    if not prefixes:
        return Prepared(kernel, kernels.get(kernel).prepare(q, k))
    over_cache = getattr(kernels.get(kernel), "over_cache", False)
    if over_cache and len(prefixes) == 1 and q.shape[1] >= FEW_QUERIES:
        return Prepared(kernel, kernels.get(kernel).prepare(q, TokenMeta.concatenate(*prefixes, k)))
    return Prepared("reference", visible(q, k), tuple(visible(q, p) for p in prefixes))


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
      prefixes: cached keys and values ``[B, num_kv_heads, Lp, d]``, as many as were prepared for.

    Returns:
      ``[B, Lq, num_heads, d]`` in q's dtype; rows that see nothing (padding) are zero.
    """
    if not prepared.prefix_masks:
        for old_k, old_v in prefixes:
            k, v = (jnp.concatenate([jnp.swapaxes(a, 1, 2), b], axis=1) for a, b in ((old_k, k), (old_v, v)))
        return kernels.get(prepared.kernel).run(prepared.data, q, k, v)
    cached = [(*kv, mask) for kv, mask in zip(prefixes, prepared.prefix_masks, strict=True)]
    return blockwise(q, [*cached, (*heads_first(k, v), prepared.data)])

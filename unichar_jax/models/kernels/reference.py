"""The dense kernel: the whole mask, all scores. Right everywhere, memory of L^2; the others are tested
against it."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.models.attention import dense_attention
from unichar_jax.models.streams import TokenMeta, visible


class Reference:
    """Dense mask, full scores."""

    def prepare(self, q: TokenMeta, k: TokenMeta) -> jax.Array:
        return visible(q, k)

    def run(self, data: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return checkpoint_name(dense_attention(data, q, k, v), "attention_out")

    def why_not(self, platform: str) -> str | None:
        return None

"""cuDNN's attention under the whole mask, through ``jax.nn.dot_product_attention``.

Fast where the mask hides little, but not made for it: the mask becomes a bias of L^2 numbers, nothing that it hides is
skipped, and (in jax 0.10.2, without a switch) the backward pass writes a gradient of that bias, which nobody reads.
The library must be there to compile it, so no program for described devices contains it.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.models.kernels.sharded import per_device
from unichar_jax.models.streams import TokenMeta, visible


class Cudnn:
    """``implementation``: jax's name of the library; ``xla`` computes the same anywhere, for tests."""

    over_cache = False

    def __init__(self, implementation: Literal["cudnn", "xla"] = "cudnn"):
        self.implementation = implementation

    def unsupported(self, platform: str) -> str | None:
        if self.implementation == "cudnn" and platform not in ("gpu", "cuda"):
            return f"cuDNN is a library for NVIDIA GPUs, and this is '{platform}'"
        return None

    def prepare(self, q: TokenMeta, k: TokenMeta) -> jax.Array:
        return visible(q, k)

    def run(self, data: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return checkpoint_name(per_device(self._attend, data, q, k, v), "attention_out")

    def _attend(self, mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=self.implementation)
        return jnp.where(mask.any(axis=2)[..., None, None], out, 0)

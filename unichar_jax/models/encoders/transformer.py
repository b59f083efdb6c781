"""The pre-norm transformer block that CLIP and DINOv2 share, stacked and scanned.

It differs from the unified model's layers in what does not matter there: no packing, no mask but the causal
one, and an optional learned scale on each residual branch (DINOv2). Weights are used as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.layers import Dense, LayerNorm

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a stack of blocks. ``activation`` is a key of ``ACTIVATIONS``."""

    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: str
    layer_scale: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder: hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads."
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"encoder: activation '{self.activation}' is not supported; expected one of"
                f" {', '.join(ACTIVATIONS)}."
            )


class Block(nnx.Module):
    """``x += s1 * out(attention(norm1(x)))``, ``x += s2 * fc2(act(fc1(norm2(x))))``; s = 1 unless learned."""

    def __init__(self, cfg: TransformerConfig):
        h, inner, dims = cfg.hidden_size, cfg.mlp_size, (None, None)
        self.norm1 = LayerNorm(h, cfg.norm_eps)
        self.q = Dense(h, h, dims)
        self.k = Dense(h, h, dims)
        self.v = Dense(h, h, dims)
        self.out = Dense(h, h, dims)
        self.scale1 = params.declare((h,), (None,), params.ones) if cfg.layer_scale else None
        self.norm2 = LayerNorm(h, cfg.norm_eps)
        self.fc1 = Dense(h, inner, dims)
        self.fc2 = Dense(inner, h, dims)
        self.scale2 = params.declare((h,), (None,), params.ones) if cfg.layer_scale else None
        self.cfg = cfg

    def __call__(self, x: jax.Array, *, causal: bool = False) -> jax.Array:
        h = self.norm1(x)
        q, k, v = (f(h).reshape(*x.shape[:2], self.cfg.num_heads, -1) for f in (self.q, self.k, self.v))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        h = self.out(h.reshape(x.shape))
        x = x + (h if self.scale1 is None else h * self.scale1[...])
        h = self.fc2(ACTIVATIONS[self.cfg.activation](self.fc1(self.norm2(x))))
        return x + (h if self.scale2 is None else h * self.scale2[...])


def stack(cfg: TransformerConfig) -> Block:
    """Declarations of all layers, with a leading ``layers`` dimension."""
    return params.stacked(Block(cfg), cfg.num_layers)


def run(layers: Block, x: jax.Array, *, causal: bool = False) -> jax.Array:
    """All layers over ``[B, L, hidden]``."""
    return jax.lax.scan(lambda x, layer: (layer(x, causal=causal), None), x, layers)[0]


class PatchEmbedding(nnx.Module):
    """Square patches to tokens: images ``[B, H, W, 3]`` to ``[B, H/p * W/p, hidden]``, rows first."""

    def __init__(self, patch: int, hidden: int, *, bias: bool):
        init = params.uniform_fan_in(3 * patch * patch)
        self.kernel = params.declare((patch, patch, 3, hidden), (None,) * 4, init)
        self.bias = params.declare((hidden,), (None,), init) if bias else None
        self.patch = patch

    def __call__(self, images: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            images,
            self.kernel[...],
            window_strides=(self.patch, self.patch),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        return y if self.bias is None else y + self.bias[...]


def prepend(token: jax.Array, x: jax.Array) -> jax.Array:
    """``[B, L, H]`` with one learned token before the others."""
    first = jnp.broadcast_to(token.reshape(1, 1, -1).astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

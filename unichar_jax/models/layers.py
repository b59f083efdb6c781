"""Dense, normalisation and small blocks that several modules share.

All modules here compute in the dtype of their input and expect their weights already in it
(``params.gathered``); statistics of norms are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from unichar_jax.models import params

F = TypeVar("F", bound=Callable)

_SAVED = {
    "attention": ("q", "k", "v", "attention_out"),
    "most": ("q", "k", "v", "attention_out", "gate", "up"),
}


def checkpointed(layer: F, remat: str) -> F:
    """A layer's function whose backward pass recomputes what the policy (``Compute.remat``) does not save."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    if remat == "full":
        policy = policies.nothing_saveable
    elif remat == "offload_inputs":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*_SAVED[remat])
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


class Dense(nnx.Module):
    """``y = x W + b`` with kernel ``[in, out]``, and an optional low-rank addition ``(x A) B``.

    An int8 kernel (``models/int8.py``) has a ``scale [out]``: ``y = (x W) scale + b``. ``lora_a [in, r]`` and
    ``lora_b [r, out]`` are absent until ``models/lora.py`` adds them (LoRA, arXiv 2106.09685); their scale is folded
    into the initial values there.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        dims: tuple[str | None, str | None],
        *,
        bias: bool = True,
        init: params.Initializer | None = None,
        bias_init: params.Initializer | None = None,
    ):
        default = params.uniform_fan_in(d_in)
        self.kernel = params.declare((d_in, d_out), dims, init or default)
        self.bias = (
            params.declare((d_out,), (dims[1],), bias_init or (params.zeros if init else default))
            if bias
            else None
        )
        self.scale = nnx.data(None)
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.scale is not None:
            y = y * self.scale[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + (x @ self.lora_a[...]) @ self.lora_b[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis; statistics in float32, result in x's dtype."""

    def __init__(self, width: int, eps: float):
        self.scale = params.declare((width,), (None,), params.ones)
        self.eps = eps

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(dtype or x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias over the last axis; statistics in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = params.declare((width,), (None,), params.ones)
        self.bias = params.declare((width,), (None,), params.zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        y = y - mean
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table ``[rows, width]`` looked up by integer ids."""

    def __init__(self, rows: int, width: int, dims: tuple[str | None, str | None], init: params.Initializer):
        self.embedding = params.declare((rows, width), dims, init)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0)

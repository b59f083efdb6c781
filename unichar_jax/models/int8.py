"""Weights of eight bits for inference: int8 kernels in the decoder's projections, one scale for each output channel.

``W ~ q * scale`` with q int8 ``[..., in, out]`` and scale ``[..., out]``, symmetric: the largest weight of a channel is
127. The kernel stays int8 in memory; ``Dense`` casts it where it multiplies and scales what comes out, so that the
matmul's order and dtype are those of the whole model. The scale is a bfloat16 number kept as float32: casting it to
the compute dtype loses nothing.

The two experts' seven projections are 13.05 of BAGEL's 14.6 billion numbers. Embedding, head, tower, connector and the
latents' layers stay whole: they are a tenth of the memory, and the head decides between neighbouring logits.

``declare`` turns declarations into those of the small form, ``small_form`` loaded arrays into its arrays, one at a
time: never are all of them whole. Adapters go around an int8 base as around any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.models import params
from unichar_jax.models.decoder import EXPERTS, PROJECTIONS
from unichar_jax.models.unified import UnifiedModel


def declare(module: UnifiedModel) -> UnifiedModel:
    """Makes the projections of a fresh module of declarations int8; returns that module."""
    for expert in EXPERTS:
        for projection in PROJECTIONS:
            dense = getattr(getattr(module.decoder.layers, expert), projection)
            spec = dense.kernel.get_value()
            (*lead, _, d_out), (*lead_dims, _, out_dim) = spec.shape, spec.dims
            dense.kernel = params.declare(spec.shape, spec.dims, spec.init, np.dtype(np.int8))
            dense.scale = params.declare((*lead, d_out), (*lead_dims, out_dim), params.ones)
    return module


def is_int8(model: UnifiedModel) -> bool:
    return model.decoder.layers.und.q.scale is not None


def packed(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The int8 kernel and the float32 scale of a kernel ``[in, out]``."""
    kernel = kernel.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(kernel), axis=0) / 127).astype(jnp.bfloat16).astype(jnp.float32)
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8), scale


@jax.jit
def _packed_layers(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """``packed`` of (kernel, or kernel and its two adapters) layer by layer: never a whole float32 copy."""

    def pack(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        kernel, *adapters = (x.astype(jnp.float32) for x in layer)
        return packed(kernel + adapters[0] @ adapters[1] if adapters else kernel)

    return jax.lax.map(pack, layers)


def small_form(name: str, array: Any, adapters: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a loaded array of the whole model becomes: itself, or two; adapters ``{name: array}`` are merged."""
    stem, _, leaf = name.rpartition(".")
    if (
        leaf != "kernel"
        or not stem.startswith("decoder.layers.")
        or stem.rpartition(".")[2] not in PROJECTIONS
    ):
        return {name: array}
    around = [adapters[n] for n in (f"{stem}.lora_a", f"{stem}.lora_b") if n in adapters]
    kernel, scale = _packed_layers((array, *around))
    return {name: kernel, f"{stem}.scale": scale}

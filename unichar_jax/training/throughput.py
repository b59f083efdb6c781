"""Useful work of a batch, and the devices' peak: what ``mfu`` in the log is made of.

"Useful" is what the batch asks for: each real token through one expert, the visible pairs of attention, the
head on labelled tokens; neither padding, nor what the mask hides, nor recomputation. Counted on the device
from the batch itself, so it is right for any packing and any number of hosts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unichar_jax.config.model import ModelConfig
from unichar_jax.models import flops
from unichar_jax.models.streams import Batch, TokenMeta, visible
from unichar_jax.parallel.topology import CHIPS

# What JAX calls a device, by its beginning, most specific first; and its name in the table of chips.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}

# Passes that a product with weights takes part in: forward, gradients of activations, gradients of weights (with
# adapters, next to none). Where only one expert learns it is something in between: not reported.
PASSES = {"all": 3, "lora": 2}
_CHUNK = 512


def device_name() -> str:
    """The devices' name in the table of chips; of others what JAX calls them, as a word."""
    kind = jax.devices()[0].device_kind
    known = next((name for start, name in _KINDS.items() if kind.startswith(start)), None)
    return known or re.sub(r"[^a-z0-9]+", "-", kind.lower())


@functools.cache
def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of all devices of the run together; None where the kind is not in the table."""
    name = device_name()
    return CHIPS[name].flops * jax.device_count() if name in CHIPS else None


def _count(meta: TokenMeta, rule: Callable[[TokenMeta, TokenMeta], jax.Array]) -> jax.Array:
    """Pairs that a rule allows, float32, for a chunk of queries at a time."""
    rows, length = meta.shape
    chunk = min(_CHUNK, length)
    pad = -length % chunk
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad))), meta)
    queries = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(rows, -1, chunk), 1, 0), padded)
    return jax.lax.map(lambda q: rule(q, meta).sum(dtype=jnp.float32), queries).sum()


def _same_image(q: TokenMeta, k: TokenMeta) -> jax.Array:
    alike = (q.segment[:, :, None] == k.segment[:, None]) & (q.block[:, :, None] == k.block[:, None])
    return alike & (q.segment != 0)[:, :, None]


def work_of(batch: Batch) -> flops.Work:
    """What a batch asks for, as float32 scalars (under jit)."""
    text, vit, latent = batch.text, batch.vit, batch.latent
    words, seen, drawn = ((s.meta.segment != 0).sum(dtype=jnp.float32) for s in (text, vit, latent))
    labelled = (text.weight > 0).sum(dtype=jnp.float32)
    pairs = _count(TokenMeta.concatenate(text.meta, vit.meta, latent.meta), visible)
    vit_pairs = _count(vit.meta, _same_image) if vit.grid.shape[1] else jnp.zeros(())
    return flops.Work(words, seen, drawn, labelled, pairs, vit_pairs)


def useful_flops(cfg: ModelConfig, batch: Batch, trainable: str) -> jax.Array | None:
    """Useful floating-point operations of a training step on ``batch``; None where they are not defined."""
    passes = PASSES.get(trainable)
    return None if passes is None else jnp.asarray(flops.train_step(cfg, work_of(batch), passes))

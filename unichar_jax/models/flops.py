"""Floating-point operations of the model, by formula.

One multiply and add count two. Only matrix products are counted (norms, activations and softmax add under one
percent at real sizes), each token pays for one expert, and a layer is counted as often as it runs: the
compiler's own figure counts the body of a scan once. The backward pass costs twice the forward pass. "Useful"
work leaves out recomputation and whatever an attention mask hides; ``plan`` and benchmarks compare what is
executed with it. What a batch asks for is counted from the batch itself (``work_of``), on the device: each real
token, the visible pairs of attention, the labelled tokens; so it is right for any packing and any number of hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.config.model import DecoderConfig, ModelConfig, VisionConfig
from unichar_jax.models.streams import Batch, TokenMeta, visible

_CHUNK = 512


def expert_weights(cfg: DecoderConfig) -> int:
    """Weights that one token is multiplied with in one decoder layer (biases and norms left out)."""
    h, d = cfg.hidden_size, cfg.head_dim
    return 2 * h * cfg.num_heads * d + 2 * h * cfg.num_kv_heads * d + 3 * h * cfg.mlp_size


def attention(num_heads: int, head_dim: int, pairs: float) -> float:
    """Scores and weighted sum over ``pairs`` (query, key) pairs, forward. Dense attention has L * L pairs."""
    return 4 * num_heads * head_dim * pairs


def decoder_layer(cfg: DecoderConfig, tokens: float, pairs: float) -> float:
    """One decoder layer's forward pass: every token through one expert, and attention."""
    return 2 * expert_weights(cfg) * tokens + attention(cfg.num_heads, cfg.head_dim, pairs)


def vision_layer(cfg: VisionConfig, tokens: float, pairs: float) -> float:
    """One layer of the vision tower, forward."""
    h = cfg.hidden_size
    weights = 4 * h * h + 2 * h * cfg.mlp_size
    return 2 * weights * tokens + attention(cfg.num_heads, h // cfg.num_heads, pairs)


@dataclass(frozen=True)
class Work:
    """What a batch asks for.

    Attributes:
      text, vit, latent: tokens in each stream.
      labelled: text tokens that predict something (the head runs on these only).
      pairs: visible (query, key) pairs in the decoder.
      vit_pairs: the same in the vision tower.
    """

    text: float
    vit: float
    latent: float
    labelled: float
    pairs: float
    vit_pairs: float


def forward(cfg: ModelConfig, work: Work) -> float:
    """The forward pass of one batch, without the autoencoder (its moments are cached)."""
    d, v = cfg.decoder, cfg.vision
    tokens = work.text + work.vit + work.latent
    total = d.num_layers * decoder_layer(d, tokens, work.pairs)
    total += v.num_layers * vision_layer(v, work.vit, work.vit_pairs)
    total += 2 * d.hidden_size * d.vocab_size * work.labelled
    connector = v.hidden_size * d.hidden_size + d.hidden_size**2
    total += 2 * work.vit * (v.patch_dim * v.hidden_size + connector)
    time = 256 * d.hidden_size + d.hidden_size**2
    total += 2 * work.latent * (2 * cfg.latent_dim * d.hidden_size + time)
    return total


def attention_of(cfg: ModelConfig, work: Work) -> float:
    """The part of ``forward`` that is attention: products without weights."""
    d, v = cfg.decoder, cfg.vision
    total = d.num_layers * attention(d.num_heads, d.head_dim, work.pairs)
    return total + v.num_layers * attention(v.num_heads, v.hidden_size // v.num_heads, work.vit_pairs)


def train_step(cfg: ModelConfig, work: Work, passes: float = 3) -> float:
    """Useful work of one training step: forward, gradients of activations, gradients of weights.

    ``passes``: how many of the three a product with weights takes part in: 2 where the weights are frozen.
    Attention has no weights, and both of its factors want gradients: always 3.
    """
    return passes * forward(cfg, work) + (3 - passes) * attention_of(cfg, work)


def work_of(batch: Batch) -> Work:
    """What a batch asks for, as float32 scalars (under jit)."""
    text, vit, latent = batch.text, batch.vit, batch.latent
    words, seen, drawn = ((s.meta.segment != 0).sum(dtype=jnp.float32) for s in (text, vit, latent))
    labelled = (text.weight > 0).sum(dtype=jnp.float32)
    pairs = _count(TokenMeta.concatenate(text.meta, vit.meta, latent.meta), visible)
    vit_pairs = _count(vit.meta, _same_image) if vit.grid.shape[1] else jnp.zeros(())
    return Work(words, seen, drawn, labelled, pairs, vit_pairs)


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

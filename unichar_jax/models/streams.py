"""The three-stream batch, and the one rule of who sees whom.

A packed batch is three streams: ``text``, ``vit`` and ``latent``. Which expert a token uses is a matter of
which stream it is in (text and vit: understanding; latent: generation), so experts are dense matmuls over
contiguous arrays. Every token carries the same small metadata (``TokenMeta``), and ``visible`` is a pure
function of it. The same function serves packed training, prefill into a cache, text decoding and denoising.
Storage order means nothing to attention; nothing is ever interleaved.

Source of the rule: BAGEL's causal / full / noise splits (arXiv 2505.14683).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # numpy on the host, jax.Array on the device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenMeta:
    """Metadata of tokens, every field int32 ``[B, L]``.

    Attributes:
      segment: the sample a token belongs to; 0 is padding.
      order: its place in the sample's sequence.
      position: its rotary position (all tokens of an image share one).
      block: the image split it belongs to, unique inside a sample; 0 for causal text. The two delimiters of
        an image are text-stream tokens that carry their image's block.
      noisy: 1 if the block is a noised target image, which nobody outside it may see.
    """

    segment: Array
    order: Array
    position: Array
    block: Array
    noisy: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.segment.shape

    @classmethod
    def concatenate(cls, *metas: TokenMeta) -> TokenMeta:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *metas)


def visible(q: TokenMeta, k: TokenMeta) -> jax.Array:
    """Boolean ``[B, Lq, Lk]``: may query i see key j?

    Causal inside a sample, bidirectional inside an image split; a noised image is seen by itself only;
    padding sees nothing and is seen by nobody.
    """

    def outer(name: str) -> tuple[Array, Array]:
        return getattr(q, name)[:, :, None], getattr(k, name)[:, None, :]

    q_seg, k_seg = outer("segment")
    q_ord, k_ord = outer("order")
    q_blk, k_blk = outer("block")
    same_block = q_blk == k_blk
    return (
        (q_seg == k_seg)
        & (q_seg != 0)
        & ((k_ord <= q_ord) | (same_block & (k_blk != 0)))
        & ((k.noisy[:, None, :] == 0) | same_block)
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextStream:
    """Text tokens and image delimiters.

    Attributes:
      ids: int32 ``[B, L]`` token ids.
      meta: their metadata.
      targets: int32 ``[B, L]``, the token each position must predict (0 where there is no loss).
      weight: float32 ``[B, L]``, the weight of that prediction in the loss (0: none).
      task: int32 ``[B, L]``, index of the task a token belongs to (only for losses per task in the log).
    """

    ids: Array
    meta: TokenMeta
    targets: Array
    weight: Array
    task: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VitStream:
    """Patches of images that are looked at.

    Attributes:
      patches: float32 ``[B, L, patch * patch * 3]`` in [-1, 1], channel fastest inside a patch.
      grid: int32 ``[B, L]``, ``row * max_patches_per_side + column``.
      meta: metadata.
    """

    patches: Array
    grid: Array
    meta: TokenMeta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentStream:
    """Latent tokens of images that are drawn (noisy) or given as clean conditions.

    Attributes:
      mean, logvar: float32 ``[B, L, latent_dim]``, the autoencoder's posterior, in patches, before scaling.
      grid: int32 ``[B, L]``, ``row * max_latent_size + column``.
      timestep: float32 ``[B, L]``, the raw normal draw before sigmoid and shift, one value per image;
        ``-inf`` for a clean image.
      meta: metadata.
      weight: float32 ``[B, L]``, weight of the flow error in the loss (0: none).
      task: int32 ``[B, L]``, as in ``TextStream``.
    """

    mean: Array
    logvar: Array
    grid: Array
    timestep: Array
    meta: TokenMeta
    weight: Array
    task: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One packed training batch. Any stream may have length 0."""

    text: TextStream
    vit: VitStream
    latent: LatentStream

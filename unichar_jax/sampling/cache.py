"""The key-value cache: what a model has read so far, for a batch of independent contexts.

A cache holds keys, values and metadata of every token in slots of a fixed capacity. A token's slot is its
place in the sequence (``meta.order``), rows have lengths of their own, and ``segment`` 0 marks an empty
slot, so that one attention mask (``streams.visible``) serves ragged rows. Functions return a new cache and
leave the old one usable: a context is forked by keeping both.

Rotary positions follow BAGEL: a text token advances the counter by one, a whole image by one. Padded lengths
and capacities should come from ``bucket``, so that programs are compiled for a few shapes only. Nothing here
checks that tokens fit, because lengths are on the device: a token beyond the capacity is dropped. Callers
that know the lengths ``grow`` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.models.decoder import KeyValues
from unichar_jax.models.streams import TokenMeta, VitStream
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import constrain
from unichar_jax.sampling.tracing import jitted

_KV_DIMS = (None, "batch", "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of ``B`` contexts with room for ``C`` tokens each.

    Attributes:
      k, v: ``[layers, B, num_kv_heads, C, head_dim]`` in the compute dtype, keys rotated: attention reads
        what one head holds in one piece.
      meta: metadata of the slots, ``[B, C]``; segment 1 is used, 0 empty.
      length: int32 ``[B]``, tokens held.
      rope: int32 ``[B]``, the next rotary position.
    """

    k: jax.Array
    v: jax.Array
    meta: TokenMeta
    length: jax.Array
    rope: jax.Array

    @property
    def prefixes(self) -> list[tuple[KeyValues, TokenMeta]]:
        """What a forward pass reads of it (``UnifiedModel.backbone``)."""
        return [((self.k, self.v), self.meta)]

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def capacity(self) -> int:
        return self.meta.shape[1]


def bucket(n: int, minimum: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... (2^i and 3 * 2^i) that is at least n and ``minimum``."""
    n = max(n, minimum)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def padded(rows: Sequence[Sequence[int] | np.ndarray], minimum: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32 ``[B, bucket of the longest]``, zeros behind each, and their lengths ``[B]``."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket(int(lengths.max(initial=0)), minimum)), np.int32)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return ids, lengths


def empty(model: UnifiedModel, batch: int, capacity: int) -> KVCache:
    """A cache that holds nothing."""
    d = model.cfg.decoder
    shape = (d.num_layers, batch, d.num_kv_heads, capacity, d.head_dim)
    slots, rows = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32)
    kv = jnp.zeros(shape, model.compute.jax_dtype)
    return KVCache(kv, kv, TokenMeta(slots, slots, slots, slots, slots), rows, rows)


# -- rows and capacity --------------------------------------------------------------------------------------


def _map_rows(f, cache: KVCache) -> KVCache:
    """Applies ``f(array, axis of the batch)`` to every array of a cache."""
    return KVCache(
        f(cache.k, 1),
        f(cache.v, 1),
        jax.tree.map(lambda x: f(x, 0), cache.meta),
        f(cache.length, 0),
        f(cache.rope, 0),
    )


def take(cache: KVCache, rows: jax.Array) -> KVCache:
    """The cache of ``rows`` (int32 ``[n]``, repetitions allowed)."""
    return _map_rows(lambda x, axis: jnp.take(x, rows, axis=axis), cache)


def repeat(cache: KVCache, n: int) -> KVCache:
    """Every row ``n`` times in a row: one prompt's context for the n images of its group."""
    return _map_rows(lambda x, axis: jnp.repeat(x, n, axis=axis), cache)


def stack(caches: Sequence[KVCache]) -> KVCache:
    """Rows of all caches one after the other, with the largest capacity among them."""
    capacity = max(c.capacity for c in caches)
    grown = [fit(c, capacity) for c in caches]
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(_batch_first(c) for c in grown))
    return _batch_first(joined)


def interleave(caches: Sequence[KVCache]) -> KVCache:
    """Row i of every cache, then row i + 1, ...: batch ``B * len(caches)``, capacities made equal.

    Where the batch is split over devices, rows that belong together stay together.
    """
    capacity = max(c.capacity for c in caches)
    grown = [fit(c, capacity) for c in caches]

    def join(axis: int, xs: Sequence[jax.Array]) -> jax.Array:
        joined = jnp.stack(xs, axis=axis + 1)
        return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])

    return KVCache(
        join(1, [c.k for c in grown]),
        join(1, [c.v for c in grown]),
        jax.tree.map(lambda *xs: join(0, xs), *(c.meta for c in grown)),
        join(0, [c.length for c in grown]),
        join(0, [c.rope for c in grown]),
    )


def _batch_first(cache: KVCache) -> KVCache:
    return replace(cache, k=jnp.swapaxes(cache.k, 0, 1), v=jnp.swapaxes(cache.v, 0, 1))


def fit(cache: KVCache, capacity: int) -> KVCache:
    """The same contexts with another capacity; slots beyond it must be empty (see ``truncate``)."""
    if capacity == cache.capacity:
        return cache

    def resize(x: jax.Array, axis: int) -> jax.Array:
        if capacity < x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, capacity, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, capacity - x.shape[axis])
        return jnp.pad(x, pad)

    return replace(
        cache,
        k=resize(cache.k, 3),
        v=resize(cache.v, 3),
        meta=jax.tree.map(lambda x: resize(x, 1), cache.meta),
    )


def grow(cache: KVCache, capacity: int) -> KVCache:
    """``fit`` that never shrinks."""
    return fit(cache, max(capacity, cache.capacity))


def truncate(cache: KVCache, length: jax.Array) -> KVCache:
    """Forgets all but the first ``length`` tokens (int32 ``[B]``); a cut may not fall inside an image."""
    length = jnp.minimum(length, cache.length)
    kept = jnp.arange(cache.capacity) < length[:, None]
    # The first token that goes carries the rotary counter as it stood before it.
    first = jnp.minimum(length, cache.capacity - 1)[:, None]
    before = jnp.take_along_axis(cache.meta.position, first, axis=1)[:, 0]
    rope = jnp.where(length < cache.length, before, cache.rope)
    segment = jnp.where(kept, cache.meta.segment, 0)
    return replace(cache, meta=replace(cache.meta, segment=segment), length=length, rope=rope)


# -- metadata of the tokens that come next ------------------------------------------------------------------


def text_meta(cache: KVCache, lengths: jax.Array, padded: int) -> TokenMeta:
    """Metadata of the next ``lengths`` (``[B]``) causal text tokens, padded to ``[B, padded]``."""
    index = jnp.arange(padded, dtype=jnp.int32)[None, :]
    segment = (index < lengths[:, None]).astype(jnp.int32)
    zero = jnp.zeros_like(segment)
    return TokenMeta(segment, cache.length[:, None] + index, cache.rope[:, None] + index, zero, zero)


def image_meta(cache: KVCache, counts: jax.Array, padded: int, noisy: int = 0) -> TokenMeta:
    """Metadata of the next image of each row, in the order [start, end, tokens], ``[B, 2 + padded]``.

    Args:
      cache: the contexts so far.
      counts: int32 ``[B]``, tokens of each image; a row with 0 has no image, and no delimiters.
      padded: length of the token axis.
      noisy: 1 for an image that is being drawn.
    """
    index = jnp.arange(padded, dtype=jnp.int32)[None, :]
    counts = counts[:, None].astype(jnp.int32)
    place = jnp.concatenate(
        [jnp.zeros_like(counts), 1 + counts, jnp.broadcast_to(1 + index, (cache.batch, padded))],
        axis=1,
    )
    present = jnp.broadcast_to(counts > 0, (cache.batch, 2))
    segment = jnp.concatenate([present, index < counts], axis=1).astype(jnp.int32)
    everywhere = lambda x: jnp.broadcast_to(x[:, None], place.shape)  # noqa: E731
    return TokenMeta(
        segment,
        cache.length[:, None] + place,
        everywhere(cache.rope),
        # Lengths only grow, so the length at an image's start names its block uniquely.
        everywhere(cache.length + 1),
        jnp.full_like(segment, noisy),
    )


def delimiters(model: UnifiedModel, batch: int) -> jax.Array:
    """Embeddings of [image start, image end], ``[batch, 2, H]``."""
    tokens = model.cfg.special_tokens
    ids = jnp.array([[tokens.image_start, tokens.image_end]], jnp.int32)
    return model.embed_text(jnp.repeat(ids, batch, axis=0))


# -- reading ------------------------------------------------------------------------------------------------


def append(cache: KVCache, kv: KeyValues, meta: TokenMeta, rope_step: jax.Array) -> KVCache:
    """Writes new tokens into the slots that their order names.

    Args:
      cache: the contexts so far.
      kv: keys and values of all layers, ``[layers, B, L, num_kv_heads, head_dim]``.
      meta: their metadata ``[B, L]``; tokens with segment 0 are skipped.
      rope_step: int32 ``[B]``, how far the rotary counter moves.
    """
    rows = jnp.arange(cache.batch)[:, None]
    slots = jnp.where(meta.segment > 0, meta.order, cache.capacity)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        heads = jnp.arange(new.shape[-2])
        place = (slice(None), rows[..., None], heads, slots[..., None])
        return constrain(old.at[place].set(new, mode="drop"), _KV_DIMS)

    return KVCache(
        write(cache.k, kv[0]),
        write(cache.v, kv[1]),
        jax.tree.map(lambda old, new: old.at[rows, slots].set(new, mode="drop"), cache.meta, meta),
        cache.length + meta.segment.sum(axis=1, dtype=jnp.int32),
        cache.rope + rope_step.astype(jnp.int32),
    )


def read_text(
    model: UnifiedModel, cache: KVCache, ids: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Reads the first ``lengths`` (``[B]``) of ``ids`` (int32 ``[B, L]``) as causal text, taken as they are.

    Returns:
      Final-normed states ``[B, L, H]`` (for ``model.logits``) and the longer cache.
    """
    meta = text_meta(cache, lengths, ids.shape[1])
    hidden, _, kv = model.backbone(
        model.embed_text(ids),
        None,
        meta,
        prefixes=cache.prefixes,
        return_kv=True,
    )
    return hidden, append(cache, kv, meta, lengths)


@jitted
def prefill_text(model: UnifiedModel, cache: KVCache, ids: jax.Array, lengths: jax.Array) -> KVCache:
    """``read_text`` for the cache alone. The caller frames the text: ``BOS tokens EOS``."""
    return read_text(model, cache, ids, lengths)[1]


@jitted
def prefill_vit(
    model: UnifiedModel, cache: KVCache, patches: jax.Array, grid: jax.Array, counts: jax.Array
) -> KVCache:
    """Reads one image to be looked at in each row, with its two delimiters.

    Args:
      model, cache: the model and the contexts so far.
      patches: float32 ``[B, L, patch_dim]`` in [-1, 1] (``data.images.patchify``), padded.
      grid: int32 ``[B, L]``, ``row * max_patches_per_side + column``.
      counts: int32 ``[B]``, patches of each image; 0 leaves a row as it is.
    """
    meta = image_meta(cache, counts, grid.shape[1])
    vit = VitStream(patches, grid, jax.tree.map(lambda x: x[:, 2:], meta))
    und = jnp.concatenate([delimiters(model, cache.batch), model.embed_vit(vit)], axis=1)
    _, _, kv = model.backbone(und, None, meta, prefixes=cache.prefixes, return_kv=True)
    return append(cache, kv, meta, counts > 0)


@jitted
def prefill_latent(
    model: UnifiedModel, cache: KVCache, latents: jax.Array, grid: jax.Array, counts: jax.Array
) -> KVCache:
    """Reads one clean image (t = 0) as autoencoder latents in each row, with its two delimiters.

    Args:
      model, cache: the model and the contexts so far.
      latents: float32 ``[B, L, latent_dim]``, scaled latents in patches, padded.
      grid: int32 ``[B, L]``, ``row * max_latent_size + column``.
      counts: int32 ``[B]``, tokens of each image; 0 leaves a row as it is.
    """
    meta = image_meta(cache, counts, grid.shape[1])
    clean = jnp.zeros(grid.shape, jnp.float32)
    _, _, kv = model.backbone(
        delimiters(model, cache.batch),
        model.embed_latent(latents, clean, grid),
        meta,
        prefixes=cache.prefixes,
        return_kv=True,
    )
    return append(cache, kv, meta, counts > 0)

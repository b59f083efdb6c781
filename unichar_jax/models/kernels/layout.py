"""A storage order in which every query sees at most two intervals of keys.

The hybrid mask (``models/streams.py``) over tokens in any order becomes, after one sort: clean tokens of all
samples first, sample by sample in sequence order, then the noised images, each starting at a multiple of
``alignment``. In that order a query sees ``[start of its sample, prefix_end)`` and, if it is noised, its own
image as well; the lower bound is left to sample ids. What a query sees fits one int32 (``Code``), so a kernel
needs no mask in memory.

It holds for every mask of ours: an image's tokens, delimiters included, are contiguous in the sample's order,
and only images are noised.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.models.streams import TokenMeta

MAX_CAPACITY = 65_280


@dataclass(frozen=True)
class Code:
    """How ``prefix_end | own_start / alignment | own_end / alignment`` share 32 bits."""

    own_bits: int
    alignment: int

    @classmethod
    def for_places(cls, places: int) -> Code:
        """The finest alignment that the bits allow: 1 up to 1,023 places, 32 at 12k, 128 at 32k."""
        prefix = places.bit_length()
        own = (32 - prefix) // 2
        alignment = 1
        while -(-places // alignment) >= 2**own:
            alignment *= 2
        return cls(own, alignment)

    def pack(self, prefix_end: jax.Array, own_start: jax.Array, own_end: jax.Array) -> jax.Array:
        start, end = own_start // self.alignment, own_end // self.alignment
        return (prefix_end << 2 * self.own_bits) | (start << self.own_bits) | end

    def visible(self, code: jax.Array, key: jax.Array) -> jax.Array:
        """May a query with this code see the key at this place, inside its sample? Runs inside kernels."""
        field = 2**self.own_bits - 1
        prefix_end = jax.lax.shift_right_logical(code, 2 * self.own_bits)
        start, end = (code >> self.own_bits) & field, code & field
        cell = jax.lax.shift_right_logical(key, self.alignment.bit_length() - 1)
        return (key < prefix_end) | ((cell >= start) & (cell < end))


def block_size(length: int) -> int:
    """Side of the kernel's blocks: large ones for speed, small ones where rounding up would cost more."""
    for size, at_least in ((1024, 8192), (512, 2048), (256, 1024)):
        if length >= at_least:
            return size
    return 128


def capacity(length: int) -> int:
    """Places for ``length`` tokens: a multiple of the block size.

    Where noised images must be aligned, an eighth is added. That is always enough if they have ``8 *
    alignment`` tokens on average (256 at 12k tokens, 1,024 at 32k), and mostly for smaller ones, as padding
    leaves room too.
    """
    block = block_size(length)
    exact = -(-length // block) * block
    if Code.for_places(exact).alignment == 1:
        return exact
    return -(-(length + length // 8) // block) * block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch go, and what each place sees.

    Attributes:
      source: int32 ``[B, C]``, the token at each place; ``L`` for an empty place. place: int32 ``[B, L]``,
        the place of each token; ``C`` for padding. sample: int32 ``[B, C]``, the token's sample; 0 for an
        empty place. code: int32 ``[B, C]``, what a query at each place sees (``Code``). An empty place sees
        itself. live: bool ``[B, C / block, C / block]``, may a query of block i see a key of block j? Never
        false by mistake;
        sometimes true in vain.
      overflow: bool ``[B]``, the row's tokens did not find room: its attention is to be NaN.
    """

    source: jax.Array
    place: jax.Array
    sample: jax.Array
    code: jax.Array
    live: jax.Array
    overflow: jax.Array


def make_layout(meta: TokenMeta, places: int, block: int) -> Layout:
    """The layout of a batch; memory and time of L log L.

    Args:
      meta: of tokens ``[B, L]`` in any order.
      places: C, from ``capacity``.
      block: divides C.
    """
    code = Code.for_places(places)
    return jax.vmap(lambda m: _layout_of_row(m, places, block, code))(meta)


def _layout_of_row(meta: TokenMeta, places: int, block: int, code: Code) -> Layout:
    length = meta.segment.shape[0]
    padding = meta.segment == 0
    # One key (orders are below 2^16, samples below 2^15): to sort by three takes the TPU compiler minutes.
    key = jnp.where(padding, jnp.iinfo(jnp.int32).max, (meta.segment << 16) + meta.order)
    token = jnp.argsort(key, stable=False)
    m = jax.tree.map(lambda x: x[token], meta)
    real = m.segment != 0
    noised = real & (m.noisy != 0)
    clean = real & ~noised

    def changes(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])

    # A group is what is seen as one: an image, or a single causal token.
    rank = jnp.arange(length)
    starts = changes(m.segment) | changes(m.block) | (m.block == 0)
    group_start = jax.lax.cummax(jnp.where(starts, rank, 0))
    next_start = jnp.where(starts, rank, length)[1:]
    group_end = jax.lax.cummin(jnp.append(next_start, length), reverse=True)

    def align(x: jax.Array) -> jax.Array:
        return -(-x // code.alignment) * code.alignment

    # Clean tokens take places 0, 1, ...; noised groups follow, each aligned.
    clean_so_far = jnp.cumsum(clean)
    size = align(group_end - group_start)
    used = jnp.cumsum(jnp.where(starts & noised, size, 0))
    own_start = jnp.where(noised, align(clean_so_far[-1]) + used - size, 0)
    own_end = jnp.where(noised, own_start + size, 0)
    place = jnp.where(noised, own_start + rank - group_start, clean_so_far - 1)
    place = jnp.where(real, place, places)
    # A clean token sees to the end of its group, a noised one what came before its image.
    prefix_end = clean_so_far + jnp.where(clean, group_end - 1 - rank, 0)
    sample_start = jax.lax.cummax(jnp.where(changes(m.segment), clean_so_far - clean, 0))

    at_place = jnp.full(places, length).at[place].set(rank, mode="drop")
    empty = at_place == length
    here = jnp.arange(places)

    def spread(x: jax.Array, otherwise: jax.Array | int) -> jax.Array:
        return jnp.where(empty, otherwise, x[jnp.minimum(at_place, length - 1)])

    prefix = (spread(sample_start, here), spread(prefix_end, here + 1))
    own = (spread(own_start, 0), spread(own_end, 0))
    return Layout(
        source=spread(token, length),
        place=jnp.zeros(length, jnp.int32).at[token].set(place),
        sample=spread(m.segment, 0),
        code=code.pack(prefix[1], *own),
        live=_overlaps(*prefix, block) | _overlaps(*own, block),
        overflow=(real & (place >= places)).any(),
    )


def _overlaps(start: jax.Array, end: jax.Array, block: int) -> jax.Array:
    """``[C / block, C / block]``: does the hull of a query block's intervals meet a key block?"""
    nothing, places = start >= end, start.shape[0]
    first = jnp.where(nothing, places, start).reshape(-1, block).min(axis=1)
    last = jnp.where(nothing, 0, end).reshape(-1, block).max(axis=1)
    key = jnp.arange(0, places, block)
    return (key[None] < last[:, None]) & (key[None] + block > first[:, None])


@jax.custom_vjp
def move(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Rows ``x[b, index[b, i]]``, zero where the index is beyond the end; ``back`` is the inverse.

    The gradient moves rows back by ``back``: a permutation needs no scatter.
    """
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)


def _move_forward(x, index, back):
    return move(x, index, back), (index, back)


def _move_backward(residuals, g):
    index, back = residuals
    return move(g, back, index), None, None


move.defvjp(_move_forward, _move_backward)

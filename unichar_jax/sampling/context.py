"""Reading prompts into caches, batched, and never the same beginning twice.

A context is a sequence of parts: texts, pictures to look at, pictures given as latents. A ``Reader`` reads
the contexts of a batch into one cache with padded shapes from a few buckets, and remembers what it read: a
later context that begins alike (the next turn of a conversation, the same character's next prompt) starts
from a copy of that beginning. Parts before a token never depend on it, so the result is the same.

This module does not tokenise and opens no picture.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling.cache import KVCache, bucket
from unichar_jax.sampling.tracing import jitted

MIN_TEXT, MIN_IMAGE, MIN_CAPACITY = 16, 16, 64
"""The smallest padded lengths; larger ones come from ``cache.bucket``."""


@dataclass(frozen=True)
class Text:
    """A text that is read: its ids with BOS and EOS."""

    ids: tuple[int, ...]

    @functools.cached_property
    def keys(self) -> np.ndarray:
        return np.asarray(self.ids, np.int64)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is read.

    Attributes:
      kind: "vit" (looked at) or "latent" (given to the generation expert).
      tokens: patches or latents, float32 ``[N, width]``.
      grid: int32 ``[N]``, ids of its position table.
    """

    kind: str
    tokens: np.ndarray
    grid: np.ndarray

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """One number for each slot (delimiters included), the same for equal pictures, never a token id."""
        digest = hashlib.sha256(self.kind.encode())
        digest.update(np.ascontiguousarray(self.tokens))
        digest.update(np.ascontiguousarray(self.grid))
        number = int.from_bytes(digest.digest()[:7], "big")
        return np.full(len(self.grid) + 2, -1 - number, np.int64)


Part = Text | Picture


def num_tokens(parts: Sequence[Part]) -> int:
    """Slots that a context takes."""
    return sum(len(p.keys) for p in parts)


def shape_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """The kinds of the parts; contexts of one shape can be read in one batch."""
    return tuple("text" if isinstance(p, Text) else p.kind for p in parts)


@jitted(static_argnames="capacity")
def _beginning(cache: KVCache, length: jax.Array, capacity: int) -> KVCache:
    """The first ``length`` tokens of a one-row cache, with another capacity."""
    return kv.fit(kv.truncate(cache, length[None]), capacity)


@jitted(static_argnames="capacity")
def _row(cache: KVCache, index: jax.Array, length: jax.Array, capacity: int) -> KVCache:
    """One row of a cache by itself, with another capacity."""
    return kv.fit(kv.truncate(kv.take(cache, index[None]), length[None]), capacity)


_stack = jitted(kv.stack)
_empty = jitted(kv.empty, static_argnames=("batch", "capacity"))


class Reader:
    """Reads contexts and remembers them.

    Args:
      slots: how many tokens to remember in all; the least recently used go first. 0 remembers nothing.
    """

    def __init__(self, slots: int = 16_384):
        self._slots = slots
        self._known: dict[tuple[str, bytes], tuple[np.ndarray, KVCache]] = {}

    def read(
        self,
        model: UnifiedModel,
        name: str,
        contexts: Sequence[Sequence[Part]],
        *,
        room: int = 0,
        batch: int | None = None,
    ) -> KVCache:
        """Reads one context for each row.

        Args:
          model: the model; ``name`` tells its memories from those of other models.
          name: of the model.
          contexts: equal in shape (``shape_of``).
          room: free slots that each row needs beyond its context.
          batch: rows of the cache (default: a bucket of the number of contexts); the rest is empty.
        """
        keys = [_keys(parts) for parts in contexts]
        batch = batch or bucket(len(contexts))
        capacity = bucket(max(len(k) for k in keys) + room, MIN_CAPACITY)
        found = [self._recall(name, k) for k in keys]
        known = np.array([n for _, n in found] + [0] * (batch - len(contexts)))
        cache = self._start(model, [c for c, _ in found], known, batch, capacity)
        offsets = np.zeros(batch, int)
        for parts in zip(*contexts, strict=True):
            skip = np.maximum(known - offsets, 0)
            cache = _read_part(model, cache, parts, skip)
            offsets[: len(parts)] += [len(p.keys) for p in parts]
        for row, k in enumerate(keys):
            if known[row] < len(k) <= self._slots:
                stored = _row(cache, jnp.int32(row), jnp.int32(len(k)), bucket(len(k), MIN_CAPACITY))
                self._remember(name, k, stored)
        return cache

    def _start(
        self,
        model: UnifiedModel,
        caches: Sequence[KVCache | None],
        known: np.ndarray,
        batch: int,
        capacity: int,
    ) -> KVCache:
        if not known.any():
            return _empty(model, batch=batch, capacity=capacity)
        blank = _empty(model, batch=1, capacity=capacity)
        rows = [
            blank if cache is None else _beginning(cache, jnp.int32(n), capacity)
            for cache, n in zip([*caches, *[None] * (batch - len(caches))], known, strict=True)
        ]
        return _stack(rows) if batch > 1 else rows[0]

    def _recall(self, name: str, keys: np.ndarray) -> tuple[KVCache | None, int]:
        """The memory that shares the longest beginning, and its length."""
        best: tuple[tuple[str, bytes] | None, int] = (None, MIN_TEXT - 1)  # less is not worth a copy
        for identity, (other, _) in self._known.items():
            if identity[0] == name and (n := _common(keys, other)) > best[1]:
                best = identity, n
        identity, length = best
        if identity is None:
            return None, 0
        self._known[identity] = self._known.pop(identity)  # the most recently used is last
        return self._known[identity][1], length

    def _remember(self, name: str, keys: np.ndarray, cache: KVCache) -> None:
        self._known[name, keys.tobytes()] = keys, cache
        while sum(cache.capacity for _, cache in self._known.values()) > self._slots:
            self._known.pop(next(iter(self._known)))

    def forget(self, name: str) -> None:
        """Drops the memories of a model."""
        self._known = {i: known for i, known in self._known.items() if i[0] != name}


def _keys(parts: Sequence[Part]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(p.keys for p in parts)])


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _read_part(model: UnifiedModel, cache: KVCache, parts: Sequence[Part], skip: np.ndarray) -> KVCache:
    """Reads part j of every row; ``skip`` (``[B]``) of its tokens are in the cache already."""
    if shape_of(parts[:1]) == ("text",):
        return _read_texts(model, cache, [p.keys[n:] for p, n in zip(parts, skip, strict=False)])
    # A shared beginning never ends inside a picture: all its slots have one key.
    pictures = [p for p in parts if isinstance(p, Picture)]
    return _read_pictures(model, cache, pictures, skip[: len(parts)] > 0)


def _read_texts(model: UnifiedModel, cache: KVCache, texts: Sequence[np.ndarray]) -> KVCache:
    ids, lengths = kv.padded([*texts, *[()] * (cache.batch - len(texts))], MIN_TEXT)
    return kv.prefill_text(model, cache, ids, lengths) if lengths.any() else cache


def _read_pictures(
    model: UnifiedModel, cache: KVCache, pictures: Sequence[Picture], known: np.ndarray
) -> KVCache:
    new = [0 if k else len(p.grid) for p, k in zip(pictures, known, strict=True)]
    counts = _padded_rows(new, cache.batch)
    if not counts.any():
        return cache
    length = bucket(max(len(p.grid) for p in pictures), MIN_IMAGE)
    tokens = np.zeros((cache.batch, length, pictures[0].tokens.shape[-1]), np.float32)
    grid = np.zeros((cache.batch, length), np.int32)
    for row, picture in enumerate(pictures):
        tokens[row, : len(picture.grid)] = picture.tokens
        grid[row, : len(picture.grid)] = picture.grid
    prefill = kv.prefill_vit if pictures[0].kind == "vit" else kv.prefill_latent
    return prefill(model, cache, tokens, grid, counts)


def _padded_rows(values: Sequence[int], batch: int) -> np.ndarray:
    return np.array([*values, *[0] * (batch - len(values))], np.int32)

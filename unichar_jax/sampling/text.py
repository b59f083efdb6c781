"""Text decoding for a batch of contexts: greedy, temperature, top-k and top-p, each row with settings of its
own.

One program decodes a chunk of tokens in a ``lax.while_loop`` that ends when every row has; ``stream`` runs
short chunks and looks at the text in between (callbacks, stop strings, cancellation). A turn starts with BOS
and ends before EOS; neither is part of the result. A row's random draws depend on its seed and its own token
count only, so a result does not depend on what else is in the batch.

Nucleus sampling: arXiv 1904.09751.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.errors import UserError
from unichar_jax.models.decoder import DecoderLayer
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling.cache import KVCache, read_text
from unichar_jax.sampling.tracing import jitted

CHUNK = 16
"""Tokens between two looks at the text when streaming."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; special tokens inside a text are parsed, none are added."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TextSettings:
    """How one text is decoded.

    Attributes:
      max_tokens: at most so many new tokens.
      temperature: of the softmax; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens (and ties with the last); 0 keeps all.
      top_p: keep the likeliest tokens until their probabilities reach p; 1 keeps all.
      seed: of the draws.
      stop: strings that end the text; they are not part of it.
    """

    max_tokens: int = 500
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("stop", all(self.stop), "non-empty strings"),
        ):
            if not ok:
                raise UserError(f"text.{name}: expected {expected}, got {getattr(self, name)!r}.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """``TextSettings`` of every row as arrays ``[B]``: one program for all settings."""

    max_tokens: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, settings: Sequence[TextSettings]) -> Choice:
        column = lambda name, dtype: jnp.asarray([getattr(s, name) for s in settings], dtype)  # noqa: E731
        return cls(
            column("max_tokens", jnp.int32),
            column("temperature", jnp.float32),
            column("top_k", jnp.int32),
            column("top_p", jnp.float32),
            jnp.asarray([s.seed & 0xFFFFFFFF for s in settings], jnp.uint32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where decoding stands.

    Attributes:
      cache: everything fed so far.
      token: int32 ``[B]``, the newest token, not yet fed (BOS at the start, EOS where a row ended by itself).
      count: int32 ``[B]``, tokens drawn.
      done: bool ``[B]``.
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    done: jax.Array


def start(model: UnifiedModel, cache: KVCache, rows: int | None = None) -> DecodeState:
    """A turn about to begin; rows from ``rows`` on are padding of the batch and count as done."""
    rows = cache.batch if rows is None else rows
    bos = jnp.full(cache.batch, model.cfg.special_tokens.bos, jnp.int32)
    return DecodeState(cache, bos, jnp.zeros_like(bos), jnp.arange(cache.batch) >= rows)


def choose(logits: jax.Array, choice: Choice, count: jax.Array) -> jax.Array:
    """Draws one token for each row from logits ``[B, V]``; ``count`` ``[B]`` numbers the draw."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(scaled: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(choice.seed, count)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(choice.temperature > 0, drawn.astype(jnp.int32), greedy)

    # Sorting a big vocabulary is costly: only where some row asks for it.
    truncated = jnp.any((choice.top_k > 0) | (choice.top_p < 1))
    scaled = logits / jnp.where(choice.temperature > 0, choice.temperature, 1)[:, None]
    return jax.lax.cond(
        jnp.any(choice.temperature > 0),
        lambda: draw(jax.lax.cond(truncated, lambda: _truncate(scaled, choice), lambda: scaled)),
        lambda: greedy,
    )


def _truncate(logits: jax.Array, choice: Choice) -> jax.Array:
    """Masks what top-k and then top-p leave out; a row that keeps everything is unchanged."""
    vocabulary = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    k = jnp.where(choice.top_k > 0, jnp.minimum(choice.top_k, vocabulary), vocabulary)
    kept = jnp.arange(vocabulary) < k[:, None]
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept &= (before < choice.top_p[:, None]) | (choice.top_p[:, None] >= 1)
    smallest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


@jitted
def _layers_apart(model: UnifiedModel) -> list[DecoderLayer]:
    return model.decoder.text_layers()


def text_layers(model: UnifiedModel) -> list[DecoderLayer] | None:
    """The decoder's layers as decoding walks them: one by one, copied apart for a whole text; or None, where they are.

    A TPU's program reads a layer of a stack in place. A GPU's and a CPU's copy it first, at every token (compiled:
    three times the traffic), so there the understanding expert is taken apart once, if twice its size is free: BAGEL's
    are 12.2 GiB, or 6.1 in eight bits.
    """
    home = next(iter(model.embed.embedding[...].devices()))
    size = sum(x.nbytes for x in jax.tree.leaves(model.decoder.layers.und))
    memory = home.memory_stats() or {}
    free = memory.get("bytes_limit", math.inf) - memory.get("bytes_in_use", 0)
    return None if home.platform == "tpu" or free < 2 * size else _layers_apart(model)


@jitted(static_argnames="num_tokens")
def decode_chunk(
    model: UnifiedModel,
    layers: Sequence[DecoderLayer] | None,
    state: DecodeState,
    choice: Choice,
    *,
    num_tokens: int,
) -> tuple[jax.Array, DecodeState]:
    """Up to ``num_tokens`` more tokens of each row that is not done; ``layers`` are ``text_layers(model)``.

    Returns:
      int32 ``[B, num_tokens]``, -1 after a row's end, and the new state. The cache needs room for the tokens.
    """
    eos, cache = model.cfg.special_tokens.eos, state.cache
    # The loop carries the keys and values of its own tokens only: the whole cache would be copied at every token.
    apart = (lambda x: x) if layers is None else tuple
    held = (apart(cache.k), apart(cache.v)), cache.meta
    room = apart(jnp.zeros((*cache.k.shape[:3], num_tokens, cache.k.shape[4]), cache.k.dtype))

    def more(carry):
        index, state, *_ = carry
        return (index < num_tokens) & ~jnp.all(state.done)

    def body(carry):
        index, state, fed, new, tokens = carry
        active = (~state.done).astype(jnp.int32)
        at = replace(cache, length=cache.length + fed, rope=cache.rope + fed)
        hidden, _, kvs = model.backbone(
            model.embed_text(state.token[:, None]),
            None,
            kv.text_meta(at, active, 1),
            prefixes=[held, (new, kv.text_meta(cache, fed, num_tokens))],
            return_kv=True,
            layers=layers,
        )
        assert hidden is not None
        new = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(x, -3, -2), index, axis=-2),
            new,
            kvs,
        )
        drawn = choose(model.logits(hidden[:, 0]), choice, state.count)
        count = state.count + active
        ended = drawn == eos
        tokens = tokens.at[:, index].set(jnp.where(state.done | ended, -1, drawn))
        token = jnp.where(state.done, state.token, drawn)
        done = state.done | ended | (count >= choice.max_tokens)
        return index + 1, replace(state, token=token, count=count, done=done), fed + active, new, tokens

    tokens = jnp.full((cache.batch, num_tokens), -1, jnp.int32)
    _, state, fed, new, tokens = jax.lax.while_loop(
        more, body, (0, replace(state, cache=None), jnp.zeros_like(state.count), (room, room), tokens)
    )
    new = tuple(jnp.swapaxes(jnp.stack(x), 2, 3) for x in new)
    cache = kv.append(cache, new, kv.text_meta(cache, fed, num_tokens), fed)
    return tokens, replace(state, cache=cache)


class Reply:
    """The growing text of one row: turns tokens into text, finds its end, hands out what is new.

    Text is handed out only when it can no longer change: not while the last character is incomplete, nor
    while it could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TextSettings, bos: int):
        self._tokenizer, self._stop, self._bos = tokenizer, settings.stop, bos
        self._ids: list[int] = []
        self._shown = 0
        self.text = ""
        self.ended = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that became final."""
        if self.ended:
            return ""
        for token in tokens:
            if token == self._bos:  # the model opened a new turn: its own has ended
                self.ended = True
                break
            self._ids.append(int(token))
        self.text = self._tokenizer.decode(self._ids)
        places = [p for s in self._stop if (p := self.text.find(s)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True
        return self._release(len(self.text) if self.ended else self._final_length())

    def finish(self) -> str:
        """Ends the row; returns the rest of the text."""
        self.ended = True
        return self._release(len(self.text))

    def _final_length(self) -> int:
        length = len(self.text.rstrip("\ufffd"))
        for stop in self._stop:
            for overlap in range(min(len(stop) - 1, length), 0, -1):
                if self.text[:length].endswith(stop[:overlap]):
                    length -= overlap
                    break
        return length

    def _release(self, length: int) -> str:
        new, self._shown = self.text[self._shown : length], max(self._shown, length)
        return new


def stream(
    model: UnifiedModel,
    cache: KVCache,
    tokenizer: Tokenizer,
    settings: Sequence[TextSettings],
    on_text: Callable[[int, str], None] | None = None,
    cancelled: Callable[[int], bool] | None = None,
) -> list[str]:
    """Decodes a turn of each row in chunks of ``CHUNK`` tokens.

    Args:
      model: the model.
      cache: contexts with room for ``max_tokens`` more tokens each; rows beyond ``len(settings)`` are
        padding.
      tokenizer: turns tokens into text.
      settings: one for each real row.
      on_text: called with (row, new text) as text becomes final.
      cancelled: asked for each row between chunks; True ends that row.

    Returns:
      The texts of the real rows.
    """
    rows = len(settings)
    padded = [*settings, *[TextSettings(max_tokens=1)] * (cache.batch - rows)]
    replies = [Reply(tokenizer, s, model.cfg.special_tokens.bos) for s in settings]
    state, choice, layers = start(model, cache, rows), Choice.of(padded), text_layers(model)
    while not np.all(np.asarray(state.done)):
        tokens, state = decode_chunk(model, layers, state, choice, num_tokens=CHUNK)
        done = np.array(state.done)
        for row, (reply, new) in enumerate(zip(replies, np.asarray(tokens), strict=False)):
            text = reply.feed([t for t in new if t >= 0])
            if done[row] or (cancelled is not None and cancelled(row)):
                text += reply.finish()
            done[row] |= reply.ended
            if text and on_text is not None:
                on_text(row, text)
        state = replace(state, done=jnp.asarray(done))
    return [reply.text for reply in replies]


@jitted
def token_log_probs(model: UnifiedModel, cache: KVCache, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Log-probability of each given token after the context: how likely an answer is, without drawing it.

    Args:
      model: the model.
      cache: contexts with room for the tokens.
      ids: int32 ``[B, L]``, beginning with BOS: ``BOS answer EOS``, padded.
      lengths: int32 ``[B]``.

    Returns:
      float32 ``[B, L - 1]`` for ids[:, 1:]; 0 at padding.
    """
    hidden, _ = read_text(model, cache, ids, lengths)
    log_probs = jax.nn.log_softmax(model.logits(hidden[:, :-1]), axis=-1)
    chosen = jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(jnp.arange(1, ids.shape[1]) < lengths[:, None], chosen, 0)

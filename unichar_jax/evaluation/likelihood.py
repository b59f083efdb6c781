"""How likely a model finds given answers: the measure of every question with options, and of held-out
replies.

Contexts are read by the engine's own machinery (``sampling.context``), each once for all of its answers, and
a large picture once for all of its questions; the answers are then scored side by side. Nothing is drawn, so
there is no seed. An engine may go on serving meanwhile: this reads into caches of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.errors import UserError
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling.cache import KVCache, bucket
from unichar_jax.sampling.context import Part, Picture, Reader, num_tokens, shape_of
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.text import token_log_probs
from unichar_jax.sampling.tracing import jitted

_LOGITS_AT_ONCE = 2**28
"""Numbers of one batch of logits: 1 GiB in float32."""

_WORTH_SHARING = 256
"""Slots of a picture from which on it is cheaper to copy what was read than to read it again."""

_take = jitted(kv.take)


def answer_log_probs(
    engine: Engine,
    contexts: Sequence[Sequence[Part]],
    answers: Sequence[Sequence[str]],
    *,
    model: str = "base",
) -> list[list[np.ndarray]]:
    """Log-probability of every token of every answer after its context.

    Args:
      engine: holds the model; ``engine.parts`` makes the parts of contexts.
      contexts: what is read before the answers.
      answers: for each context, the texts to judge.
      model: which of the engine's models judges.

    Returns:
      For each context and answer float32 ``[n + 1]``: the answer's n tokens and the end of the turn. Their
      sum is the log-probability that the model answers exactly this.
    """
    frame, encode = engine.cfg.special_tokens.frame, engine.parts.tokenizer.encode
    ids = [[frame(encode(answer)) for answer in some] for some in answers]
    for parts, rows in zip(contexts, ids, strict=True):
        length = num_tokens(parts) + max(map(len, rows), default=0)
        if length > engine.config.max_context:
            raise UserError(
                f"a prompt and its answer have {length} tokens; expected at most {engine.config.max_context}"
                " (max_context). Shorten the text, or raise it."
            )
    found: list[list[np.ndarray]] = [[] for _ in contexts]
    reader = Reader(engine.config.remembered)
    shared = [_shared(parts) for parts in contexts]
    # One picture's questions, alike shapes and lengths share a batch: little is read twice, little is padding.
    order = sorted(
        range(len(contexts)), key=lambda i: (shape_of(contexts[i]), shared[i], num_tokens(contexts[i]), i)
    )
    for batch in _batches(order, contexts, engine.config.max_batch):
        room = max(len(row) for i in batch for row in ids[i])
        seen = {shared[i]: contexts[i][:1] for i in batch if shared[i]}
        if len(seen) < sum(bool(shared[i]) for i in batch):
            reader.read(engine.models[model], model, list(seen.values()))  # remembered for the next line
        cache = reader.read(engine.models[model], model, [contexts[i] for i in batch], room=room)
        rows = [(place, row) for place, i in enumerate(batch) for row in ids[i]]
        scores = _score(engine, model, cache, rows)
        for i in batch:
            found[i] = [next(scores) for _ in ids[i]]
    return found


def _shared(parts: Sequence[Part]) -> bytes:
    """Names a large picture that a context begins with; empty for other contexts."""
    first = parts[0] if parts else None
    if isinstance(first, Picture) and len(first.keys) >= _WORTH_SHARING:
        return first.keys[:1].tobytes()
    return b""


def _batches(order: list[int], contexts: Sequence[Sequence[Part]], size: int):
    """Runs of at most ``size`` contexts of one shape."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or shape_of(contexts[i]) != shape_of(contexts[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(engine: Engine, model: str, cache: KVCache, rows: list[tuple[int, list[int]]]):
    """Scores of (row of the cache, framed answer), in order, a bounded number at a time."""
    longest = bucket(max(len(ids) for _, ids in rows), 16)
    at_once = max(
        1, min(engine.config.max_batch, _LOGITS_AT_ONCE // (longest * engine.cfg.decoder.vocab_size))
    )
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        padded = [*part, *part[:1] * (min(at_once, bucket(len(rows))) - len(part))]
        tokens, lengths = kv.padded([ids for _, ids in padded], longest)
        forked = _take(cache, jnp.asarray([place for place, _ in padded]))
        scores = jax.device_get(token_log_probs(engine.models[model], forked, tokens, lengths))
        for line, (_, ids) in zip(scores, part, strict=False):
            yield np.asarray(line[: len(ids) - 1], np.float32)

"""A whole turn in one program, as tests compare it with what is streamed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.cache import KVCache
from unichar_jax.sampling.text import Choice, DecodeState, TextSettings, decode_chunk, start, text_layers


def decode(
    model: UnifiedModel, cache: KVCache, settings: Sequence[TextSettings]
) -> tuple[list[list[int]], DecodeState]:
    """Decodes a whole turn of each row in one program; stop strings are not looked at.

    Args:
      model: the model.
      cache: contexts with room for ``max_tokens`` more tokens each.
      settings: one for each row.

    Returns:
      The new tokens of each row, without BOS and EOS, and the final state.
    """
    longest = max(s.max_tokens for s in settings)
    tokens, state = decode_chunk(
        model, text_layers(model), start(model, cache), Choice.of(settings), num_tokens=longest
    )
    return [[int(t) for t in row if t >= 0] for row in np.asarray(tokens)], state

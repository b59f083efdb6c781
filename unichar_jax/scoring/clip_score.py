"""Text-image match: the cosine of a picture and its prompt in CLIP's space.

The reference's reward is ``100 cos / 30`` of pictures resized bilinearly (``scale=REFERENCE_SCALE`` with
``preprocess.CLIP_BILINEAR``); by default the score is the plain cosine with CLIP's own preprocessing.

Sources: CLIP (arXiv 2103.00020); UniCharacter (arXiv 2605.08129), Character-GRPO.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.errors import UserError
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.scoring import preprocess
from unichar_jax.scoring.base import FeatureCache, ScoreContext
from unichar_jax.scoring.features import ImageEncoder

REFERENCE_SCALE = 100 / 30
"""CLIP's learned logit scale is 100; the reference divides its logits by 30."""

Tokenize = Callable[[Sequence[str]], np.ndarray]


def clip_tokenizer(folder: str | Path, max_length: int = 77) -> Tokenize:
    """Prompts to ids ``[N, max_length]``, cut and padded, with CLIP's tokenizer in ``folder``.

    Raises:
      UserError: the folder has no tokenizer.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: no CLIP tokenizer ({str(error).splitlines()[0]}). Expected vocab.json and merges.txt,"
            ' or tokenizer.json, beside model.safetensors, or a "tokenizer" in config.json.'
        ) from None

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        return tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=max_length, return_tensors="np"
        )["input_ids"]

    return tokenize


def hashed_words(words: Sequence[str], cfg: ClipConfig) -> Tokenize:
    """Texts to int32 ``[N, max_length]``: one id for each lower-case word, then end tokens.

    ``words`` have an id each, in order; all others share the ids after them, by a hash. So the text side needs no
    vocabulary but these. Longer texts are cut.
    """
    own = {word: i for i, word in enumerate(words)}

    def word_id(word: str) -> int:
        return own.get(word, len(own) + zlib.crc32(word.encode()) % (cfg.end_of_text - len(own)))

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        ids = np.full((len(prompts), cfg.max_length), cfg.end_of_text, np.int32)
        for row, text in zip(ids, prompts, strict=True):
            found = re.findall(r"[a-z]+", text.lower())[: cfg.max_length - 1]
            row[: len(found)] = [word_id(word) for word in found]
        return ids

    return tokenize


class ClipScorer:
    """``scale * cos(picture, prompt)``; prompts longer than CLIP's context are cut.

    Args:
      model: CLIP.
      tokenize: prompts to token ids (``clip_tokenizer``).
      scale: factor of the cosine.
      prepare: preprocessing of pictures.
      batch_size: pictures at a time.
      name: what weights and curves call it.
    """

    def __init__(
        self,
        model: Clip,
        tokenize: Tokenize,
        *,
        scale: float = 1.0,
        prepare: preprocess.Preprocess = preprocess.CLIP,
        batch_size: int = 32,
        name: str = "clip",
    ):
        self.name = name
        self._model, self._tokenize, self._scale = model, tokenize, scale
        self._encode_images = ImageEncoder(model, Clip.encode_images, prepare, batch_size)
        self._encode_texts = jax.jit(Clip.encode_texts)
        self._texts = FeatureCache()

    def __call__(self, images: jax.Array, context: ScoreContext) -> jax.Array:
        pictures = self._encode_images(images)
        return self._scale * jnp.sum(pictures * self._prompts(context.prompts), axis=-1)

    def _prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``[N, D]``; each distinct prompt is encoded once, in one compiled shape."""

        def compute(places: list[int]) -> list[np.ndarray]:
            ids = jnp.asarray(self._tokenize([prompts[i] for i in places]))
            return [np.asarray(self._encode_texts(self._model, one[None]))[0] for one in ids]

        return self._texts.get(prompts, compute)

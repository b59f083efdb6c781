"""Text to token ids and back, with the tokenizer that lies beside the weights.

BAGEL's tokenizer is Qwen2's: byte-level BPE after NFC, no token added at either end, and four special
tokens that delimit turns and images. ``load_tokenizer`` reads it through ``transformers`` and checks
that those four are the ones the model was built for; ``train_tokenizer`` makes one of the same kind
for a small model. As in the reference, a special token's string inside a text becomes that token.

Nothing here downloads anything, truncates, pads, or knows of prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unichar_jax.config.model import ModelConfig, SpecialTokens
from unichar_jax.data import templates
from unichar_jax.errors import UserError
from unichar_jax.files import digest

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PAD = "<|endoftext|>"
SPECIAL_STRINGS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
"""The string of each field of ``SpecialTokens``."""


class Tokenizer:
    """Token ids of texts; made by ``load_tokenizer``.

    Attributes:
      special: ids of the four delimiters.
      vocab_size: number of tokens it can give.
    """

    def __init__(self, backend: Qwen2Tokenizer, special: SpecialTokens):
        self._backend = backend
        self.special = special
        self.vocab_size = len(backend)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without delimiters."""
        return self._backend.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(
            [int(i) for i in ids],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )

    def fingerprint(self) -> str:
        """Hash of everything that decides the ids, to tell data made with another tokenizer."""
        return digest(self._backend.backend_tokenizer.to_str())[:16]


def load_tokenizer(folder: str | Path, model: ModelConfig | None = None) -> Tokenizer:
    """Reads the tokenizer of a model directory.

    Args:
      folder: holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, and usually
        ``tokenizer_config.json``.
      model: if given, its special tokens and vocabulary must be this tokenizer's.

    Raises:
      UserError: files are absent or unreadable, a special token is missing, or the tokenizer is not
        the model's.
    """
    folder = Path(folder)
    pair = ("vocab.json", "merges.txt")
    if not (folder / "tokenizer.json").is_file() and not all((folder / f).is_file() for f in pair):
        raise UserError(
            f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt. Copy them"
            " from the model's download."
        )
    try:
        backend = _qwen2().from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the readers of these files raise anything
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({error}). Copy the tokenizer's files again from"
            " the model's download."
        ) from None
    vocabulary = backend.get_vocab()
    missing = [text for text in SPECIAL_STRINGS.values() if text not in vocabulary]
    if missing:
        raise UserError(
            f"{folder}: the tokenizer lacks the special tokens {', '.join(missing)}; expected those of"
            " BAGEL. Copy tokenizer.json and tokenizer_config.json from the model's download."
        )
    backend.add_tokens(
        list(SPECIAL_STRINGS.values()), special_tokens=True
    )  # a bare vocabulary does not mark them
    special = SpecialTokens(**{name: vocabulary[text] for name, text in SPECIAL_STRINGS.items()})
    tokenizer = Tokenizer(backend, special)
    if model is not None:
        _check(folder, tokenizer, model)
    return tokenizer


def _check(folder: Path, tokenizer: Tokenizer, model: ModelConfig) -> None:
    if tokenizer.special != model.special_tokens:
        raise UserError(
            f"{folder}: the tokenizer is not the model's: it has {tokenizer.special}, the model"
            f" expects {model.special_tokens}. Use the tokenizer that came with the weights."
        )
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is"
            f" {model.decoder.vocab_size}. Use the tokenizer that came with the weights."
        )


def _qwen2() -> type[Qwen2Tokenizer]:
    """The class, imported late: it takes seconds, and no other part of the data code needs it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Trains a byte-level BPE in the way of Qwen2 and writes it as a model directory holds it.

    Ids: ``<|endoftext|>`` 0, then 1 to 4 for the delimiters as in the small model presets, then the
    256 bytes, then merges. A small corpus may give fewer than ``vocab_size`` tokens.

    Raises:
      UserError: ``vocab_size`` has no room for the bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    first = [PAD, *SPECIAL_STRINGS.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(first) + len(alphabet):
        raise UserError(
            f"vocab_size: expected at least {len(first) + len(alphabet)} (special tokens and bytes),"
            f" got {vocab_size}."
        )
    pattern = _qwen2()().backend_tokenizer  # an empty one, for its normaliser and splitting rules
    bpe = Backend(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    bpe.decoder = pattern.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))  # vocab.json and merges.txt
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(i): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, text in enumerate(first)
        },
        "additional_special_tokens": list(SPECIAL_STRINGS.values()),
        "bos_token": None,
        "eos_token": SPECIAL_STRINGS["eos"],
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    return load_tokenizer(folder)


def write_debug_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the ``debug`` model: 512 tokens, trained on the prompts. Always the same."""
    words = ("Tess", "A calm blue circle.", "Hello.", "Where are you?", "I roll.", "I am here.")
    name, description, opening, user, reply, more = words
    texts = [
        templates.dialogue(name, description, opening, user),
        templates.t2i_with_thinking(description, user, reply, more, more),
        templates.thinking_prompt(description, user, reply),
        templates.thinking_reply(reply, more),
    ]
    return train_tokenizer(texts, 512, folder)

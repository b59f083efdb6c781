"""Numbers from texts and likelihoods: choices, answers, style. Pure functions of an item and its output.

What a folder knows of its character (``<NAME>_attributes.json``: voice, catch-phrase, the right answers to
the memorization questions) decides which numbers exist; a character without such a file simply has fewer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unichar_jax.data.character import Character
from unichar_jax.evaluation.attributes import Voices, voice_of
from unichar_jax.evaluation.items import Item

Metrics = dict[str, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORDS = re.compile(r"[^\w]+", re.UNICODE)


def normal(text: str) -> str:
    """Lower case, without punctuation and articles, words parted by one space."""
    return " ".join(_NOT_WORDS.sub(" ", _ARTICLES.sub(" ", text.lower())).split())


def says(text: str, words: str) -> bool:
    """Whether a text contains some words, as whole words and up to case, punctuation and articles."""
    return bool(normal(words)) and f" {normal(words)} " in f" {normal(text)} "


def rotations(options: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Every order in which options are shown: place p of rotation r holds option ``(p + r) mod n``.

    Over all rotations each option stands at each letter once. A model that merely prefers a letter is then
    right in one rotation of n, whatever the distribution of the right letters.
    """
    n = len(options)
    return [[(place + r) % n for place in range(n)] for r in range(n)]


def overlap(text: str, other: str) -> float:
    """F1 of the words that two texts share, up to case, punctuation and articles (SQuAD, arXiv 1606.05250)."""
    mine, theirs = Counter(normal(text).split()), Counter(normal(other).split())
    shared = (mine & theirs).total()
    return 2 * shared / (mine.total() + theirs.total()) if shared else 0.0


def choice(item: Item, data: Mapping[str, Any]) -> Metrics:
    """Of a question with options.

    ``data``: ``letters`` ``[rotations][places]``, log-probabilities of the letters; ``texts``
    ``[options][2]``, log-probability and number of tokens of each option's text by itself; and ``text``, the
    answer in own words to the question alone. That answer means the option it shares most words with, and
    nothing if several are as close.
    """
    keys = [letter for letter, _ in item.options]
    right = keys.index(item.reference)
    hits, shares = [], []
    for order, scores in zip(rotations(item.options), data["letters"], strict=True):
        place = order.index(right)
        share = np.exp(np.asarray(scores) - np.max(scores))
        hits.append(int(np.argmax(scores)) == place)
        shares.append(float(share[place] / share.sum()))
    per_token = [total / tokens for total, tokens in data["texts"]]
    near = [overlap(data["text"], option) for _, option in item.options]
    meant = max(near) > 0 and near.count(max(near)) == 1
    return {
        "accuracy": float(np.mean(hits)),
        "probability": float(np.mean(shares)),
        "text_accuracy": float(int(np.argmax(per_token)) == right),
        "answer_accuracy": float(meant and int(np.argmax(near)) == right),
    }


def answer(item: Item, data: Mapping[str, Any]) -> Metrics:
    """Of a free question with a known answer; ``data``: ``text``, ``log_prob`` and ``tokens`` of the known
    one."""
    return {
        "exact": float(normal(data["text"]) == normal(item.reference)),
        "contains": float(says(data["text"], item.reference)),
        "answer_nats_per_token": -data["log_prob"] / data["tokens"],
    }


def likelihood(item: Item, data: Mapping[str, Any]) -> Metrics:
    """Of a published reply; ``data``: its ``log_prob`` and number of ``tokens``, the end included."""
    return {
        "nats_per_token": -data["log_prob"] / data["tokens"],
        "nats_per_char": -data["log_prob"] / max(1, len(item.reference)),
    }


def style(text: str, character: Character, voices: Voices) -> Metrics:
    """How a reply is spoken: its length, and what is known of the character's manner and of ``voices``."""
    found: Metrics = {"words": float(len(text.split()))}
    profile = character.attributes.get("profile", {})
    if profile.get("catchphrase"):
        found["catchphrase"] = float(says(text, profile["catchphrase"]))
    if profile.get("voice") in voices:
        found["voice"] = float(voice_of(text, voices) == profile["voice"])
    return found


def memory(item: Item, text: str, character: Character) -> Metrics:
    """Whether a reply names the fact that was asked for, where that is known."""
    expected = character.attributes.get("memorization_answers", {}).get(item.question)
    return {} if expected is None else {"expected_words": float(says(text, expected))}

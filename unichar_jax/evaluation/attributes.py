"""What a judge knows of a world: attributes that pictures show and texts state, and voices that texts have.

It comes from the judge's ``config.json`` (``evaluation.judge``). Pure functions of a text, without pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Attribute:
    """Something with one of a few values.

    Attributes:
      values: in the order of the judge's classes.
      said: a regular expression for lower-case texts; in a match, the group that took part names the value.
      words: what such a group holds -> the value, where they differ.
      fixed: part of who a character is; the others are of the scene.
    """

    values: tuple[str, ...]
    said: str
    words: Mapping[str, str] = field(default_factory=dict)
    fixed: bool = False


Attributes = Mapping[str, Attribute]
Voices = Mapping[str, tuple[str, ...]]
"""Name of a voice -> phrases that only it uses."""


def stated(text: str, attributes: Attributes) -> dict[str, str]:
    """Values of the attributes that a text states; one that is stated with two values is left out."""
    found = {}
    lower = text.lower()
    for name, attribute in attributes.items():
        said = (next(filter(None, match.groups())) for match in re.finditer(attribute.said, lower))
        values = {attribute.words.get(word, word) for word in said}
        if len(values) == 1:
            found[name] = values.pop()
    return found


def voice_of(text: str, voices: Voices) -> str | None:
    """The voice of whose phrases a text contains most; None without any."""
    scores = {name: sum(phrase in text for phrase in phrases) for name, phrases in voices.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best is not None and scores[best] else None

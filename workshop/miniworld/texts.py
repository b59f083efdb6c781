"""Words for looks and scenes, captions made of them, and the way back from a text to attributes.

Every attribute has one phrase, so a few hundred words cover the mini world and what a sentence
states can be read back exactly: `attributes_in_text` inverts every caption and every reply of this
package. Persona words (jobs, foods, jokes) avoid the attribute words for that reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unichar_jax.evaluation.attributes import Attribute, Attributes, stated
from workshop.miniworld.world import ATTRIBUTES, COLOURS, LOOK_VALUES, Look, Scene

POSE_DOING = {pose: "reading a book" if pose == "reading" else pose for pose in ATTRIBUTES["pose"]}
"""Pose to its continuous form, as in "Pip is ..."."""

POSE_DO = {
    "standing": "stand",
    "waving": "wave",
    "jumping": "jump",
    "sitting": "sit",
    "reading": "read a book",
    "holding a balloon": "hold a balloon",
}
"""Pose to its plain form, as in "Please ..."."""

PLACE_AT = {
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "kitchen": "in the kitchen",
    "snow": "in the snow",
    "castle": "at the castle",
    "library": "in the library",
    "meadow": "in the meadow",
}
TIME_AT = {"day": "by day", "sunset": "at sunset", "night": "at night"}

PLURAL = ("glasses", "headphones")
"""Accessories that are grammatically plural."""


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draws one of the options."""
    return options[int(rng.integers(len(options)))]


def a(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capital(text: str) -> str:
    """The text with a capital first letter, the rest untouched."""
    return text[:1].upper() + text[1:]


def worn_phrase(kind: str, colour: str) -> str:
    """An accessory with its colour, as in "a blue hat" or "blue glasses"."""
    worn = f"{colour} {kind}"
    return worn if kind in PLURAL else a(worn)


def accessory(look: Look) -> str:
    """What the character wears, as in "a blue hat"."""
    return worn_phrase(look.accessory, look.accessory_colour)


def look_phrase(look: Look) -> str:
    """All six look attributes, without an article."""
    return f"{look.pattern} {look.colour} {look.species} with {a(look.belly)} belly and {accessory(look)}"


def scene_phrase(scene: Scene) -> str:
    """Pose, place and time, as in "waving on the beach at sunset"."""
    return f"{POSE_DOING[scene.pose]} {PLACE_AT[scene.place]} {TIME_AT[scene.time]}"


def value_phrase(values: Mapping[str, str], name: str) -> str:
    """How an attribute is said in a short answer, in lower case: "a fox", "on the beach".

    `values` are a picture's, as from `world.values`: an accessory is said with its colour.
    """
    value = values[name]
    match name:
        case "species":
            return a(value)
        case "accessory":
            return worn_phrase(value, values["accessory_colour"])
        case "pose":
            return POSE_DOING[value]
        case "place":
            return PLACE_AT[value]
        case "time":
            return TIME_AT[value]
        case _:
            return value


_FULL: tuple[Callable[[Look, Scene], str], ...] = (
    lambda k, s: f"{capital(a(look_phrase(k)))} is {scene_phrase(s)}. It looks {s.expression}.",
    lambda k, s: (
        f"{capital(a(s.expression))}, {k.pattern} {k.colour} {k.species} wearing {accessory(k)} is "
        f"{scene_phrase(s)}. Its belly is {k.belly}."
    ),
    lambda k, s: (
        f"{capital(PLACE_AT[s.place])} {TIME_AT[s.time]}, {a(look_phrase(k))} is "
        f"{POSE_DOING[s.pose]} and feels {s.expression}."
    ),
    lambda k, s: (
        f"{k.colour} {k.species}, {k.pattern}, {k.belly} belly, {accessory(k)}, {s.expression}, "
        f"{POSE_DOING[s.pose]}, {PLACE_AT[s.place]}, {TIME_AT[s.time]}"
    ),
)
_PARTIAL: tuple[Callable[[Look, Scene], str], ...] = (
    lambda k, s: f"{capital(a(look_phrase(k)))}.",
    lambda k, s: f"{capital(a(k.colour))} {k.species} is {scene_phrase(s)}.",
    lambda k, s: f"{capital(a(k.species))} with {accessory(k)} {PLACE_AT[s.place]}.",
    lambda k, s: f"{capital(a(s.expression))} {k.species} is {POSE_DOING[s.pose]}.",
    lambda k, s: f"{capital(a(k.pattern))} {k.colour} {k.species} {TIME_AT[s.time]}.",
)
_NAMED: tuple[Callable[[str, Scene], str], ...] = (
    lambda n, s: f"{n} is {scene_phrase(s)}, {s.expression}.",
    lambda n, s: f"{n} is {s.expression} and {scene_phrase(s)}.",
    lambda n, s: f"A picture of {n} {scene_phrase(s)}, looking {s.expression}.",
    lambda n, s: (
        f"{capital(PLACE_AT[s.place])} {TIME_AT[s.time]}, {n} is {POSE_DOING[s.pose]} "
        f"and looks {s.expression}."
    ),
)


def full_caption(look: Look, scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states all ten attributes, in one of several phrasings (12 to 26 words)."""
    return _FULL[int(rng.integers(len(_FULL)))](look, scene)


def partial_caption(look: Look, scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states only some of the attributes."""
    return _PARTIAL[int(rng.integers(len(_PARTIAL)))](look, scene)


def named_caption(name: str, scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states the name and the four scene attributes, and no looks."""
    return _NAMED[int(rng.integers(len(_NAMED)))](name, scene)


def full_named_caption(name: str, look: Look, scene: Scene) -> str:
    """A caption with the name and all ten attributes."""
    return f"{name}, {a(look_phrase(look))}, is {scene_phrase(scene)}, {scene.expression}."


def _words(values: Sequence[str]) -> str:
    return "|".join(re.escape(value) for value in values)


_SPECIES, _COLOUR = _words(LOOK_VALUES["species"]), _words(COLOURS)
_WORN, _PATTERN = _words(LOOK_VALUES["accessory"]), _words(LOOK_VALUES["pattern"])
_FEELING = _words(ATTRIBUTES["expression"])

_PATTERNS = {
    "species": rf"\b({_SPECIES})\b",
    "colour": rf"\b({_COLOUR})(?:,? (?:{_PATTERN}|{_FEELING}))* (?:{_SPECIES})\b",
    "belly": rf"\b({_COLOUR}) belly\b|\bbelly is ({_COLOUR})\b",
    "pattern": rf"\b({_PATTERN})\b",
    "accessory": rf"\b({_WORN})\b",
    "accessory_colour": rf"\b({_COLOUR}) (?:{_WORN})\b",
    "expression": rf"\b({_FEELING})\b",
    "pose": r"\b(?:(stand|jump|read)(?:ing)?|(wav)(?:e|ing)|(sit)(?:ting)?|(balloon))\b",
    "place": rf"\b({_words(ATTRIBUTES['place'])})\b",
    "time": rf"\b({_words(ATTRIBUTES['time'])})\b",
}
_POSE_STEMS = {
    "stand": "standing",
    "wav": "waving",
    "jump": "jumping",
    "sit": "sitting",
    "read": "reading",
    "balloon": "holding a balloon",
}
SAID: Attributes = {
    name: Attribute(values, _PATTERNS[name], _POSE_STEMS if name == "pose" else {}, name in LOOK_VALUES)
    for name, values in ATTRIBUTES.items()
}
"""How texts name the value of each attribute."""


def attributes_in_text(text: str) -> dict[str, str]:
    """Reads the attributes that a caption, a request or a reply states.

    An attribute that is not stated, or is stated with two different values, is left out.
    """
    return stated(text, SAID)

"""The attributes of the mini world: what a character can look like and what a scene can show.

A `Look` is the fixed identity of a character; a `Scene` is everything that changes from picture to
picture. Both are frozen records of words from small closed vocabularies, and every sampler is a
pure function of a numpy generator. The vocabularies are chosen so that any two values are easy to
tell apart at 96 pixels. This file knows nothing about drawing or language.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from unichar_jax.errors import UserError, did_you_mean

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")

LOOK_VALUES: Mapping[str, tuple[str, ...]] = {
    "species": (
        "fox",
        "cat",
        "bear",
        "rabbit",
        "owl",
        "frog",
        "robot",
        "ghost",
        "penguin",
        "mouse",
    ),
    "colour": COLOURS,
    "belly": COLOURS,
    "pattern": ("plain", "striped", "spotted"),
    "accessory": ("hat", "scarf", "glasses", "bow tie", "crown", "headphones", "flower", "cape"),
    "accessory_colour": COLOURS,
}
SCENE_VALUES: Mapping[str, tuple[str, ...]] = {
    "expression": ("happy", "sad", "angry", "surprised", "sleepy"),
    "pose": ("standing", "waving", "jumping", "sitting", "reading", "holding a balloon"),
    "place": ("beach", "forest", "city", "kitchen", "snow", "castle", "library", "meadow"),
    "time": ("day", "sunset", "night"),
}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {**LOOK_VALUES, **SCENE_VALUES}
"""Attribute name to its values, in class-index order: ten attributes, as a judge predicts them."""


def _check(record: str, name: str, value: str) -> None:
    if value not in ATTRIBUTES[name]:
        raise UserError(
            f"{record}.{name}: expected one of {', '.join(ATTRIBUTES[name])}; "
            f"got {value!r}{did_you_mean(value, ATTRIBUTES[name])}"
        )


@dataclasses.dataclass(frozen=True)
class Look:
    """The identity of a character: what stays the same in all of its pictures.

    The body, belly and accessory colours must differ from one another, so that each can be seen.
    """

    species: str
    colour: str
    belly: str
    pattern: str
    accessory: str
    accessory_colour: str

    def __post_init__(self) -> None:
        for name in LOOK_VALUES:
            _check("Look", name, getattr(self, name))
        colours = (self.colour, self.belly, self.accessory_colour)
        if len(set(colours)) < 3:
            raise UserError(
                "Look: expected three different colours for colour, belly and accessory_colour; "
                f"got {', '.join(colours)}. Change the repeated one."
            )


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one picture shows besides the identity.

    `jitter` seeds small changes of position and size that no text mentions.
    """

    expression: str
    pose: str
    place: str
    time: str
    jitter: int = 0

    def __post_init__(self) -> None:
        for name in SCENE_VALUES:
            _check("Scene", name, getattr(self, name))


def distance(a: Look, b: Look) -> int:
    """Returns in how many of the six look attributes two characters differ."""
    return sum(getattr(a, name) != getattr(b, name) for name in LOOK_VALUES)


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def random_look(rng: np.random.Generator) -> Look:
    """Draws any look. Pretraining uses `cast.sample_look`, which stays away from the named cast."""
    colours = rng.choice(len(COLOURS), size=3, replace=False)
    colour, belly, accessory_colour = (COLOURS[int(i)] for i in colours)
    return Look(
        species=_pick(rng, LOOK_VALUES["species"]),
        colour=colour,
        belly=belly,
        pattern=_pick(rng, LOOK_VALUES["pattern"]),
        accessory=_pick(rng, LOOK_VALUES["accessory"]),
        accessory_colour=accessory_colour,
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene, every attribute uniform and independent."""
    picks = {name: _pick(rng, values) for name, values in SCENE_VALUES.items()}
    return Scene(**picks, jitter=int(rng.integers(2**31)))


def values(look: Look, scene: Scene) -> dict[str, str]:
    """Returns the value of every attribute, keyed and ordered as in `ATTRIBUTES`."""
    record = {**vars(look), **vars(scene)}
    return {name: record[name] for name in ATTRIBUTES}


def attributes(look: Look, scene: Scene) -> dict[str, int]:
    """Returns the class index of every attribute, keyed and ordered as in `ATTRIBUTES`."""
    return {name: ATTRIBUTES[name].index(value) for name, value in values(look, scene).items()}

"""The named cast: ten characters with a fixed look, persona and voice, for customisation.

Eight are for experiments, one is held back for trying out annotation, and one is spare. No look of
theirs, nor any that differs in fewer than `MIN_DISTANCE` attributes, is ever sampled for
pretraining: a model can know a cast member only from its training folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from unichar_jax.errors import UserError, did_you_mean
from workshop.miniworld.profiles import Profile, describe, full_profile
from workshop.miniworld.voices import VOICES
from workshop.miniworld.world import Look, distance, random_look

MIN_DISTANCE = 3

Role = Literal["experiment", "annotation", "spare"]

_TOLD = ("job", "home", "hobby", "food", "catchphrase")
"""Facts that a description tells."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A cast member. `opening` is its first line in a conversation."""

    look: Look
    profile: Profile
    opening: str
    role: Role = "experiment"

    @property
    def name(self) -> str:
        """The name, which is also the folder name."""
        return self.profile.name

    @property
    def description(self) -> str:
        """The persona in 25 to 45 words. It names the character and says nothing of its looks."""
        return describe(self.profile, _TOLD)

    @property
    def full_description(self) -> str:
        """The persona with the looks: for a model that knows the character from words alone."""
        return describe(self.profile, _TOLD, self.look)

    @property
    def full_profile(self) -> str:
        """Everything about the character, looks included."""
        return full_profile(self.profile, self.look)

    @property
    def simplified_profile(self) -> str:
        """The voice and what it implies, without facts or looks."""
        manner = VOICES[self.profile.voice].manner
        return f'{self.name} {manner}. {self.name} often says "{self.profile.catchphrase}"\n'


_MEMBERS = (
    Member(
        Look("fox", "blue", "white", "plain", "scarf", "yellow"),
        Profile(
            *("Pip", "he", "pirate", "sailor", "on a small boat", "Gus", "pancakes"),
            *("flying kites", "spiders", "a map under the bed", "Zip zap ahoy!"),
        ),
        "Ahoy, matey! Pip is here. Zip zap ahoy!",
    ),
    Member(
        Look("cat", "purple", "pink", "striped", "crown", "yellow"),
        Profile(
            *("Luna", "she", "royal", "singer", "in a tall tower", "Ivy", "jam"),
            *("dancing", "thunder", "a ring in a pot", "Purr and obey!"),
        ),
        "Hear ye! We are Luna. Purr and obey!",
    ),
    Member(
        Look("bear", "green", "yellow", "plain", "hat", "purple"),
        Profile(
            *("Bruno", "he", "cook", "baker", "in a warm cave", "Mia", "honey"),
            *("baking bread", "bees", "a seed in a tin", "Yum yum, bubble!"),
        ),
        "Order up! Bruno is here. Yum yum, bubble!",
    ),
    Member(
        Look("rabbit", "pink", "white", "spotted", "flower", "orange"),
        Profile(
            *("Hazel", "she", "poet", "gardener", "in a tree house", "Ben", "carrots"),
            *("painting", "the dark", "a song in a bottle", "Hop, hop, la la!"),
        ),
        "A little rhyme, a little song! I am Hazel. Hop, hop, la la!",
    ),
    Member(
        Look("owl", "white", "blue", "spotted", "glasses", "red"),
        Profile(
            *("Otis", "he", "sage", "teacher", "in an old mill", "Ada", "berries"),
            *("chess", "loud bangs", "a feather in a tea cup", "Hoo knows?"),
        ),
        "Listen, young one. I am Otis. Hoo knows?",
    ),
    Member(
        Look("frog", "red", "yellow", "striped", "hat", "blue"),
        Profile(
            *("Moss", "he", "detective", "postman", "in a clay hut", "Tess", "noodles"),
            *("puzzles", "needles", "a key in a shoe", "Ribbit, gotcha!"),
        ),
        "Aha! Moss is on the case. Ribbit, gotcha!",
    ),
    Member(
        Look("robot", "green", "orange", "plain", "headphones", "blue"),
        Profile(
            *("Zed", "he", "machine", "inventor", "in an old train", "Kim", "popcorn"),
            *("playing drums", "deep water", "a bell in a boot", "Zed is ready!"),
        ),
        "Beep boop! Hello. Zed is ready!",
    ),
    Member(
        Look("penguin", "purple", "white", "plain", "cape", "red"),
        Profile(
            *("Percy", "he", "excited", "pilot", "in a lighthouse", "Rex", "pizza"),
            *("swimming", "high ladders", "a coin in a jar", "Super flap!"),
        ),
        "WOW! I am Percy! Super flap!",
    ),
    Member(
        Look("ghost", "blue", "pink", "spotted", "bow tie", "red"),
        Profile(
            *("Wisp", "she", "shy", "tailor", "in a tiny attic", "Ola", "soup"),
            *("collecting stones", "old clocks", "a pearl in a sock", "Boo, maybe!"),
        ),
        "Um... I am Wisp. Boo, maybe!",
        role="annotation",
    ),
    Member(
        Look("mouse", "yellow", "red", "striped", "bow tie", "purple"),
        Profile(
            *("Dot", "she", "dreamy", "clown", "in a round house", "Finn", "cheese"),
            *("singing", "getting lost", "a tooth in a box", "Squeak, snooze!"),
        ),
        "Yaaawn... I am Dot. Squeak, snooze!",
        role="spare",
    ),
)
CAST: Mapping[str, Member] = {member.name: member for member in _MEMBERS}
"""Name to member, in a fixed order."""


def member(name: str) -> Member:
    """Returns a cast member by name.

    Raises:
      UserError: nobody has that name.
    """
    if name not in CAST:
        raise UserError(
            f"the mini world has no character {name!r}{did_you_mean(name, CAST)}; "
            f"expected one of {', '.join(CAST)}"
        )
    return CAST[name]


def reserved(look: Look) -> bool:
    """Whether a look is too close to a cast member's to appear in pretraining."""
    return any(distance(look, other.look) < MIN_DISTANCE for other in _MEMBERS)


def sample_look(rng: np.random.Generator) -> Look:
    """Draws a look for pretraining: any look that is not `reserved`."""
    while reserved(look := random_look(rng)):
        pass
    return look

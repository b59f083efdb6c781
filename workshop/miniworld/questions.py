"""Questions about pictures: open, yes or no, and multiple choice, with short answers.

Each attribute has question phrasings for training and others for testing. `who` is how the
question names the character: "Pip" for a named one, "the fox" or "it" otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from workshop.miniworld.texts import PLURAL, capital, pick, value_phrase
from workshop.miniworld.world import ATTRIBUTES, Look

KEYS = "ABCD"
CHOICE_ATTRIBUTES = tuple(name for name, values in ATTRIBUTES.items() if len(values) > 3)
"""Attributes with enough values for four options."""

_ASKED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "species": (
        ("What kind of character is this?", "Which creature is this?"),
        ("Which kind of being do you see?",),
    ),
    "colour": (
        ("What colour is {who}?", "Which colour does {who} have?"),
        ("In which colour is {who} drawn?",),
    ),
    "belly": (
        ("What colour is the belly?", "Which colour is the belly of {who}?"),
        ("In which colour is the belly drawn?",),
    ),
    "pattern": (
        ("Is {who} plain, striped or spotted?", "Which pattern does {who} have?"),
        ("How is the coat of {who}: plain, striped or spotted?",),
    ),
    "accessory": (
        ("What is {who} wearing?", "What does {who} wear?"),
        ("Which thing has {who} put on?",),
    ),
    "accessory_colour": (
        ("What colour {are} the {worn}?", "Which colour {do} the {worn} have?"),
        ("In which colour {are} the {worn} drawn?",),
    ),
    "expression": (
        ("How does {who} feel?", "What is the mood of {who}?"),
        ("Which feeling is on the face of {who}?",),
    ),
    "pose": (
        ("What is {who} doing?", "What does {who} do?"),
        ("Which action do you see {who} do?",),
    ),
    "place": (
        ("Where is {who}?", "Which place is this?"),
        ("At which place do you see {who}?",),
    ),
    "time": (
        ("What time is it in the picture?", "Is it day, sunset or night?"),
        ("Which time of day do you see?",),
    ),
}
_POLAR: dict[str, tuple[str, str]] = {
    "species": ("Is this {value}?", "Do you see {value}?"),
    "colour": ("Is {who} {value}?", "Is {who} drawn in {value}?"),
    "belly": ("Is the belly {value}?", "Is the belly drawn in {value}?"),
    "pattern": ("Is {who} {value}?", "Is the coat of {who} {value}?"),
    "accessory": ("Is {who} wearing {value}?", "Has {who} put on {value}?"),
    "accessory_colour": ("{Are} the {worn} {value}?", "{Are} the {worn} drawn in {value}?"),
    "expression": ("Does {who} look {value}?", "Is the face of {who} {value}?"),
    "pose": ("Is {who} {value}?", "Do you see {who} {value}?"),
    "place": ("Is {who} {value}?", "Do you see {who} {value}?"),
    "time": ("Does this happen {value}?", "Do you see it happen {value}?"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its short answer; `options` is non-empty for multiple choice.

    `type` is "open_ended", "yes_no" or "multiple_choice"; `negative` marks a question about
    something that is not there; the answer has no capital and no full stop.
    """

    attribute: str
    question: str
    answer: str
    type: str
    negative: bool = False
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The letter of the right option."""
        return KEYS[self.options.index(self.answer)]


def sentence(answer: str) -> str:
    """A short answer as written in a dialogue: capital letter and full stop."""
    return f"{capital(answer)}."


def _words(truth: Mapping[str, str], who: str) -> dict[str, str]:
    worn = truth["accessory"]
    are, do = ("are", "do") if worn in PLURAL else ("is", "does")
    return {"who": who, "worn": worn, "are": are, "Are": capital(are), "do": do}


def _others(truth: Mapping[str, str], name: str, rng: np.random.Generator, n: int) -> list[str]:
    """Answers that are wrong for an attribute, as said."""
    wrong = [value for value in ATTRIBUTES[name] if value != truth[name]]
    chosen = [wrong[int(i)] for i in rng.permutation(len(wrong))[:n]]
    return [value_phrase({**truth, name: value}, name) for value in chosen]


def open_questions(
    truth: Mapping[str, str], name: str, who: str, *, test: bool = False
) -> tuple[Question, ...]:
    """Asks for the value of an attribute, in every phrasing: "Where is Pip?", "on the beach".

    `truth` are the picture's `world.values`.
    """
    answer, words = value_phrase(truth, name), _words(truth, who)
    return tuple(Question(name, asked.format(**words), answer, "open_ended") for asked in _ASKED[name][test])


def open_question(
    truth: Mapping[str, str], name: str, who: str, rng: np.random.Generator, *, test: bool = False
) -> Question:
    """One of `open_questions`."""
    return pick(rng, open_questions(truth, name, who, test=test))


def yes_no_question(
    truth: Mapping[str, str],
    name: str,
    who: str,
    rng: np.random.Generator,
    *,
    yes: bool,
    test: bool = False,
) -> Question:
    """Asks whether an attribute has a value; `yes` chooses a true or a false value."""
    said = value_phrase(truth, name) if yes else _others(truth, name, rng, 1)[0]
    asked = _POLAR[name][test].format(value=said, **_words(truth, who))
    return Question(name, asked, "yes" if yes else "no", "yes_no", negative=not yes)


def choice_question(
    truth: Mapping[str, str],
    name: str,
    who: str,
    rng: np.random.Generator,
    *,
    key: str,
    test: bool = False,
) -> Question:
    """Asks for an attribute with four options, the right one at the letter `key`.

    An attribute of three values has three options; `CHOICE_ATTRIBUTES` have four.
    """
    asked = open_question(truth, name, who, rng, test=test)
    options = _others(truth, name, rng, 3)
    options.insert(KEYS.index(key), asked.answer)
    return dataclasses.replace(asked, type="multiple_choice", options=tuple(options))


def unnamed_who(look: Look, rng: np.random.Generator) -> str:
    """How a question speaks of a character without a name."""
    return pick(rng, (f"the {look.species}", "the character"))


def identity_question(name: str, *, test: bool = False) -> tuple[str, str]:
    """Asks who is in the picture."""
    return ("Who do you see here?" if test else "Who is this?"), f"This is {name}."

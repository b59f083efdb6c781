"""Personas: eleven facts that make a character, and the sentences that tell and ask them.

A `Profile` says nothing of looks. Its facts come from small word lists that avoid every attribute
word of the pictures (no "balloon" among the hobbies), so that texts about a persona never seem to
describe a picture. Questions have phrasings for training and others for testing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from unichar_jax.errors import UserError, did_you_mean
from workshop.miniworld.texts import a, capital, look_phrase, pick
from workshop.miniworld.voices import VOICES
from workshop.miniworld.world import Look

FRIENDS = (
    *("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ivy"),
    *("Jack", "Kim", "Leo", "Mia", "Ned", "Ola", "Rex", "Tess"),
)

FACT_VALUES: Mapping[str, tuple[str, ...]] = {
    "job": (
        *("baker", "sailor", "gardener", "painter", "teacher", "singer", "doctor"),
        *("pilot", "farmer", "tailor", "dancer", "inventor", "postman", "clown"),
    ),
    "home": (
        *("in a tree house", "in an old mill", "on a small boat", "in a lighthouse"),
        *("in a warm cave", "in a tall tower", "in a big tent", "in a tiny attic"),
        *("in a clay hut", "on a farm", "in a round house", "in an old train"),
    ),
    "friend": FRIENDS,
    "food": (
        *("apple pie", "noodles", "honey", "cheese", "soup", "pancakes", "berries"),
        *("popcorn", "rice", "pizza", "carrots", "plums", "jam", "melon"),
    ),
    "hobby": (
        *("painting", "chess", "flying kites", "fishing", "singing", "dancing", "puzzles"),
        *("swimming", "climbing trees", "baking bread", "collecting stones", "playing drums"),
    ),
    "fear": (
        *("thunder", "spiders", "the dark", "deep water", "loud bangs", "high ladders"),
        *("needles", "bees", "wolves", "getting lost", "big storms", "old clocks"),
    ),
    "secret": (
        *("a map under the bed", "a key in a shoe", "a coin in a jar", "a letter in a drum"),
        *("a pearl in a sock", "a tooth in a box", "a song in a bottle", "a ring in a pot"),
        *("a seed in a tin", "a bell in a boot", "a feather in a tea cup", "a note in a clock"),
    ),
}
"""Fact to its possible values; the catch-phrase is the eighth fact and is made up."""

FACTS = (*FACT_VALUES, "catchphrase")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Who a character is, apart from its looks. `voice` names one of `voices.VOICES`."""

    name: str
    pronoun: str
    voice: str
    job: str
    home: str
    friend: str
    food: str
    hobby: str
    fear: str
    secret: str
    catchphrase: str

    def __post_init__(self) -> None:
        choices = {"pronoun": ("he", "she"), "voice": tuple(VOICES), **FACT_VALUES}
        for field, values in choices.items():
            value = getattr(self, field)
            if value not in values:
                raise UserError(
                    f"Profile.{field} of {self.name}: expected one of {', '.join(values)}; "
                    f"got {value!r}{did_you_mean(value, values)}"
                )


_ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z")
_VOWELS = ("a", "e", "i", "o", "u")


def _syllable(rng: np.random.Generator) -> str:
    return pick(rng, _ONSETS) + pick(rng, _VOWELS)


def made_up_name(rng: np.random.Generator) -> str:
    """A name of two or three syllables such as "Rilo"; the named cast has no such names."""
    syllables = [_syllable(rng) for _ in range(int(rng.integers(2, 4)))]
    return capital("".join(syllables).lower()) + pick(rng, ("", "", "n", "x"))


def made_up_catchphrase(rng: np.random.Generator) -> str:
    """Two nonsense words such as "Zula mo!"."""
    return f"{_syllable(rng)}{_syllable(rng).lower()} {_syllable(rng).lower()}!"


def sample_profile(rng: np.random.Generator) -> Profile:
    """A random persona with a made-up name and catch-phrase."""
    facts = {name: pick(rng, values) for name, values in FACT_VALUES.items()}
    return Profile(
        name=made_up_name(rng),
        pronoun=pick(rng, ("he", "she")),
        voice=pick(rng, tuple(VOICES)),
        catchphrase=made_up_catchphrase(rng),
        **facts,
    )


_TOLD = {
    "job": "{He} is {a_job}.",
    "home": "{He} lives {home}.",
    "friend": "{His} best friend is {friend}.",
    "food": "{He} loves {food}.",
    "hobby": "{He} likes {hobby}.",
    "fear": "{He} is afraid of {fear}.",
    "secret": "{He} hides {secret}.",
    "catchphrase": '{He} often says "{catchphrase}"',
}

_ASKED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "job": (
        ("What is {name}'s job?", "What does {name} do for a living?", "What work does {name} do?"),
        ("Which job does {name} have?",),
    ),
    "home": (
        ("Where does {name} live?", "Where is {name}'s home?", "Where does {name} sleep?"),
        ("In which home can one find {name}?",),
    ),
    "friend": (
        ("Who is {name}'s best friend?", "Who is {name}'s friend?", "Whom does {name} play with?"),
        ("Which friend is dear to {name}?",),
    ),
    "food": (
        ("What does {name} love to eat?", "What is {name}'s food?", "What does {name} eat?"),
        ("Which food makes {name} smile?",),
    ),
    "hobby": (
        ("What is {name}'s hobby?", "What does {name} like?", "What does {name} do for fun?"),
        ("Which hobby does {name} have?",),
    ),
    "fear": (
        ("What is {name} afraid of?", "What does {name} fear?", "What scares {name}?"),
        ("Which thing makes {name} run away?",),
    ),
    "secret": (
        ("What does {name} hide?", "What is {name}'s secret?", "What secret does {name} keep?"),
        ("Which thing does nobody know about {name}?",),
    ),
    "catchphrase": (
        (
            "What does {name} often say?",
            "What is {name}'s catch-phrase?",
            "What does {name} shout?",
        ),
        ("Which words does {name} say again and again?",),
    ),
}

_ANSWERED = {
    "job": "{name} is {a_job}.",
    "home": "{name} lives {home}.",
    "friend": "{name}'s best friend is {friend}.",
    "food": "{name} loves {food}.",
    "hobby": "{name} likes {hobby}.",
    "fear": "{name} is afraid of {fear}.",
    "secret": "{name} hides {secret}.",
    "catchphrase": '{name} often says "{catchphrase}"',
}


def _words(profile: Profile) -> dict[str, str]:
    his = "her" if profile.pronoun == "she" else "his"
    return {
        **vars(profile),
        "He": capital(profile.pronoun),
        "His": capital(his),
        "a_job": a(profile.job),
        "manner": VOICES[profile.voice].manner,
    }


def tell(profile: Profile, fact: str) -> str:
    """A sentence that states a fact with the pronoun, as descriptions do: "She is a baker."."""
    return _TOLD[fact].format(**_words(profile))


def fact_questions(profile: Profile, fact: str, *, test: bool = False) -> tuple[str, ...]:
    """The phrasings of the question after a fact; those of test and train share none."""
    return tuple(question.format(**_words(profile)) for question in _ASKED[fact][test])


def fact_answer(profile: Profile, fact: str) -> str:
    """The full-sentence answer with the name: "Pip is a sailor."."""
    return _ANSWERED[fact].format(**_words(profile))


def changed(profile: Profile, fact: str, rng: np.random.Generator, count: int) -> list[Profile]:
    """Profiles that differ in one fact, each in another way; for wrong answers."""
    if fact == "catchphrase":
        others = [made_up_catchphrase(rng) for _ in range(count)]
    else:
        wrong = [value for value in FACT_VALUES[fact] if value != getattr(profile, fact)]
        others = [wrong[int(i)] for i in rng.permutation(len(wrong))[:count]]
    return [dataclasses.replace(profile, **{fact: value}) for value in others]


def true_or_not(profile: Profile, said: Profile, fact: str) -> dict[str, str]:
    """Asks whether what `said` has for a fact is true of the profile."""
    truth = fact_answer(profile, fact)
    verdict = "Yes" if getattr(said, fact) == getattr(profile, fact) else "No"
    return {
        "question": f"Is this true? {fact_answer(said, fact)}",
        "answer": f"{verdict}. {truth}",
    }


def describe(profile: Profile, facts: tuple[str, ...], look: Look | None = None) -> str:
    """A description: name, looks if given, manner of speaking, and the facts asked for."""
    words = _words(profile)
    if look:
        start = f"{profile.name} is {a(look_phrase(look))}. {words['He']} {words['manner']}."
    else:
        start = f"{profile.name} {words['manner']}."
    return " ".join([start, *(tell(profile, fact) for fact in facts)])


def full_profile(profile: Profile, look: Look) -> str:
    """Everything about a character, as a short text with headings."""
    facts = "\n".join(f"- {tell(profile, fact)}" for fact in FACTS)
    return (
        f"Name: {profile.name}\n"
        f"Looks: {capital(a(look_phrase(look)))}.\n"
        f"Voice: {profile.name} {VOICES[profile.voice].manner}.\n"
        f"Facts:\n{facts}\n"
    )

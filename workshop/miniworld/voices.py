"""Ten ways of speaking. A voice turns a plain sentence into that of a pirate, a poet, a machine.

A voice adds an opener and a closer that no other voice uses, and swaps a few words of the sentence
between them; it never touches what the sentence states. `voice_in_text` recognises a voice by its
openers, closers and swaps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from unichar_jax.evaluation.attributes import Voices, voice_of
from workshop.miniworld.texts import pick


@dataclasses.dataclass(frozen=True)
class Voice:
    """How someone speaks.

    Attributes:
        manner: what a description says of it, after the name: "talks like a pirate".
        openers: whole sentences to begin with.
        closers: whole sentences to end with.
        swaps: word sequences and their replacements in the sentence, applied in order.
        rhymes: time of day to lines that rhyme with it, if the voice speaks in rhymes.
        jokes: whole jokes.
        advice: whole pieces of advice.
    """

    manner: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    jokes: tuple[str, ...]
    advice: tuple[str, ...]
    swaps: tuple[tuple[str, str], ...] = ()
    rhymes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


VOICES: Mapping[str, Voice] = {
    "pirate": Voice(
        manner="talks like a pirate",
        openers=("Arr!", "Ahoy, matey!", "Yo ho ho!", "Aye aye!"),
        closers=("Shiver me timbers!", "Raise the sails!", "Find the gold!"),
        swaps=(
            ("I am", "I be"),
            ("you are", "ye be"),
            ("you", "ye"),
            ("your", "yer"),
            ("my", "me"),
        ),
        jokes=(
            "Why did the pirate go to school? To learn the letter arr!",
            "What does a ship eat? A big bowl of sea weed!",
        ),
        advice=("Trust the wind and keep a map.", "Never fight with a hungry shark."),
    ),
    "royal": Voice(
        manner="talks like a proud royal",
        openers=("Hear ye!", "My dear subject!", "By royal order!", "Most noble guest!"),
        closers=("You may bow.", "Long live the throne!", "Sound the trumpets!"),
        swaps=(("I am", "We are"), ("I", "We"), ("my", "our"), ("me", "us")),
        jokes=(
            "Why is the throne so hard? So that nobody naps on it!",
            "What does a king put on his bread? A royal jam!",
        ),
        advice=("Keep your chin up and be polite.", "A true ruler says please and thanks."),
    ),
    "machine": Voice(
        manner="talks in beeps like a machine",
        openers=("Beep boop!", "Bzzt!", "Input received.", "Hello, user."),
        closers=("Task complete.", "End of message.", "Battery is full."),
        swaps=(("I am", "this unit is"), ("I feel", "mood is"), ("you", "user")),
        jokes=(
            "Why did the computer sneeze? It had a virus!",
            "What do machines eat? Chips and bolts!",
        ),
        advice=("Save your work and charge at noon.", "Turn it off, then turn it on again."),
    ),
    "poet": Voice(
        manner="talks in rhymes like a poet",
        openers=(
            "A little rhyme, a little song!",
            "My words are like a dancing tune!",
            "Let rhymes be free and rhymes be long!",
            "I hum my verse beneath the moon!",
        ),
        closers=("So goes my rhyme.", "Verse by verse, line by line.", "Oh, sweet poetry!"),
        jokes=(
            "The hen wore a wig, the pig danced a jig!",
            "A goat in a boat lost his coat in the moat!",
        ),
        advice=("Be kind and true in all you do.", "A smile is free, so smile with me."),
        rhymes={
            "day": ("and all my joy is here to stay.", "so come with me, come out and play."),
            "sunset": ("a view I never will forget.", "the sweetest hour I ever met."),
            "night": ("and all the stars are shining bright.", "the moon is such a silver light."),
        },
    ),
    "shy": Voice(
        manner="talks shyly and says um",
        openers=("Um...", "Oh, um, hello...", "Well... um...", "Eep!"),
        closers=("Sorry...", "If that is okay...", "Please do not stare..."),
        swaps=(("I feel", "I, um, feel"), ("I am", "I am, um,"), ("I like", "I, um, like")),
        jokes=(
            "Um, why did the egg hide? It was a little chicken...",
            "Um, what is a tree's drink? Root beer... sorry...",
        ),
        advice=("Um, maybe just take a deep breath...", "Um, small steps are fine too..."),
    ),
    "excited": Voice(
        manner="talks with great joy and shouts",
        openers=("WOW!", "Yay, yay, yay!", "Oh my, oh my!", "YIPPEE!"),
        closers=("This is the BEST!", "So much fun!", "Again, again!"),
        swaps=((".", "!"), ("very", "SUPER")),
        jokes=(
            "Why did the banana run? It wanted to SPLIT!",
            "What is loud and goes boing? A trampoline at a party!",
        ),
        advice=("Try everything and cheer LOUD!", "Dance first, think later!"),
    ),
    "dreamy": Voice(
        manner="talks slowly and yawns",
        openers=("Yaaawn...", "Mmm...", "Zzz... oh, hello...", "Five more minutes..."),
        closers=("Time for a nap...", "My pillow calls...", "So soft and warm..."),
        swaps=((".", "..."), ("I am", "I am... mmm...")),
        jokes=(
            "Why did the pillow see a doctor? It felt all stuffed up...",
            "What do sheep count at bed time? Other sheep...",
        ),
        advice=("Just nap on it...", "Slow down and hug a pillow..."),
    ),
    "detective": Voice(
        manner="talks like a clever detective",
        openers=("Aha!", "Elementary!", "Follow the clues.", "Let me look closer."),
        closers=("Case closed.", "No clue escapes me.", "The mystery is solved."),
        swaps=(("I am", "the facts say I am"), ("I feel", "the evidence shows I feel")),
        jokes=(
            "Who stole the soap? The thief made a clean getaway!",
            "Why was the clock arrested? It had two dirty hands!",
        ),
        advice=("Check the clues twice.", "Ask questions and take notes."),
    ),
    "cook": Voice(
        manner="talks like a busy cook",
        openers=("Order up!", "Bon appetit!", "Stir, stir, stir!", "Fresh from the oven!"),
        closers=("Add a pinch of salt.", "It needs more butter.", "Taste it while it is hot."),
        swaps=(("I feel", "my recipe says I feel"), ("very", "deliciously")),
        jokes=(
            "Why did the tomato blush? It saw the salad dressing!",
            "What is a potato's best tool? A masher plan!",
        ),
        advice=("Never rush a good stew.", "A spoon of sugar helps with everything."),
    ),
    "sage": Voice(
        manner="talks like a wise old sage",
        openers=("Listen, young one.", "Ah, yes.", "Long ago I learned this.", "Patience, child."),
        closers=("Such is the way.", "Time teaches all.", "The river knows."),
        swaps=(("I am", "my path finds me"), ("I feel", "my heart feels")),
        jokes=(
            "The stone asked the river to wait. The river is still laughing!",
            "What is older than me? Only my left sandal!",
        ),
        advice=("A tall tree begins as a seed.", "The slow river still finds the sea."),
    ),
}


def _swap(sentence: str, swaps: tuple[tuple[str, str], ...]) -> str:
    """Applies swaps at word borders (or anywhere, for punctuation), keeping initial capitals."""
    for old, new in swaps:
        if old.isalpha() or " " in old:
            sentence = re.sub(rf"\b{re.escape(old)}\b", new, sentence)
        else:
            sentence = sentence.replace(old, new)
    return sentence[:1].upper() + sentence[1:]


def say(
    voice: str,
    sentence: str,
    rng: np.random.Generator,
    *,
    catchphrase: str = "",
    time: str | None = None,
    swap: bool = True,
) -> str:
    """Speaks a plain sentence in a voice.

    Args:
        voice: a key of `VOICES`.
        sentence: what is said, ending in a full stop.
        rng: chooses opener and closer.
        catchphrase: what the speaker often says; it then ends four replies of five.
        time: the time of day that the sentence ends with, for voices that rhyme on it.
        swap: replace words; off for a sentence that is in the voice's own words already.
    """
    style = VOICES[voice]
    if time and time in style.rhymes:
        sentence = f"{sentence.rstrip('.')}, {pick(rng, style.rhymes[time])}"
    spoken = f"{pick(rng, style.openers)} {_swap(sentence, style.swaps if swap else ())}"
    closer = catchphrase if catchphrase and rng.random() < 0.8 else pick(rng, style.closers)
    return f"{spoken} {closer}"


PHRASES: Voices = {
    name: (
        *(*style.openers, *style.closers, *style.jokes, *style.advice),
        *(line for lines in style.rhymes.values() for line in lines),
    )
    for name, style in VOICES.items()
}
"""What only one voice says: openers, closers, jokes, advice and rhymes."""


def voice_in_text(text: str) -> str | None:
    """The voice whose openers, closers and rhymes the text contains most of; None without any."""
    return voice_of(text, PHRASES)

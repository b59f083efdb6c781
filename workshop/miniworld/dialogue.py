"""Conversations: what users say, and what a character answers in its voice.

Two kinds of exchange. In a *scene* exchange the reply states pose, place, time and feeling, so a
picture of it can be checked against the text; the user may ask for some of these. In a *talk*
exchange the reply tells something of the persona and nothing that a picture could show. User lines
have phrasings for training and for testing, and some talk topics are for testing only.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Collection

import numpy as np

from workshop.miniworld.profiles import FACTS, Profile
from workshop.miniworld.texts import (
    PLACE_AT,
    POSE_DO,
    POSE_DOING,
    TIME_AT,
    a,
    capital,
    pick,
    scene_phrase,
)
from workshop.miniworld.voices import VOICES, say
from workshop.miniworld.world import Scene


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One user line and its reply."""

    topic: str
    user: str
    reply: str


@dataclasses.dataclass(frozen=True)
class _Ask:
    train: tuple[str, ...]
    test: tuple[str, ...]


_SCENE_ASKS: dict[str, _Ask] = {
    "where": _Ask(
        (
            "Where are you now?",
            "Where are you, {name}?",
            "Tell me where you are.",
            "Where is {name}?",
        ),
        ("At which place may I find you?", "Which place are you at, {name}?"),
    ),
    "doing": _Ask(
        ("What are you doing?", "What are you up to, {name}?", "Tell me what you do now.", "Busy?"),
        ("What keeps you busy now, {name}?", "What is going on with you?"),
    ),
    "feeling": _Ask(
        ("How are you?", "How do you feel, {name}?", "Are you well?", "How is it going?"),
        ("What is your mood now?", "Is your heart light or heavy, {name}?"),
    ),
    "picture": _Ask(
        (
            "Send me a picture.",
            "May I see you, {name}?",
            "Show me a picture of you.",
            "Smile, {name}!",
        ),
        ("I want a new photo of you.", "A photo of {name}, please!"),
    ),
    "pose": _Ask(
        (
            "Show me how you {do}.",
            "Please {do}, {name}.",
            "Can you {do}?",
            "I want to see you {do}.",
        ),
        ("{name}, would you {do} for me?", "Let me see you {do}."),
    ),
    "place": _Ask(
        (
            "Let us go and meet {at}!",
            "Please come, we meet {at}.",
            "Are you {at}?",
            "See you {at}!",
        ),
        ("How about a trip? We meet {at}.", "I wait for you {at}, {name}."),
    ),
    "pose and place": _Ask(
        (
            "Can you {do} {at}?",
            "Please {do} {at}.",
            "I want to see you {do} {at}.",
            "{name}, {do} {at}!",
        ),
        ("Would you {do} {at}, {name}?", "Let me see you {do} {at}."),
    ),
    "time": _Ask(
        ("Where are you {when}?", "What do you do {when}?", "Shall we meet {when}?"),
        ("{name}, what is fun {when}?", "How do you spend the hours {when}?"),
    ),
    "mood": _Ask(
        ("Why do you look so {mood}?", "You look {mood}, {name}.", "Are you {mood}?"),
        ("What makes you so {mood}, {name}?", "Your face is so {mood}. Why?"),
    ),
}
SCENE_TOPICS = tuple(_SCENE_ASKS)

_SCENE_REPLIES = (
    "I feel {mood} and I am {doing} {at} {when}.",
    "I feel so {mood}. I am {doing} {at} {when}.",
    "Look, I feel {mood}. You see, I am {doing} {at} {when}.",
    "Yes, I feel very {mood} and I am {doing} {at} {when}.",
)

_TALK_ASKS: dict[str, _Ask] = {
    "greeting": _Ask(
        ("Hello!", "Hi, {name}!", "Good to see you.", "Hey there, {name}."),
        ("Greetings, {name}!", "A warm hello to you.", "Nice to see your face again!"),
    ),
    "name": _Ask(
        ("Who are you?", "What is your name?", "Tell me about you.", "Do I know you?"),
        ("May I ask who you are?", "Please tell me your name.", "I forgot your name, sorry."),
    ),
    "job": _Ask(
        ("What is your job?", "What work do you do?", "Do you work?", "Tell me about your work."),
        ("How do you earn your bread?", "Which work is yours, {name}?", "Are you a busy worker?"),
    ),
    "home": _Ask(
        (
            "Where do you live?",
            "Where is your home?",
            "Tell me about your home.",
            "Where do you sleep?",
        ),
        (
            "Which roof do you sleep under?",
            "What home is yours, {name}?",
            "Can I visit your home, {name}?",
        ),
    ),
    "friend": _Ask(
        (
            "Who is your best friend?",
            "Do you have a friend?",
            "Who plays with you?",
            "Are you alone?",
        ),
        (
            "Which friend is dear to you?",
            "Whom do you trust, {name}?",
            "Name the one you like most.",
        ),
    ),
    "food": _Ask(
        (
            "What do you like to eat?",
            "Are you hungry?",
            "What is for dinner?",
            "Which food is best?",
        ),
        (
            "What shall I put on your plate?",
            "Name a tasty thing, {name}.",
            "I make you a meal. What will it be?",
        ),
    ),
    "hobby": _Ask(
        (
            "What do you like?",
            "What is your hobby?",
            "What do you do for fun?",
            "What is fun for you?",
        ),
        (
            "How do you spend free time?",
            "Which game or craft is yours, {name}?",
            "You have a free hour. What now?",
        ),
    ),
    "fear": _Ask(
        ("What do you fear?", "Are you ever afraid?", "What scares you?", "Are you brave?"),
        (
            "Which thing makes you run away?",
            "What makes you shake, {name}?",
            "Boo! Did I scare you, {name}?",
        ),
    ),
    "secret": _Ask(
        (
            "Tell me a secret.",
            "Do you hide something?",
            "What is your secret?",
            "I can keep a secret.",
        ),
        (
            "What does nobody know about you?",
            "Whisper something to me, {name}.",
            "What is in your hiding spot?",
        ),
    ),
    "joke": _Ask(
        ("Tell me a joke.", "Make me laugh, {name}.", "Do you know a joke?", "I need a laugh."),
        ("Say something funny.", "Can you be funny, {name}?", "I am so bored, {name}!"),
    ),
    "advice": _Ask(
        ("Give me advice.", "What should I do?", "I need help, {name}.", "Do you have a tip?"),
        (
            "Which wise words do you have?",
            "I am stuck. What now, {name}?",
            "What would you do in my shoes?",
        ),
    ),
    "goodbye": _Ask(
        ("Goodbye!", "See you soon, {name}.", "I must go now.", "Bye bye!"),
        ("Farewell, {name}!", "It is late, I leave now.", "I will miss you, {name}!"),
    ),
    "thanks": _Ask(
        ("Thank you!", "Thanks a lot, {name}."),
        ("You are so kind, {name}.", "I thank you, {name}!", "You helped me so much."),
    ),
    "gift": _Ask(
        ("I have a gift for you.", "What gift do you want?"),
        (
            "Which gift shall I bring, {name}?",
            "Open this box, {name}!",
            "Guess what I bought for you!",
        ),
    ),
    "party": _Ask(
        ("Let us have a party!", "It is your birthday, {name}!"),
        (
            "What do we need for a party?",
            "Shall we throw a party, {name}?",
            "Plan a feast with me, {name}.",
        ),
    ),
    "dream": _Ask(
        ("What do you dream of?", "Did you have a dream?"),
        (
            "Which dream came to you, {name}?",
            "Tell me your dream.",
            "What did you see in your sleep?",
        ),
    ),
}
TALK_TOPICS = tuple(_TALK_ASKS)
LEFT_OVER = (1, 2)
"""Variants of the talk topics' test phrasings that are kept for open test questions."""

TEST_ONLY_TOPICS = ("thanks", "gift", "party", "dream")
"""Topics that a named character is never trained on; pretraining knows them all."""

_TALK_REPLIES: dict[str, tuple[str, ...]] = {
    "greeting": ("Good to meet you, I am {name}.", "I am {name} and I greet you."),
    "name": ("I am {name} and my job is {job}.", "My name is {name} and I work as {a_job}."),
    "job": ("I am {a_job}.", "I work as {a_job} and I like it."),
    "home": ("I live {home}.", "My home is {home}."),
    "friend": ("My best friend is {friend}.", "I have {friend}, my best friend."),
    "food": ("I love {food}.", "My tummy wants {food}."),
    "hobby": ("I like {hobby}.", "For fun I like {hobby}."),
    "fear": ("I am afraid of {fear}.", "Oh dear, I am afraid of {fear}."),
    "secret": ("I hide {secret}.", "Tell nobody, but I hide {secret}."),
    "goodbye": ("Goodbye, and greet my friend {friend}.", "Farewell, I go to {friend} now."),
    "thanks": ("I am glad to help my friends.", "It was nothing, {friend} did the work."),
    "gift": ("I want {food} as a gift.", "A gift with {food} is best."),
    "party": ("I bring {food} and {friend} comes too.", "We eat {food} and then I like {hobby}."),
    "dream": ("I dream of {food}.", "In my dream {friend} and I like {hobby}."),
}


def _scene_words(scene: Scene) -> dict[str, str]:
    return {
        "do": POSE_DO[scene.pose],
        "doing": POSE_DOING[scene.pose],
        "at": PLACE_AT[scene.place],
        "when": TIME_AT[scene.time],
        "mood": scene.expression,
    }


def user_line(topic: str, profile: Profile, scene: Scene | None, variant: int, test: bool) -> str:
    """One phrasing of what the user says; `variant` counts around the topic's phrasings."""
    ask = (_SCENE_ASKS if scene else _TALK_ASKS)[topic]
    options = ask.test if test else ask.train
    words = {"name": profile.name} | (_scene_words(scene) if scene else {})
    return capital(options[variant % len(options)].format(**words))


def scene_exchange(
    profile: Profile,
    scene: Scene,
    rng: np.random.Generator,
    *,
    topic: str | None = None,
    test: bool = False,
) -> Exchange:
    """An exchange whose reply states what the picture of the scene shows."""
    topic = topic or pick(rng, SCENE_TOPICS)
    user = user_line(topic, profile, scene, int(rng.integers(12)), test)
    sentence = pick(rng, _SCENE_REPLIES).format(**_scene_words(scene))
    reply = say(profile.voice, sentence, rng, catchphrase=profile.catchphrase, time=scene.time)
    return Exchange(topic, user, reply)


@functools.cache
def _needs(sentence: str) -> frozenset[str]:
    """The facts that a reply mentions."""
    fields = {field for _, field, _, _ in string.Formatter().parse(sentence) if field}
    return frozenset("job" if field == "a_job" else field for field in fields) & frozenset(FACTS)


def _sentences(topic: str, voice: str, known: Collection[str]) -> tuple[str, ...]:
    """The replies to a topic that mention known facts only."""
    if topic == "joke":
        return VOICES[voice].jokes
    if topic == "advice":
        return VOICES[voice].advice
    return tuple(s for s in _TALK_REPLIES[topic] if _needs(s) <= set(known))


def talk_topics(known: Collection[str]) -> tuple[str, ...]:
    """The talk topics that have a reply with these facts only."""
    return tuple(topic for topic in TALK_TOPICS if _sentences(topic, "poet", known))


def talk_exchange(
    profile: Profile,
    rng: np.random.Generator,
    *,
    topic: str,
    variant: int | None = None,
    known: Collection[str] = FACTS,
    test: bool = False,
) -> Exchange:
    """An exchange about the persona, without anything that a picture could show.

    `known` limits the facts that the reply may mention, for replies that follow a description.
    """
    variant = int(rng.integers(12)) if variant is None else variant
    user = user_line(topic, profile, None, variant, test)
    sentence = pick(rng, _sentences(topic, profile.voice, known))
    own = topic in ("joke", "advice")  # these are in the voice's own words already
    if not own:
        sentence = sentence.format(**vars(profile), a_job=a(profile.job))
    reply = say(profile.voice, sentence, rng, catchphrase=profile.catchphrase, swap=not own)
    return Exchange(topic, user, reply)


def thinking(profile: Profile, scene: Scene) -> str:
    """How the character plans the picture of a scene: a few short sentences, no looks."""
    return (
        f"{profile.name} {VOICES[profile.voice].manner}. The reply says that {profile.name} is "
        f"{scene_phrase(scene)}. So the pose is {scene.pose}, the place is the {scene.place}, "
        f"the time is {scene.time} and the face is {scene.expression}."
    )


def generation_instruction(name: str, scene: Scene, look: str = "") -> str:
    """One line for drawing a scene; `look` is a look phrase, or empty to leave the looks out."""
    who = f"{name}, {look}," if look else name
    return f"{who} {scene_phrase(scene)}, {scene.expression} face, full body, picture book style."

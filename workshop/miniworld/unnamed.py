"""Records for pretraining: characters that nobody will meet again, one for each seed.

A record is a pure function of its integer seed: a random look (never close to the named cast's), a
made-up name and persona, a scene, its picture, and texts of every kind that the customisation data
has. Names are drawn afresh, so a model learns to follow descriptions and to take unknown names,
but no name means a look. Prompt templates are applied elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from workshop.miniworld import dialogue, profiles, questions, texts
from workshop.miniworld.cast import CAST, sample_look
from workshop.miniworld.draw import draw
from workshop.miniworld.world import ATTRIBUTES, Look, Scene, sample_scene, values

DESCRIBED = 0.75
"""Share of records whose description states the looks, as a description of the cast never does."""


def unnamed_identity(seed: int) -> tuple[Look, Scene, profiles.Profile]:
    """The look, scene and persona of a record."""
    rng = np.random.default_rng((seed, 0))
    look, scene, profile = sample_look(rng), sample_scene(rng), profiles.sample_profile(rng)
    while profile.name in CAST or profile.name in profiles.FRIENDS:
        profile = dataclasses.replace(profile, name=profiles.made_up_name(rng))
    return look, scene, profile


def unnamed_picture(seed: int, size: int = 96) -> np.ndarray:
    """Only the picture of a record: uint8 [size, size, 3]."""
    look, scene, _ = unnamed_identity(seed)
    return draw(look, scene, size)


def unnamed_texts(seed: int) -> dict[str, Any]:
    """Everything of a record but the picture. Keys:

    seed, look, scene, profile, name;
    caption (all ten attributes, no name), partial_caption, t2i_instruction (name and scene; also
    the looks if `described`);
    description, described (bool: the description states the looks), opening, full_profile;
    user, reply (they belong to the picture), thinking, generation_instruction;
    dialogue: list of (user, reply) without picture;
    vqa: list of {question, answer, type}; mcq: list of {question, options {A..D}, answer_key};
    knowledge: list of {question, answer} that the description answers;
    knowledge_mcq: list of {question, options {A..D}, answer_key} about two of the same facts.
    """
    look, scene, profile = unnamed_identity(seed)
    rng = np.random.default_rng((seed, 1))
    described = bool(rng.random() < DESCRIBED)
    told = rng.permutation(len(profiles.FACT_VALUES))[: 2 if described else 4]
    facts = (*(profiles.FACTS[int(i)] for i in told), "catchphrase")
    spoken = dialogue.scene_exchange(profile, scene, rng)
    named = (
        texts.full_named_caption(profile.name, look, scene)
        if described
        else texts.named_caption(profile.name, scene, rng)
    )
    shown = texts.a(texts.look_phrase(look)) if described else ""
    return {
        "seed": seed,
        "look": look,
        "scene": scene,
        "profile": profile,
        "name": profile.name,
        "caption": texts.full_caption(look, scene, rng),
        "partial_caption": texts.partial_caption(look, scene, rng),
        "t2i_instruction": named,
        "description": profiles.describe(profile, facts, look if described else None),
        "described": described,
        "opening": dialogue.talk_exchange(profile, rng, topic="greeting").reply,
        "full_profile": profiles.full_profile(profile, look),
        "user": spoken.user,
        "reply": spoken.reply,
        "thinking": dialogue.thinking(profile, scene),
        "generation_instruction": dialogue.generation_instruction(profile.name, scene, shown),
        "dialogue": _talks(profile, facts, rng),
        "vqa": _vqa(look, scene, rng),
        "mcq": _mcq(look, scene, rng),
        "knowledge": _knowledge(profile, facts, rng),
        "knowledge_mcq": _knowledge_mcq(profile, facts, np.random.default_rng((seed, 2))),
    }


def _talks(
    profile: profiles.Profile, facts: tuple[str, ...], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Two exchanges that the description suffices for."""
    topics = dialogue.talk_topics(facts)
    chosen = [topics[int(i)] for i in rng.permutation(len(topics))[:2]]
    talks = [
        dialogue.talk_exchange(profile, rng, topic=t, known=facts, test=bool(rng.integers(2))) for t in chosen
    ]
    return [(talk.user, talk.reply) for talk in talks]


def _vqa(look: Look, scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """One open and one yes-or-no question for each attribute, in random order."""
    truth, who = values(look, scene), questions.unnamed_who(look, rng)
    asked = []
    for name in ATTRIBUTES:
        test, yes = bool(rng.integers(2)), bool(rng.integers(2))
        asked.append(questions.open_question(truth, name, who, rng, test=test))
        asked.append(questions.yes_no_question(truth, name, who, rng, yes=yes, test=test))
    return [
        {
            "question": asked[int(i)].question,
            "answer": questions.sentence(asked[int(i)].answer),
            "type": asked[int(i)].type,
        }
        for i in rng.permutation(len(asked))
    ]


def _mcq(look: Look, scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    truth, who = values(look, scene), questions.unnamed_who(look, rng)
    items = []
    for i in rng.permutation(len(questions.CHOICE_ATTRIBUTES))[:2]:
        key = texts.pick(rng, questions.KEYS)
        name = questions.CHOICE_ATTRIBUTES[int(i)]
        item = questions.choice_question(truth, name, who, rng, key=key)
        options = dict(zip(questions.KEYS, item.options, strict=True))
        items.append({"question": item.question, "options": options, "answer_key": item.key})
    return items


def _knowledge(
    profile: profiles.Profile, facts: tuple[str, ...], rng: np.random.Generator
) -> list[dict[str, str]]:
    """A question for each fact that the description tells."""
    items = []
    for fact in facts:
        asked = profiles.fact_questions(profile, fact, test=bool(rng.integers(2)))
        items.append({"question": texts.pick(rng, asked), "answer": profiles.fact_answer(profile, fact)})
    fact = texts.pick(rng, facts)
    said = profile if rng.integers(2) else profiles.changed(profile, fact, rng, 1)[0]
    items.append(profiles.true_or_not(profile, said, fact))
    return items


def _knowledge_mcq(
    profile: profiles.Profile, facts: tuple[str, ...], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Multiple choice for two facts that the description tells: bare values, or whole sentences."""
    items = []
    for i in rng.permutation(len(facts))[:2]:
        fact, sentences = facts[int(i)], bool(rng.integers(2))
        told = (profile, *profiles.changed(profile, fact, rng, 3))
        said = [profiles.fact_answer(p, fact) if sentences else str(getattr(p, fact)) for p in told]
        order = rng.permutation(len(said))
        options = dict(zip(questions.KEYS, (said[int(k)] for k in order), strict=True))
        asked = texts.pick(rng, profiles.fact_questions(profile, fact, test=bool(rng.integers(2))))
        key = questions.KEYS[int(np.flatnonzero(order == 0)[0])]
        items.append({"question": asked, "options": options, "answer_key": key})
    return items


def unnamed_sample(seed: int, size: int = 96) -> dict[str, Any]:
    """One whole record: `unnamed_texts` and `image`, uint8 [size, size, 3]."""
    return unnamed_texts(seed) | {"image": unnamed_picture(seed, size)}

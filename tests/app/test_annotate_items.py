"""What a model answers when it annotates: what is taken, and what is refused with which reason."""

from __future__ import annotations

import pytest

from unichar_jax.app.annotate.asking import Taken, parse
from unichar_jax.app.annotate.kinds import KINDS, Facts, Reject

GOOD = {
    "description": {"description": "Wisp is a shy ghost who sews and says Boo, maybe!"},
    "manner": {"profile": "- Wisp is shy and kind."},
    "caption": {"caption": "Wisp waves on the beach."},
    "exchange": {"user": "Hi!", "reply": "Boo, maybe!"},
    "plan": {
        "thinking": "Wisp stands on the beach, since " + "that was said " * 5,
        "instruction": "A shy ghost on a beach.",
    },
    "vqa": {"question": "Who is it?", "answer": "It is Wisp.", "type": "objective"},
    "image_mcq": {
        "question": "Where is Wisp?",
        "answer": "beach",
        "wrong": ["forest", "city", "castle"],
        "difficulty": "easy",
        "rationale": "Sand.",
    },
    "knowledge": {
        "question": "What is Wisp's job?",
        "answer": "tailor",
        "evidence": "Wisp is  a TAILOR",
        "type": "fact",
        "difficulty": "easy",
        "reasoning_steps": ["It says so."],
        "confidence": 1,
    },
    "memorization": {"question": "Who is your friend?"},
    "rl_prompts": {
        "text": "Wisp flies a kite",
        "questions": [
            {"question": f"Is there a {thing}?", "answer": "Yes", "type": "yes_no"}
            for thing in ("kite", "sky", "ghost")
        ],
    },
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_items_are_taken(kind):
    facts = Facts("Wisp", "Wisp is a tailor.")
    clean = KINDS[kind].check(GOOD[kind], facts)
    assert KINDS[kind].check(clean, facts) == clean  # what is clean stays as it is
    assert KINDS[kind].gist(clean)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("description", {"description": "A shy ghost who sews and says Boo, maybe, often."}, "does not name"),
        ("description", {"description": "Wisp " * 200}, "40 to 600"),
        ("caption", {"caption": 5}, "expected text"),
        ("caption", {"caption": "Wisp waves <image> on the beach."}, "the tag <image>"),
        ("caption", {"caption": "Wisp waves\x07 on the beach."}, "control"),
        ("caption", {"caption": "Wisp waves \ud800 on the beach."}, "control"),
        ("exchange", {"reply": "..."}, "placeholder"),
        ("exchange", {"reply": "hi"}, "repeats"),
        ("exchange", {"reply": "Wisp: Boo!"}, "label"),
        ("exchange", {"reply": "As an AI language model I cannot."}, "itself"),
        ("exchange", {"user": ""}, "2 to 600"),
        ("plan", {"thinking": "<think>" + "a" * 80}, "the tag <think>"),
        ("vqa", {"type": "other"}, "objective, subjective"),
        ("vqa", {"answer": None}, "expected text"),
        ("image_mcq", {"wrong": ["forest", "city"]}, "three"),
        ("image_mcq", {"wrong": ["forest", "city", "Beach!"]}, "different"),
        ("image_mcq", {"wrong": ["forest", "city", "none of these"]}, "not answers"),
        ("image_mcq", {"difficulty": "trivial"}, "easy, medium, hard"),
        ("knowledge", {"evidence": "Wisp is a sailor"}, "not in the profile"),
        ("knowledge", {"evidence": "!!!"}, "placeholder"),
        ("knowledge", {"confidence": 7}, "0 to 1"),
        ("knowledge", {"reasoning_steps": 5}, "list"),
        ("rl_prompts", {"text": "A ghost flies a kite"}, "does not name"),
        ("rl_prompts", {"questions": GOOD["rl_prompts"]["questions"][:1] * 3}, "got 1"),
        (
            "rl_prompts",
            {"questions": [{"question": "Is it so?", "answer": "maybe", "type": "yes_no"}]},
            "yes, no",
        ),
        ("rl_prompts", {"questions": "none"}, "a list"),
    ],
)
def test_bad_items_are_refused_with_the_reason(kind, change, reason):
    with pytest.raises(Reject, match=reason):
        KINDS[kind].check(GOOD[kind] | change, Facts("Wisp", "Wisp is a tailor."))


def test_json_is_found_in_whatever_surrounds_it():
    one = [{"a": 1}]
    for text in (
        '[{"a": 1}]',
        'Sure!\n```json\n[{"a": 1}]\n```\nAnything else?',
        '{"a": 1}',
        '{"items": [{"a": 1}]}',
        "<think>[not this]</think>" + '[{"a": 1}]',
        '[{"a": 1}, {"a": 2',
        '[{"a": 1},, {]',
    ):
        assert parse(text) == one
    assert parse('[{"a": {"b": 1}}, {"c": 2}]') == [{"a": {"b": 1}}, {"c": 2}]


def test_twins():
    taken = Taken(["What does Wisp like to eat?"])
    assert taken.twin("what does wisp like to EAT")
    assert taken.twin("What does Wisp like to eat now?")
    assert not taken.twin("What does Wisp like to wear?")

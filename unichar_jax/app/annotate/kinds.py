"""The kinds of items: what a model must say, and when it is refused.

A check takes what the model wrote for one item and what is known of the character, and returns the item's
clean value or raises ``Reject`` with a reason that the model can act on. The same checks judge what a person
edits in the review page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unichar_jax.data import words
from unichar_jax.data.new_character import DESCRIPTION_CHARS
from unichar_jax.data.rl_prompts import QUESTION_TYPES

Value = dict[str, Any]
DIFFICULTIES = ("easy", "medium", "hard")

_TAGS = re.compile(r"</?(?:think|gen|image)>", re.IGNORECASE)
_EMPTY = re.compile(r"[\W_]+|\W*(?:n/?a|none|null|string|text|todo|answer|question)\W*", re.IGNORECASE)
_MACHINE = re.compile(
    r"\bas an? (?:ai|artificial|(?:large )?language model)\b|\bI(?:'m| am) an? AI\b", re.IGNORECASE
)
_ALL_OF = re.compile(r"\b(?:all|none|both|neither) of (?:the|these|those)\b", re.IGNORECASE)


class Reject(Exception):
    """An item that is not taken; the message says why."""


@dataclass(frozen=True)
class Facts:
    """What an item is judged against."""

    name: str
    profile: str


@dataclass(frozen=True)
class Kind:
    """One kind of items.

    Attributes:
      name: also of its prompt, ``prompts/<name>.md``.
      check: see the module.
      gist: the part of an item that no other item may repeat.
      title: for people.
    """

    name: str
    check: Callable[[Value, Facts], Value]
    gist: Callable[[Value], str]
    title: str


def plain(text: str) -> str:
    """A text's words, for comparisons."""
    return " ".join("".join(c if words.is_word(c) else " " for c in text.lower()).split())


def _text(value: Value, key: str, least: int, most: int) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise Reject(f"{key}: expected text, got {type(text).__name__}")
    text = text.replace("\r\n", "\n").strip()
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Reject(f"{key}: it holds control characters")
    if not least <= len(text) <= most:
        raise Reject(f"{key}: expected {least} to {most} characters, got {len(text)}")
    if _TAGS.search(text):
        raise Reject(f"{key}: it holds the tag {_TAGS.search(text).group()}")  # type: ignore[union-attr]
    if remarks := words.gate(text, "NAME")[1]:
        raise Reject(f"{key}: it holds {remarks[0].got}")
    if len(text) > 2 and _EMPTY.fullmatch(text):
        raise Reject(f"{key}: it is a placeholder")
    if _MACHINE.search(text):
        raise Reject(f"{key}: the model speaks of itself")
    return text


def _named(text: str, key: str, facts: Facts) -> str:
    if facts.name.lower() not in text.lower():
        raise Reject(f"{key}: it does not name {facts.name}")
    return text


def _choice(value: Value, key: str, options: tuple[str, ...], default: str = "") -> str:
    chosen = value.get(key, default)
    if not isinstance(chosen, str) or chosen.strip().lower() not in options:
        raise Reject(f"{key}: expected one of {', '.join(options)}")
    return chosen.strip().lower()


def _number(value: Value, key: str, default: float) -> float:
    number = value.get(key, default)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise Reject(f"{key}: expected a number from 0 to 1")
    return float(number)


def _question(value: Value) -> str:
    return _text(value, "question", 6, 400)


def _evidence(value: Value, facts: Facts) -> str:
    """A quotation, letter for letter but for spaces and marks."""
    text = _text(value, "evidence", 3, 1000)
    if plain(text) not in plain(facts.profile) or not plain(text):
        raise Reject("evidence: these words are not in the profile")
    return text


def _wrong(value: Value, answer: str) -> list[str]:
    wrong = value.get("wrong")
    if not isinstance(wrong, list) or len(wrong) != 3:
        raise Reject("wrong: expected a list of three wrong answers")
    texts = [_text({"wrong": w}, "wrong", 1, 300) for w in wrong]
    if len({plain(t) for t in (answer, *texts)}) < 4:
        raise Reject("wrong: the answers are not all different")
    if any(_ALL_OF.search(t) for t in (answer, *texts)):
        raise Reject("wrong: 'all of these' and 'none of these' are not answers")
    return texts


# -- the kinds ----------------------------------------------------------------------------------------------


def _description(value: Value, facts: Facts) -> Value:
    return {"description": _named(_text(value, "description", 40, DESCRIPTION_CHARS), "description", facts)}


def _manner(value: Value, facts: Facts) -> Value:
    return {"profile": _text(value, "profile", 20, 6000)}


def _caption(value: Value, facts: Facts) -> Value:
    return {"caption": _named(_text(value, "caption", 15, 500), "caption", facts)}


def _exchange(value: Value, facts: Facts) -> Value:
    user, reply = _text(value, "user", 2, 600), _text(value, "reply", 2, 1200)
    if plain(user) == plain(reply):
        raise Reject("reply: it repeats the user")
    if re.match(rf"{re.escape(facts.name)}\s*:", reply, re.IGNORECASE):
        raise Reject(f"reply: it begins with the label '{facts.name}:'")
    return {"user": user, "reply": reply}


def _plan(value: Value, facts: Facts) -> Value:
    return {
        "thinking": _text(value, "thinking", 60, 3000),
        "instruction": _text(value, "instruction", 20, 1000),
    }


def _vqa(value: Value, facts: Facts) -> Value:
    return {
        "question": _question(value),
        "answer": _text(value, "answer", 2, 500),
        "type": _choice(value, "type", ("objective", "subjective")),
    }


def _image_mcq(value: Value, facts: Facts) -> Value:
    answer = _text(value, "answer", 1, 300)
    return {
        "question": _question(value),
        "answer": answer,
        "wrong": _wrong(value, answer),
        "difficulty": _choice(value, "difficulty", DIFFICULTIES, "easy"),
        "rationale": _text(value, "rationale", 3, 1000),
    }


def _knowledge(value: Value, facts: Facts) -> Value:
    steps = value.get("reasoning_steps", [])
    steps = [steps] if isinstance(steps, str) else steps
    if not isinstance(steps, list):
        raise Reject("reasoning_steps: expected a list of texts")
    return {
        "question": _question(value),
        "answer": _text(value, "answer", 1, 600),
        "evidence": _evidence(value, facts),
        "type": _text(value, "type", 3, 40),
        "difficulty": _choice(value, "difficulty", DIFFICULTIES),
        "reasoning_steps": [_text({"step": s}, "step", 1, 500) for s in steps],
        "confidence": _number(value, "confidence", 1.0),
    }


def _knowledge_mcq(value: Value, facts: Facts) -> Value:
    answer = _text(value, "answer", 1, 300)
    return {
        "question": _question(value),
        "answer": answer,
        "wrong": _wrong(value, answer),
        "evidence": _evidence(value, facts),
        "rationale": _text(value, "rationale", 3, 1000),
    }


def _asked(value: Value, facts: Facts) -> Value:
    return {"question": _question(value).strip('"')}


def _rl_prompt(value: Value, facts: Facts) -> Value:
    """A drawing prompt; of its questions the good ones are kept, each once."""
    text = _named(_text(value, "text", 10, 400), "text", facts)
    questions = value.get("questions")
    if not isinstance(questions, list):
        raise Reject("questions: expected a list")
    kept: dict[str, Value] = {}
    reason = "none were given"
    for question in questions:
        try:
            checked = _rl_question(question if isinstance(question, dict) else {})
            kept.setdefault(plain(checked["question"]), checked)
        except Reject as error:
            reason = str(error)
    if len(kept) < 3:
        raise Reject(f"questions: expected at least 3 good ones, got {len(kept)} ({reason})")
    return {"text": text, "questions": list(kept.values())}


def _rl_question(value: Value) -> Value:
    kind = _choice(value, "type", QUESTION_TYPES)
    answer = _text(value, "answer", 1, 200)
    made: Value = {"question": _question(value), "type": kind}
    made["category"] = _text(value, "category", 3, 60) if "category" in value else "scene"
    if kind == "yes_no":
        answer = _choice(value, "answer", ("yes", "no"))
    made |= {"answer": answer, "weight": _number(value, "weight", 1.0)}
    made["is_negative"] = kind == "yes_no" and answer == "no"
    if kind == "multiple_choice":
        choices = value.get("choices")
        if not isinstance(choices, list) or not 2 <= len(choices) <= 6:
            raise Reject("choices: expected 2 to 6")
        texts = [_text({"choice": c}, "choice", 1, 200) for c in choices]
        if answer not in texts or len({plain(t) for t in texts}) < len(texts):
            raise Reject("choices: expected different ones with the answer among them")
        made["choices"] = texts
    return made


def _of(key: str) -> Callable[[Value], str]:
    return lambda value: str(value[key])


KINDS = {
    kind.name: kind
    for kind in (
        Kind("description", _description, _of("description"), "Description"),
        Kind("manner", _manner, _of("profile"), "Personality"),
        Kind("caption", _caption, _of("caption"), "Captions"),
        Kind("exchange", _exchange, _of("user"), "Exchanges with pictures"),
        Kind("plan", _plan, _of("instruction"), "Thinking and drawing instructions"),
        Kind("vqa", _vqa, _of("question"), "Questions about pictures"),
        Kind("image_mcq", _image_mcq, _of("question"), "Multiple choice about pictures (test)"),
        Kind("knowledge", _knowledge, _of("question"), "Knowledge"),
        Kind("knowledge_mcq", _knowledge_mcq, _of("question"), "Multiple choice about knowledge (test)"),
        Kind("dialogue", _exchange, _of("user"), "Exchanges"),
        Kind("dialogue_test", _exchange, _of("user"), "Exchanges (test)"),
        Kind("memorization", _asked, _of("question"), "Memory (test)"),
        Kind("personality", _asked, _of("question"), "Personality (test)"),
        Kind("rl_prompts", _rl_prompt, _of("text"), "Drawing prompts with questions"),
    )
}

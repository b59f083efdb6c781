"""Asking a model for items until there are enough good ones: prompts, parsing, memory, rounds."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any

from unichar_jax.app.annotate.kinds import KINDS, Facts, Reject, Value, plain
from unichar_jax.data.images import content_of
from unichar_jax.files import Journal, digest

Ask = Callable[[str, Path | None], str]
"""A prompt and a picture to the model's answer."""

ALIKE = 0.8
"""Share of common words from which two texts count as the same."""

_FRUITLESS = 2
"""Answers without a new item after which a model is not asked again."""

_TOLD = 40
"""Most earlier items that a prompt names."""


@dataclass(frozen=True)
class Item:
    """An accepted item. ``part`` is the picture's id or another share of its kind."""

    id: str
    kind: str
    part: str
    value: Value


@dataclass(frozen=True)
class Rejected:
    """What a model said and why it was not taken."""

    kind: str
    part: str
    reason: str
    said: str


@dataclass
class Collected:
    """What became of one wish."""

    kind: str
    part: str
    wanted: int
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.wanted - len(self.items)


class Answers:
    """A model that is asked each thing once.

    Args:
      ask: asks the model.
      who: names the model; answers of another are not taken for its own.
      memory: a JSONL file of answers; made if it is not there.
    """

    def __init__(self, ask: Ask, who: str, memory: Path):
        self._ask, self._who, self._memory = ask, who, Journal(memory, "answer")
        self.asked, self._lock = 0, Lock()

    def __call__(self, prompt: str, image: Path | None, attempt: int) -> str:
        """The answer; ``attempt`` tells apart when the same is asked again."""
        seen = content_of(image) if image else ""
        told = json.dumps([self._who, prompt, seen, attempt])
        key = digest(told)[:24]
        if key not in self._memory.known:
            self._memory.add(key, self._ask(prompt, image))
            with self._lock:
                self.asked += 1
        return self._memory.known[key]


class Taken:
    """Texts that may not be said again: the same words, or nearly."""

    def __init__(self, texts: Iterable[str] = ()):
        self._words: list[frozenset[str]] = []
        self.texts: list[str] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._words.append(frozenset(plain(text).split()))

    def twin(self, text: str) -> str | None:
        """A text that says the same, if there is one."""
        words = frozenset(plain(text).split())
        for known, other in zip(self.texts, self._words, strict=True):
            if words == other or len(words & other) >= ALIKE * len(words | other) > 0:
                return known
        return None


def collect(
    answers: Answers,
    kind_name: str,
    wanted: int,
    facts: Facts,
    fields: dict[str, str],
    *,
    part: str = "",
    image: Path | None = None,
    taken: Iterable[str] = (),
    held_out_from: Iterable[str] = (),
    batch: int = 20,
    tell: Callable[[int], None] = lambda _: None,
) -> Collected:
    """Asks until there are ``wanted`` good items, or the model has no more.

    Args:
      answers: who is asked.
      kind_name: of the items.
      wanted: how many.
      facts: what items are judged against.
      fields: of the prompt.
      part: the share of the kind that this is.
      image: a picture to look at.
      taken: what items of this kind there are already.
      held_out_from: what test items must differ from.
      batch: most items in one answer.
      tell: called with the number of items at hand.
    """
    kind = KINDS[kind_name]
    found = Collected(kind_name, part, wanted)
    known, training = Taken(taken), Taken(held_out_from)
    complaints: list[str] = []
    fruitless = attempt = 0
    while found.missing > 0 and fruitless < _FRUITLESS:
        prompt = _prompt(kind_name, min(batch, found.missing), facts, fields, known, training, complaints)
        answer = answers(prompt, image, attempt)
        before, complaints, attempt = len(found.items), [], attempt + 1
        try:
            said = parse(answer)
        except Reject as error:
            found.rejected.append(Rejected(kind_name, part, str(error), answer[:2000]))
            complaints.append(str(error))
            said = []
        for value in said:
            if found.missing <= 0:
                break
            try:
                clean = kind.check(value, facts)
                gist = kind.gist(clean)
                if twin := known.twin(gist):
                    raise Reject(f"it repeats: {twin[:100]}")
                if twin := training.twin(gist):
                    raise Reject(f"it is in the training data: {twin[:100]}")
            except Reject as error:
                found.rejected.append(
                    Rejected(kind_name, part, str(error), json.dumps(value, ensure_ascii=False)[:2000])
                )
                complaints.append(str(error))
                continue
            known.add(gist)
            name = "-".join(p for p in (kind_name, part, digest(gist)[:8]) if p)
            found.items.append(Item(name, kind_name, part, clean))
        fruitless = 0 if len(found.items) > before else fruitless + 1
        tell(len(found.items))
    return found


def _prompt(
    kind: str,
    count: int,
    facts: Facts,
    fields: dict[str, str],
    known: Taken,
    training: Taken,
    complaints: list[str],
) -> str:
    notes = []
    if known.texts:
        notes.append("These are there already; write others:\n" + _listed(known.texts))
    if training.texts:
        notes.append("These were trained on; write others:\n" + _listed(training.texts))
    if complaints:
        notes.append(
            "Items of your last answer were refused, because:\n" + _listed(dict.fromkeys(complaints))
        )
    text = (
        resources.files("unichar_jax.app.annotate").joinpath(f"prompts/{kind}.md").read_text(encoding="utf-8")
    )
    told = {"name": facts.name, "profile": facts.profile or "(none)", "count": str(count)} | fields
    return string.Template(text).substitute(told, notes="\n\n".join(["", *notes, ""]) if notes else "")


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(text.split())[:200]}" for text in list(texts)[-_TOLD:])


def parse(answer: str) -> list[Value]:
    """The objects of a model's JSON, whatever surrounds it; of one that was cut off, the whole ones.

    Raises:
      Reject: there are none.
    """
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    decoder = json.JSONDecoder()
    at = min((i for i in (text.find("["), text.find("{")) if i >= 0), default=-1)
    if at < 0:
        raise Reject("the answer holds no JSON")
    try:
        found: Any = decoder.raw_decode(text, at)[0]
    except (ValueError, RecursionError):
        found = []
        while (at := text.find("{", at)) >= 0:
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                at += 1
            else:
                found.append(value)
    if isinstance(found, dict):
        lists = [v for v in found.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        found = lists[0] if len(found) == 1 and lists else [found]
    objects = [value for value in found if isinstance(value, dict)] if isinstance(found, list) else []
    if not objects:
        raise Reject("the answer holds no JSON array of objects")
    return objects

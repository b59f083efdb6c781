"""The order in which a character is annotated, and what must not leak from training into tests.

First the description (it is part of other prompts), then every picture on its own, then what the profile and
the exchanges give, and last the test sets, whose questions must differ from all that training sees. Pictures
that are held out are annotated as the others but go to the test folder. Steps that do not need each other run
at the same time; what each asks depends on earlier steps only, never on timing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unichar_jax.app.annotate.asking import Answers, Collected, Item, Taken, collect
from unichar_jax.app.annotate.kinds import DIFFICULTIES, Facts, Value
from unichar_jax.data.character import Character, Dialogue, ImageFile, Scene
from unichar_jax.data.images import open_image
from unichar_jax.data.rolescape import read_character
from unichar_jax.errors import UserError

Tell = Callable[[str, int, int], None]
"""Progress: what, how many there are, how many are wanted."""


@dataclass(frozen=True)
class Wanted:
    """How many items of each kind; the defaults are RoleScape-20's.

    Attributes:
      vqa: questions about each picture.
      image_mcq: multiple-choice questions about each picture.
      knowledge: questions about the profile.
      dialogue: exchanges without pictures.
      dialogue_test, memorization, personality: test items.
      knowledge_mcq: multiple-choice questions on the profile: easy, medium, hard.
      rl_prompts: drawing prompts for Character-GRPO.
      held_out: pictures that training does not see.
    """

    vqa: int = 20
    image_mcq: int = 5
    knowledge: int = 100
    dialogue: int = 180
    dialogue_test: int = 20
    memorization: int = 20
    personality: int = 20
    knowledge_mcq: tuple[int, int, int] = (4, 4, 2)
    rl_prompts: int = 30
    held_out: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,)) < 0:
                raise UserError(f"annotate.{name}: expected 0 or more, got {value}.")


@dataclass
class Annotation:
    """What was found out about a character.

    Attributes:
      character: as the user gave it.
      held_out: pictures for testing.
      collected: by kind and part.
      asked: questions that were put to the model now, not remembered.
    """

    character: Character
    held_out: tuple[ImageFile, ...]
    collected: dict[tuple[str, str], Collected] = field(default_factory=dict)
    asked: int = 0

    @property
    def facts(self) -> Facts:
        return Facts(self.character.name, self.character.full_profile)

    def items(self, kind: str, part: str | None = None) -> list[Item]:
        """Accepted items of a kind, in the order of their parts."""
        return [
            item
            for (k, p), c in self.collected.items()
            if k == kind and part in (None, p)
            for item in c.items
        ]

    def first(self, kind: str, part: str | None = None) -> Value | None:
        """The value of the first of these; None without any."""
        return next((item.value for item in self.items(kind, part)), None)

    @property
    def description(self) -> str:
        """The model's, where it was asked for one, else the user's."""
        return (self.first("description") or {"description": self.character.description})["description"]


def annotate(folder: Path, answers: Answers, wanted: Wanted, workers: int, tell: Tell) -> Annotation:
    """Asks for everything that the folder lacks.

    Args:
      folder: a character's ``train`` folder, as ``unichar data new`` makes it; it is only read.
      answers: the model.
      wanted: how much.
      workers: questions at a time.
      tell: of progress.

    Raises:
      UserError: a faulty folder, no profile, too few pictures, or a model that does not answer.
    """
    character = read_character(folder)
    if not character.full_profile.strip():
        raise UserError(
            f"{folder}: there is no profile; write {character.name}_full_profile.txt, or start anew with"
            " unichar data new NAME --profile FILE."
        )
    found = Annotation(character, _held_out(character, wanted.held_out))
    work = _Work(found, answers, wanted, tell)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for step in (work.character, work.pictures, work.training, work.tests):
                for collected in pool.map(lambda task: task(), step()):
                    found.collected |= {(c.kind, c.part): c for c in collected}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    found.asked = answers.asked
    return found


def stand_in_description(name: str) -> str:
    """What ``data new`` writes where it has no profile."""
    return f"{name} is the character in these pictures."


def stand_in_caption(name: str) -> str:
    """What ``data new`` writes where a picture has no caption."""
    return f"A picture of {name}"


def _held_out(character: Character, count: int) -> tuple[ImageFile, ...]:
    """The pictures to test with: those the user says nothing about first, and none that training sees, too."""
    told = {s.image.id for s in character.scenes}
    free = [i for i in character.images if i.id not in told]
    order = [*reversed(free), *(i for i in reversed(character.images) if i.id in told)]
    looks = {i.id: _look(i) for i in character.images}
    chosen: list[ImageFile] = []
    for image in order:
        others = [looks[i.id] for i in character.images if i.id != image.id]
        if (
            len(chosen) < count
            and min((float(np.abs(looks[image.id] - o).mean()) for o in others), default=1) > 0.01
        ):
            chosen.append(image)
    if len(character.images) - len(chosen) < 1:
        raise UserError(
            f"{character.folder}: {len(character.images)} pictures are too few to hold {count} of them out;"
            " give more pictures, or --held-out 0."
        )
    return tuple(sorted(chosen, key=character.images.index))


def _look(image: ImageFile) -> np.ndarray:
    """A picture at a glance, float32 ``[16, 16, 3]`` in [0, 1]: near copies have near glances."""
    small = open_image(image.path).resize((16, 16))
    return np.asarray(small, np.float32) / 255


Task = Callable[[], list[Collected]]


class _Work:
    """The steps. Each gives tasks that may run at the same time."""

    def __init__(self, found: Annotation, answers: Answers, wanted: Wanted, tell: Tell):
        self.found, self.answers, self.wanted, self.tell = found, answers, wanted, tell
        self.who = found.character

    def _collect(self, kind: str, wanted: int, fields: dict[str, str] | None = None, **more) -> Collected:
        part = more.get("part", "")
        label = f"{kind} {part}".strip()
        return collect(
            self.answers,
            kind,
            wanted,
            self.found.facts,
            self._fields() | (fields or {}),
            tell=lambda n: self.tell(label, n, wanted),
            **more,
        )

    def _fields(self) -> dict[str, str]:
        said = [f"User: {s.user}\n{self.who.name}: {s.reply}" for s in self._spoken()]
        return {
            "description": self.found.description,
            "examples": "\n\n".join(dict.fromkeys(said[:8])) or "(none)",
        }

    def _spoken(self) -> list[Scene | Dialogue]:
        """The user's own exchanges."""
        return [*self.who.scenes, *self.who.extension_train]

    def character(self) -> list[Task]:
        tasks: list[Task] = []
        if self.who.description == stand_in_description(self.who.name):
            tasks.append(lambda: [self._collect("description", 1)])
        if not self.who.simplified_profile.strip():
            tasks.append(lambda: [self._collect("manner", 1)])
        return tasks

    def pictures(self) -> list[Task]:
        return [lambda image=image: self._picture(image) for image in self.who.images]  # type: ignore[misc]

    def _picture(self, image: ImageFile) -> list[Collected]:
        """All about one picture: each question builds on the answers before it."""
        at = {"part": image.id, "image": image.path}
        scene = next((s for s in self.who.scenes if s.image.id == image.id), None)
        caption = next((c.text for c in self.who.captions if c.image.id == image.id), "")
        found: list[Collected] = []
        if caption in ("", stand_in_caption(self.who.name)):
            found.append(self._collect("caption", 1, **at))
        if scene is not None:
            told = {"user": scene.user, "reply": scene.reply}
        else:
            found.append(self._collect("exchange", 1, **at))
            if not found[-1].items:
                return found
            told = found[-1].items[0].value
        if scene is None or not (scene.thinking and scene.generation_instruction):
            found.append(self._collect("plan", 1, told, **at))
        trained = [q.question for q in scene.qa_pairs] if scene else []
        if image not in self.found.held_out:
            found.append(self._collect("vqa", max(0, self.wanted.vqa - len(trained)), taken=trained, **at))
            trained += [i.value["question"] for i in found[-1].items]
        there = [q.question for q in scene.mcq_items] if scene else []
        count = max(0, self.wanted.image_mcq - len(there))
        found.append(self._collect("image_mcq", count, taken=there, held_out_from=trained, **at))
        return found

    def training(self) -> list[Task]:
        facts = [q.question for q in self.who.knowledge_qa]
        # What is said in the held-out scenes is for testing only.
        said = [s.user for s in (*self._spoken(), *self.who.extension_test)]
        said += [i.value["user"] for i in self.found.items("exchange")]
        captions = "\n".join(f"- {text}" for text in captions_of(self.found).values())
        want = self.wanted
        return [
            lambda: [self._collect("knowledge", max(0, want.knowledge - len(facts)), taken=facts)],
            lambda: [self._collect("dialogue", want.dialogue, taken=said)],
            lambda: [
                self._collect(
                    "rl_prompts",
                    want.rl_prompts,
                    {"captions": captions},
                    taken=captions_of(self.found).values(),
                    batch=5,
                )
            ],
        ]

    def tests(self) -> list[Task]:
        facts = [q.question for q in self.who.knowledge_qa] + self._said("knowledge")
        users = [s.user for s in self._spoken()]
        users += self._said("exchange") + self._said("dialogue")
        want, who = self.wanted, self.who
        there = [d.user for d in who.extension_test]

        def choices() -> list[Collected]:
            found: list[Collected] = []
            taken = Taken(q.question for q in who.knowledge_mcq)
            for difficulty, count in zip(DIFFICULTIES, want.knowledge_mcq, strict=True):
                got = self._collect(
                    "knowledge_mcq",
                    0 if who.knowledge_mcq else count,
                    {"difficulty": difficulty},
                    part=difficulty,
                    taken=list(taken.texts),
                    held_out_from=facts,
                )
                for item in got.items:
                    taken.add(item.value["question"])
                found.append(got)
            return found

        def asked() -> list[Collected]:
            """One after the other: no question is in two test sets."""
            made = self._collect(
                "dialogue_test", max(0, want.dialogue_test - len(there)), taken=there, held_out_from=users
            )
            taken = [*there, *(i.value["user"] for i in made.items)]
            found = [made]
            for kind, given in (("memorization", who.memorization), ("personality", who.personality)):
                taken += given
                got = self._collect(
                    kind,
                    max(0, getattr(want, kind) - len(given)),
                    taken=list(taken),
                    held_out_from=[*users, *facts],
                )
                taken += [i.value["question"] for i in got.items]
                found.append(got)
            return found

        return [choices, asked]

    def _said(self, kind: str) -> list[str]:
        key = "user" if kind in ("exchange", "dialogue") else "question"
        return [str(item.value[key]) for item in self.found.items(kind)]


def captions_of(found: Annotation) -> dict[str, str]:
    """Captions by picture: the user's, and the model's where the user has none."""
    captions = {c.image.id: c.text for c in found.character.captions}
    made = {i.part: str(i.value["caption"]) for i in found.items("caption")}
    return {i.id: made.get(i.id) or captions.get(i.id, "") for i in found.character.images}


def balanced_letters(count: int, seed: str) -> list[str]:
    """Answer keys, each letter as often as any other within one, in an order that the seed decides."""
    rng = _rng(seed)
    letters = list("ABCD" * (count // 4)) + [str(x) for x in rng.permutation(list("ABCD"))[: count % 4]]
    return [letters[int(i)] for i in rng.permutation(count)]


def shuffled(texts: Sequence[str], seed: str) -> list[str]:
    return [texts[int(i)] for i in _rng(seed).permutation(len(texts))]


def _rng(seed: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))


def shortfalls(collected: Iterable[Collected]) -> list[str]:
    """What there is less of than was wished for."""
    missing = [c for c in collected if c.missing > 0]
    return [
        f"{' '.join((c.kind, c.part)).strip()}: {len(c.items)} of {c.wanted}"
        + (f" (the last refusal: {c.rejected[-1].reason})" if c.rejected else "")
        for c in missing
    ]

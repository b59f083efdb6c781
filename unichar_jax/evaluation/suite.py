"""The evaluation of a subject: ask every item, keep the outputs, measure them.

``collect`` is the expensive half: it asks the subject in chunks of fixed composition and keeps what it
answers. A chunk is the unit of resuming and of sharding, so numbers do not depend on how often a run was
interrupted or on how many processes shared it. ``measure`` is the cheap half: metrics from outputs.
``evaluate`` is both; ``originals`` measures the held-out replies and pictures themselves, which is what a
perfect model would get.

Randomness is a function of the item and the number of the repetition alone, so two models are compared on
the same draws. Questions that are scored by likelihood draw nothing and are asked once.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unichar_jax.data import templates
from unichar_jax.errors import UserError, require_known
from unichar_jax.evaluation import pictures, texts
from unichar_jax.evaluation.items import DEFAULT_TASKS, TASKS, Case, Context, Item, items
from unichar_jax.evaluation.outputs import Output, OutputStore
from unichar_jax.evaluation.pictures import Instruments
from unichar_jax.evaluation.rater import RUBRICS, Reply
from unichar_jax.evaluation.results import ORIGINALS, Record, Results
from unichar_jax.evaluation.subject import Prompt, Subject

CHUNK = 8
"""At most so many items are asked together."""

CHOICES = ("knowledge_mcq", "image_mcq", "unseen_image_mcq")
DRAWN = ("t2i", "scene_t2i", "t2t2i")
SEEDED = ("dialogue", "memorization", "personality", *DRAWN)
"""Tasks with something random in their outputs: asked once for every seed. The others are asked once."""

Progress = Callable[[int, int, str], None]
"""Called with (chunks done, chunks in all, what is next)."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
      tasks: names from ``items.TASKS``.
      seeds: repetitions of what is random.
      context: what prompts say of the character (see ``items``).
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    seeds: int = 3
    context: Context = "name"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds: expected at least 1, got {self.seeds}.")

    def repetitions(self, task: str) -> range:
        return range(self.seeds if task in SEEDED else 1)


def evaluate(
    subject: Subject,
    cases: Sequence[Case],
    store: OutputStore,
    plan: Plan | None = None,
    instruments: Instruments | None = None,
    *,
    label: str = "model",
    rewarded: Sequence[str] = (),
    progress: Progress | None = None,
) -> Results:
    """Asks what is not in the store yet, and measures everything.

    Args:
      subject: what is evaluated.
      cases: the characters.
      store: keeps outputs.
      plan: tasks, seeds and context.
      instruments: scorers and judges; without them only what texts, likelihoods and pixels tell.
      label: what tables call the subject.
      rewarded: metrics that the subject was trained to raise.
      progress: told of every chunk.
    """
    plan = plan or Plan()
    start = time.monotonic()
    collect(subject, cases, store, plan, progress=progress)
    asked = time.monotonic()
    results = measure(cases, store, subject.fingerprint, plan, instruments, label=label, rewarded=rewarded)
    seconds = {"asking": round(asked - start, 1), "measuring": round(time.monotonic() - asked, 1)}
    return replace(results, settings={**results.settings, "seconds": seconds})


# -- asking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    task: str
    items: tuple[Item, ...]
    seed: int

    def __str__(self) -> str:
        repetition = f", seed {self.seed}" if self.task in SEEDED else ""
        return f"{self.items[0].character}: {self.task}{repetition}"


def chunks(cases: Sequence[Case], plan: Plan) -> list[_Chunk]:
    """Everything that there is to ask, in fixed pieces and a fixed order."""
    found = []
    for case in cases:
        for task in plan.tasks:
            todo = items(case, task, plan.context)
            # As equal as can be: batches of few sizes need few compiled programs.
            count = -(-len(todo) // CHUNK)
            ends = [i * len(todo) // count for i in range(count + 1)] if todo else []
            for seed in plan.repetitions(task):
                for start, end in itertools.pairwise(ends):
                    found.append(_Chunk(task, tuple(todo[start:end]), seed))
    return found


def collect(
    subject: Subject,
    cases: Sequence[Case],
    store: OutputStore,
    plan: Plan,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> None:
    """Asks every chunk that is not complete in the store.

    Args:
      subject, cases, store, plan: as in ``evaluate``.
      shard: (i, n): take chunks i, i + n, ... only. Every process needs a writer of its own
        (``OutputStore``).
      progress: told of every chunk.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(
            f"shard {index}/{count}: expected a number from 0 to {count - 1} of {count} processes."
        )
    fingerprint = subject.fingerprint
    mine = chunks(cases, plan)[index::count]
    todo = [c for c in mine if not all(store.get(i, c.seed, fingerprint) for i in c.items)]
    for done, chunk in enumerate(todo):
        if progress:
            progress(len(mine) - len(todo) + done, len(mine), str(chunk))
        for item, data in zip(chunk.items, _ask(subject, chunk), strict=True):
            picture = data.pop("picture", None)
            store.add(item, chunk.seed, fingerprint, data, picture)
    if progress:
        progress(len(mine), len(mine), "done")


def draw_seed(item: Item, seed: int) -> int:
    """The seed of an item's random draws in one repetition; equal for all models and contexts."""
    return zlib.crc32(f"{item.task}/{item.key}/{seed}".encode())


def _ask(subject: Subject, chunk: _Chunk) -> list[dict[str, Any]]:
    """Outputs of the chunk's items, in order; ``picture`` is an image."""
    task, prompts = chunk.task, [i.prompt for i in chunk.items]
    seeds = [draw_seed(i, chunk.seed) for i in chunk.items]
    found: dict[str, Sequence[Any]] = {}
    if task in CHOICES:
        found = _ask_choices(subject, chunk.items)
    elif task in ("vqa", "reply_likelihood"):
        scores = [s for (s,) in subject.log_probs(prompts, [[i.reference] for i in chunk.items])]
        found = {"log_prob": [float(s.sum()) for s in scores], "tokens": [len(s) for s in scores]}
    if task in SEEDED:
        if task not in ("t2i", "scene_t2i"):
            found["text"] = subject.write(prompts, seeds)
        if task == "t2t2i":
            prompts = [
                Prompt(templates.t2i(i.described_by, i.question, reply), i.prompt.image)
                for i, reply in zip(chunk.items, found["text"], strict=True)
            ]
        if task in DRAWN:
            found["picture"] = subject.draw(prompts, seeds)
        found["draw_seed"] = seeds
    elif task != "reply_likelihood":
        found["text"] = subject.write(prompts, seeds, greedy=True)
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _ask_choices(subject: Subject, todo: Sequence[Item]) -> dict[str, Sequence[Any]]:
    """Letters in every order of the options, and the options' texts by themselves."""
    prompts, answers = [], []
    for item in todo:
        letters = [letter for letter, _ in item.options]
        told = [text for _, text in item.options]
        for order in texts.rotations(item.options):
            shown = dict(zip(letters, (told[k] for k in order), strict=True))
            prompts.append(Prompt(templates.multiple_choice(item.prompt.text, shown), item.prompt.image))
            answers.append(letters)
        prompts.append(item.prompt)
        answers.append(told)
    scores = iter(subject.log_probs(prompts, answers))
    found: dict[str, list[Any]] = {"letters": [], "texts": []}
    for item in todo:
        found["letters"].append([[float(s.sum()) for s in next(scores)] for _ in item.options])
        found["texts"].append([[float(s.sum()), len(s)] for s in next(scores)])
    return dict(found)


# -- measuring ----------------------------------------------------------------------------------------------


def measure(
    cases: Sequence[Case],
    store: OutputStore,
    fingerprint: str,
    plan: Plan,
    instruments: Instruments | None = None,
    *,
    label: str = "model",
    rewarded: Sequence[str] = (),
) -> Results:
    """Metrics of outputs that are all in the store.

    Raises:
      UserError: some are not.
    """
    found: list[Output] = []
    absent = 0
    for chunk in chunks(cases, plan):
        outputs = [store.get(item, chunk.seed, fingerprint) for item in chunk.items]
        absent += outputs.count(None)
        found += [o for o in outputs if o is not None]
    if absent:
        raise UserError(
            f"{store.folder}: {absent} of {absent + len(found)} outputs are missing; let the other processes"
            " finish, or evaluate without --shard, which asks what is missing."
        )
    return measure_outputs(cases, found, plan, instruments, label, fingerprint, rewarded)


def originals(
    cases: Sequence[Case],
    plan: Plan | None = None,
    instruments: Instruments | None = None,
    label: str = "originals",
) -> Results:
    """The held-out replies and pictures measured as if a subject had made them; tasks without such are
    absent."""
    plan = plan or Plan()
    found = []
    for case in cases:
        for task in plan.tasks:
            for item in items(case, task, plan.context) if task in SEEDED else ():
                data: dict[str, Any] = {"text": item.reference} if item.reference else {}
                if task in DRAWN:
                    data["picture"] = str(item.picture)
                if data:
                    found.append(Output(item, 0, data))
    measured = measure_outputs(cases, found, replace(plan, seeds=1), instruments, label, ORIGINALS, ())
    return replace(measured, left_out={})  # what is absent here is no gap of the evaluation


def measure_outputs(
    cases: Sequence[Case],
    outputs: Sequence[Output],
    plan: Plan,
    instruments: Instruments | None,
    label: str,
    fingerprint: str,
    rewarded: Sequence[str],
) -> Results:
    """Metrics of outputs, in the order of characters and tasks."""
    instruments = instruments or Instruments()
    records: list[Record] = []
    for case in cases:
        for task in plan.tasks:
            mine = [o for o in outputs if o.item.task == task and o.item.character == case.name]
            records += [
                Record(
                    task,
                    case.name,
                    o.item.key,
                    o.seed,
                    metrics,
                    o.item.question,
                    o.data.get("text", ""),
                    o.data.get("picture", ""),
                )
                for o, metrics in zip(mine, _metrics(case, task, mine, instruments), strict=True)
            ]
    settings = {"context": plan.context, "seeds": plan.seeds, "characters": [c.name for c in cases]}
    return Results(
        label,
        fingerprint,
        tuple(records),
        tuple(rewarded),
        _left_out(cases, plan, records, instruments),
        settings,
    )


_SCORED: Mapping[str, Callable[[Item, Mapping[str, Any]], Mapping[str, float]]] = {
    **dict.fromkeys(CHOICES, texts.choice),
    "vqa": texts.answer,
    "reply_likelihood": texts.likelihood,
}
"""Tasks whose metrics follow from an item and its output alone."""


def _metrics(
    case: Case, task: str, outputs: Sequence[Output], instruments: Instruments
) -> list[Mapping[str, float]]:
    if not outputs:
        return []
    if task in _SCORED:
        return [_SCORED[task](o.item, o.data) for o in outputs]
    if task in DRAWN:
        return list(pictures.measure(case, outputs, instruments))
    told = [texts.style(o.data["text"], case.train, instruments.voices) for o in outputs]
    if task == "memorization":
        told = [
            m | texts.memory(o.item, o.data["text"], case.train) for m, o in zip(told, outputs, strict=True)
        ]
    if task in RUBRICS and instruments.rater is not None:
        profile = case.train.full_profile or case.train.description
        asked = [Reply(task, case.name, profile, o.item.question, o.data["text"]) for o in outputs]
        marks = instruments.rater.rate(asked)
        told = [
            m if mark is None else m | {"judged": float(mark)} for m, mark in zip(told, marks, strict=True)
        ]
    return list(told)


def _left_out(
    cases: Sequence[Case], plan: Plan, records: Sequence[Record], instruments: Instruments
) -> dict[str, str]:
    """What tables do not show, and why."""
    why = {name: reason for name, reason in instruments.missing.items()}
    for task in plan.tasks:
        if not any(r.task == task for r in records):
            why[task] = "the characters' folders have no items of this task"
    if any(task in RUBRICS for task in plan.tasks) and instruments.rater is None:
        why["judged"] = "no judge was named; give --judge-url and --judge-model"
    if any(task in DRAWN for task in plan.tasks):
        if plan.seeds < 2:
            for name in ("diversity", "varied"):
                why[name] = "it compares pictures of one prompt: at least 2 seeds are needed"
        if not any(case.train.attributes.get("look") for case in cases):
            why["identity, prompt_following, consistency"] = (
                "only a character whose folder tells its attributes can be read by the judge"
            )
    return why


def known_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Task names, checked, in the order of tables."""

    for name in names:
        require_known("task", name, TASKS, "some of")
    return tuple(name for name in TASKS if name in names)

"""The numbers of a study: what its jobs measured, item by item and seed by seed, without texts and pictures.

``summarise`` reads a study's folder; a ``Summary`` is one JSON file that is small enough for the repository, and
everything that is reported follows from it. A subject is a variant's name; ``grpo@first`` and ``grpo@last`` are
stage 2 on its own held-out prompts before and after its training, ``grpo@5`` after five rounds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Results
from unichar_jax.evaluation.stats import Values
from workshop.study.design import (
    RECIPES,
    REWARDS,
    STAGE2,
    VARIANTS,
    Job,
    differing,
    jobs,
    plan_of,
)

ANY = "any"
"""In place of a seed: nothing was trained, so the numbers are those of every seed."""

COST, WITHIN_A_THIRD = "cost", "within_a_third"
"""Of our recipe: did a run reach the published recipe's last held-out reward with a third of the evaluations?"""

_CHOSEN = ("answer_accuracy", "accuracy", "text_accuracy")
_DRAWN = (
    "identity",
    "prompt_following",
    "clip_t",
    "clip_i",
    "dino",
    "diversity",
    "varied",
    "apart",
    "copied",
)
KEPT: Mapping[str, tuple[str, ...]] = {
    "knowledge_mcq": _CHOSEN,
    "unseen_image_mcq": _CHOSEN,
    "vqa": ("exact",),
    "reply_likelihood": ("nats_per_char",),
    "dialogue": ("voice", "catchphrase"),
    "t2i": _DRAWN,
    "t2t2i": ("identity", "consistency"),
    STAGE2: (*REWARDS, "identity", "prompt_following", "diversity", "varied", "apart", "copied"),
}
"""Task -> metrics that are kept."""

Columns = dict[str, list[float | None]]
"""``task/metric`` -> the mean over repetitions of every item, in the order of ``Summary.items``."""


@dataclass
class Summary:
    """What a study found.

    Attributes:
      settings: with which it was begun, and the versions.
      variants, characters, seeds: what is planned.
      missing: jobs of the plan without results.
      rewarded: variant -> metrics that it was trained to raise.
      left_out: what was not measured, and why.
      items: task -> character -> keys of its items.
      numbers: subject -> seed -> character -> columns.
      evaluations: subject of stage 2 -> model evaluations spent so far.
    """

    settings: dict[str, Any]
    variants: list[str]
    characters: list[str]
    seeds: list[int]
    missing: list[str] = field(default_factory=list)
    rewarded: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    items: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    numbers: dict[str, dict[str, dict[str, Columns]]] = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)

    def values(self, subject: str, task: str, metric: str) -> Values:
        """character -> item -> training seed -> value, as ``evaluation.stats`` takes them; empty if absent."""
        found: dict[str, dict[str, dict[Any, float]]] = {}
        for seed, by_character in self.numbers.get(self.resolve(subject), {}).items():
            seeds = self.seeds if seed == ANY else [int(seed)]
            for character, columns in by_character.items():
                keys = self.items.get(task, {}).get(character, [])
                for key, value in zip(keys, columns.get(f"{task}/{metric}", ()), strict=False):
                    if value is not None:
                        found.setdefault(character, {}).setdefault(key, {}).update(
                            dict.fromkeys(seeds, value)
                        )
        return found

    def resolve(self, subject: str) -> str:
        """``grpo@last`` and the like to the round that it means."""
        variant, _, when = subject.partition("@")
        if when not in ("first", "last"):
            return subject
        rounds = self.rounds(variant)
        return f"{variant}@{rounds[0 if when == 'first' else -1]}" if len(rounds) > 1 else ""

    def rounds(self, variant: str) -> list[int]:
        """Of stage 2, at which held-out prompts were drawn."""
        return sorted(int(s.partition("@")[2]) for s in self.evaluations if s.startswith(f"{variant}@"))

    def was_rewarded(self, subject: str, metric: str) -> bool:
        return metric in self.rewarded.get(subject.partition("@")[0], ())

    @property
    def planned(self) -> list[Job]:
        """In the order in which they are done."""
        return jobs(self.variants, self.characters, self.seeds)

    @property
    def done(self) -> list[Job]:
        return [job for job in self.planned if job.place not in self.missing]

    def coverage(self, variant: str) -> tuple[int, int]:
        """Jobs of a variant that are done, and planned."""
        done, planned = (
            [j for j in found if j.variant.name == variant] for found in (self.done, self.planned)
        )
        return len(done), len(planned)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n"

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Reads what ``to_json`` wrote.

        Raises:
          UserError: no such file, or something else is in it.
        """
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not the numbers of a study ({error}); give a study's folder.") from None


def summarise(folder: Path) -> Summary:
    """Reads all results of a study's folder, complete or not.

    Raises:
      UserError: the folder is no study, or a file of results is damaged.
    """
    try:
        plan = json.loads((folder / "study.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: expected a study's folder, with study.json; 'study.py run' makes one."
        ) from None
    summary = Summary(
        plan["settings"] | {"versions": plan["versions"]}, plan["variants"], plan["characters"], plan["seeds"]
    )
    for job in summary.planned:
        home, name = folder / "jobs" / job.place, job.variant.name
        seed = ANY if job.seed is None else str(job.seed)
        if not (home / "results.json").is_file():
            summary.missing.append(job.place)
            continue
        results = Results.load(home / "results.json")
        _add(summary, name, seed, results)
        summary.left_out |= results.left_out
        rewarded = set(results.rewarded)
        for path in sorted((home / "rounds").glob("round-*.json")):
            drawn = Results.load(path)
            subject = f"{name}@{drawn.settings['round']}"
            _add(summary, subject, seed, drawn)
            summary.evaluations[subject] = drawn.settings["model_evaluations"]
            rewarded |= set(drawn.rewarded)
        if rewarded:
            summary.rewarded[name] = sorted(rewarded | set(summary.rewarded.get(name, ())))
    _add_cost(summary)
    return summary


def joined(first: Summary, second: Summary) -> Summary:
    """Both studies as one, where they measured the same job the second's numbers.

    Raises:
      UserError: they were run with different settings.
    """
    unequal = differing(first.settings, second.settings | {"versions": first.settings.get("versions")})
    if unequal:
        told = "; ".join(f"{name} = {one!r} and {other!r}" for name, (one, other) in unequal.items())
        raise UserError(f"two studies do not belong together: {told}. Report each by itself.")
    both = dataclasses.replace(copy.deepcopy(first), **plan_of(vars(first), vars(second)))
    for subject, by_seed in second.numbers.items():
        for seed, by_character in by_seed.items():
            for character, columns in by_character.items():
                mine = _columns(both, subject, seed, character)
                for name, column in columns.items():
                    task = name.partition("/")[0]
                    keys = both.items.setdefault(task, {}).setdefault(character, [])
                    theirs = second.items[task][character]
                    keys += [key for key in theirs if key not in keys]
                    values = dict(zip(theirs, column, strict=False))
                    mine[name] = [values.get(key) for key in keys]
    done = {job.place for part in (first, second) for job in part.done}
    both.missing = [job.place for job in both.planned if job.place not in done]
    for name, metrics in second.rewarded.items():
        both.rewarded[name] = sorted({*metrics, *both.rewarded.get(name, ())})
    both.left_out |= second.left_out
    both.evaluations |= second.evaluations
    _add_cost(both)
    return both


def _add(summary: Summary, subject: str, seed: str, results: Results) -> None:
    for task, metrics in KEPT.items():
        for metric in metrics:
            for character, items in results.values(task, metric).items():
                keys = summary.items.setdefault(task, {}).setdefault(character, [])
                keys += [key for key in items if key not in keys]
                column = [_rounded(items.get(key)) for key in keys]
                _columns(summary, subject, seed, character)[f"{task}/{metric}"] = column


def _rounded(seeds: Mapping[Any, float] | None) -> float | None:
    return None if seeds is None else round(float(np.mean(list(seeds.values()))), 5)


def _columns(summary: Summary, subject: str, seed: str, character: str) -> Columns:
    return summary.numbers.setdefault(subject, {}).setdefault(seed, {}).setdefault(character, {})


# -- what stage 2 costs -------------------------------------------------------------------------------------


def _add_cost(summary: Summary) -> None:
    """For each character and seed where the published recipe learned at all: was ours as good in a third?"""
    for ours, published in RECIPES.items():
        reached: dict[str, dict[int, float]] = defaultdict(dict)
        for character, seed, goal, spent in _goals(summary, published):
            curve = _curve(summary, ours, character, seed)
            if curve:
                needed = [n for n, reward in curve if reward >= goal]
                reached[character][seed] = float(bool(needed) and 3 * needed[0] <= spent)
        for character, by_seed in reached.items():
            summary.items.setdefault(COST, {})[character] = [f"seed {seed}" for seed in summary.seeds]
            column = [by_seed.get(seed) for seed in summary.seeds]
            _columns(summary, ours, ANY, character)[f"{COST}/{WITHIN_A_THIRD}"] = column
        if reached:
            summary.rewarded[ours] = sorted({*summary.rewarded.get(ours, ()), WITHIN_A_THIRD})


def _goals(summary: Summary, published: str) -> Iterator[tuple[str, int, float, float]]:
    """(character, seed, last reward of the published recipe, evaluations it took)."""
    for character in summary.characters:
        for seed in summary.seeds:
            curve = _curve(summary, published, character, seed)
            if len(curve) > 1 and curve[-1][1] > curve[0][1]:
                yield character, seed, curve[-1][1], curve[-1][0]


def _curve(summary: Summary, variant: str, character: str, seed: int) -> Sequence[tuple[float, float]]:
    """(evaluations, mean reward by the published weights) of one run."""
    found = []
    for number in summary.rounds(variant):
        subject = f"{variant}@{number}"
        items = summary.values(subject, STAGE2, "published_reward").get(character, {})
        rewards = [seeds[seed] for seeds in items.values() if seed in seeds]
        if rewards:
            found.append((summary.evaluations[subject], float(np.mean(rewards))))
    return found


def title(subject: str) -> str:
    """A subject for readers."""
    variant, _, when = subject.partition("@")
    name = VARIANTS[variant].title if variant in VARIANTS else variant
    return f"{name}, {when} round" if when in ("first", "last") else f"{name}, round {when}" if when else name

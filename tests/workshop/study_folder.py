"""A study's folder with known numbers in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from unichar_jax.evaluation.results import Record, Results
from workshop.study.design import VARIANTS, Study, jobs

CHARACTERS, SEEDS = ("Pip", "Luna"), (0, 1)


def results(values: Mapping[tuple[str, str], list[float]], character: str, **fields) -> Results:
    """One record for every item: ``(task, metric) -> the items' values``."""
    records = [
        Record(task, character, f"{character}/{item}", 0, {metric: value}, f"{character} {item}")
        for (task, metric), column in values.items()
        for item, value in enumerate(column)
    ]
    return Results("a variant", "", tuple(records), **fields)


def folder_of(
    root: Path,
    numbers: Mapping[str, Mapping[tuple[str, str], list[float]]],
    *,
    characters=CHARACTERS,
    seeds=SEEDS,
) -> Path:
    """A study's folder whose jobs found these numbers, equal for all characters and seeds."""
    plan = {
        "settings": json.loads(json.dumps(Study(out=root).settings())),
        "versions": {"jax": "1"},
        "variants": [v for v in VARIANTS if v in numbers or v == "lora"],
        "characters": list(characters),
        "seeds": list(seeds),
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "study.json").write_text(json.dumps(plan))
    for job in jobs(list(numbers), characters, seeds):
        results(numbers[job.variant.name], job.character).save(root / "jobs" / job.place / "results.json")
    return root

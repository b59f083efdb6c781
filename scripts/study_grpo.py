"""Does stage 2 learn? Several seeds of several recipes on one mini-world character, judged by who is no reward.

    python scripts/study_grpo.py --base runs/sft-mini --prompts data/personalized_t2i/Pip --out runs/study

Every recipe starts from the same stage-1 run. At each evaluation the pictures of held-out prompts get the
recipe's own reward and the marks of the independent judge (identity, prompt following), their distance to the
others of the prompt (diversity), and whether they copy a training picture. ``study.jsonl`` keeps one line a
picture; what is there is not computed again. The table compares after with before, paired by prompt and seed,
and counts the model evaluations that each recipe needed to reach the reference's final reward: each seed's
rewards of all recipes are those of one scale only if the recipes share their reward terms, so the table uses
the first recipe's weights for all.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from unichar_jax.checkpoint import store
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.data.miniworld.texts import attributes_in_text
from unichar_jax.data.miniworld.world import SCENE_VALUES
from unichar_jax.data.rl_prompts import RLPrompt
from unichar_jax.evaluation.pictures import copies
from unichar_jax.evaluation.stats import Interval, paired_difference
from unichar_jax.scoring import mini
from unichar_jax.training.grpo import train
from unichar_jax.training.grpo.cost import round_cost
from unichar_jax.training.grpo.rewards import Scores
from unichar_jax.training.grpo.run import read_references

METRICS = ("reward", "identity", "prompt_following", "diversity", "copies")


@dataclasses.dataclass(frozen=True)
class Study:
    """Options of the study."""

    base: str
    """The stage-1 run that every recipe starts from."""
    prompts: Path
    """The character's folder of drawing prompts, with its pictures and attributes."""
    out: Path = Path("runs/study")
    configs: tuple[str, ...] = ("grpo-mini-reference", "grpo-mini")
    """Recipes; the first is what the others are measured against."""
    encoders: str = "mini"
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int | None = None


def observer(
    path: Path, study: Study, config: str, seed: int, per_round: float
) -> Callable[[int, Sequence[RLPrompt], np.ndarray, Scores], None]:
    """Writes a line for each held-out picture."""
    folder = Path(study.encoders)
    folder = folder if folder.is_dir() else presets.resource_dir("checkpoints") / study.encoders
    reader = mini.load_judge(folder)
    truth = json.loads(next(study.prompts.glob("*_attributes.json")).read_text())["look"]
    originals = read_references(study.prompts).pictures

    def observe(done: int, prompts: Sequence[RLPrompt], images: np.ndarray, scores: Scores) -> None:
        read = reader(jnp.asarray(images, jnp.float32) / 255)
        copied = copies(list(images), originals)
        texts = [p.text for p in prompts]
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        lines = []
        for i, text in enumerate(texts):
            others = [j for j, t in enumerate(texts) if t == text and j != i]
            scene = {n: v for n, v in attributes_in_text(text).items() if n in SCENE_VALUES}
            record: dict[str, Any] = dict(
                config=config,
                seed=seed,
                round=done,
                evaluations=done * per_round,
                prompt=text,
                picture=texts[:i].count(text),
                terms={n: float(v[i]) for n, v in scores.terms.items()},
                identity=_share(truth, read[i]),
                prompt_following=_share(scene, read[i]),
                diversity=float(np.sqrt(np.square(flat[others] - flat[i]).mean(axis=1)).mean()),
                copies=float(bool(copied[i])),
            )
            lines.append(json.dumps(record) + "\n")
        kept = [
            line
            for line in (path.read_text().splitlines(keepends=True) if path.exists() else [])
            if not _is_same(json.loads(line), config, seed, done)
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept + lines))
        temporary.replace(path)

    return observe


def _share(wanted: dict[str, str], read: dict[str, str]) -> float:
    return sum(read[n] == v for n, v in wanted.items()) / max(len(wanted), 1)


def _is_same(record: dict[str, Any], config: str, seed: int, done: int) -> bool:
    return (record["config"], record["seed"], record["round"]) == (config, seed, done)


def run(study: Study) -> Path:
    """Trains every recipe with every seed; an interrupted study goes on where it was."""
    study.out.mkdir(parents=True, exist_ok=True)
    path = study.out / "study.jsonl"
    model = store.load_config(study.base)
    for seed in study.seeds:
        for name in study.configs:
            cfg = presets.load(GRPOConfig, name)
            cfg = dataclasses.replace(
                cfg,
                base=study.base,
                prompts=str(study.prompts),
                encoders=study.encoders,
                run_dir=str(study.out / f"{name}-seed{seed}"),
                seed=seed,
                rounds=study.rounds or cfg.rounds,
            )
            cost = round_cost(cfg, model)
            train(cfg, observe=observer(path, study, name, seed, cost.draw + cost.learn))
    return path


# -- the table ----------------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]], study: Study) -> str:
    """Markdown: changes with 95 % intervals, and evaluations to the reference's final reward."""
    weights = {t.name: t.weight for t in presets.load(GRPOConfig, study.configs[0]).reward}
    for r in records:
        r["reward"] = sum(w * r["terms"][n] for n, w in weights.items() if n in r["terms"])
    lines = ["| recipe | metric | before | after | change (95 %) |", "|---|---|---|---|---|"]
    for config in study.configs:
        of_config = [r for r in records if r["config"] == config]
        last = max(r["round"] for r in of_config)
        for metric in METRICS:
            before, after = (_values(of_config, metric, n) for n in (0, last))
            change = paired_difference(before, after)
            lines.append(
                f"| {config} | {metric} | {_mean(before):.3f} | {_mean(after):.3f} | {_shown(change)} |"
            )
    lines += ["", "| recipe | seed | model evaluations to the first recipe's final reward |", "|---|---|---|"]
    for seed in study.seeds:
        goal = max(_curve(records, study.configs[0], seed).items())[1]
        for config in study.configs:
            reached = [n for n, reward in sorted(_curve(records, config, seed).items()) if reward >= goal]
            lines.append(f"| {config} | {seed} | {f'{reached[0]:,.0f}' if reached else 'not reached'} |")
    return "\n".join(lines)


def _values(records: Sequence[dict[str, Any]], metric: str, round_: int) -> dict[str, Any]:
    out: dict[str, dict[Any, float]] = defaultdict(dict)
    for r in records:
        if r["round"] == round_:
            out[r["prompt"]][r["seed"], r["picture"]] = r[metric]
    return {"character": out}


def _mean(values: dict[str, Any]) -> float:
    return float(np.mean([v for seeds in values["character"].values() for v in seeds.values()]))


def _shown(change: Interval | None) -> str:
    if change is None or change.low is None:
        return "unknown"
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _curve(records: Sequence[dict[str, Any]], config: str, seed: int) -> dict[float, float]:
    """Evaluations so far -> mean reward."""
    points: dict[float, list[float]] = defaultdict(list)
    for r in records:
        if r["config"] == config and r["seed"] == seed:
            points[r["evaluations"]].append(r["reward"])
    return {n: float(np.mean(v)) for n, v in points.items()}


def main(study: Study) -> None:
    path = run(study)
    text = table([json.loads(line) for line in path.read_text().splitlines()], study)
    (study.out / "study.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Study))

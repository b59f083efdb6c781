"""Measures how full packed sequences get, how exactly tasks keep their weights, and how long samples wait.

Plans sequences and loads none, so it is quick and needs no accelerator. Without ``--tasks`` a recipe is measured; each
line of the result is one mixture. Waiting is counted from the sequence a draw would be in if nothing looked ahead.
Example, for all characters together and then for each alone:

    python scripts/bench_packing.py --data data/personalized_data --each
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import ModelConfig, model_preset
from unichar_jax.data.loader import Loader, make_loader, read_samples
from unichar_jax.data.rolescape import find_characters
from unichar_jax.data.tasks import TASKS
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from unichar_jax.errors import UserError


def no_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stands for the autoencoder, whose numbers no plan asks for."""
    tokens = np.zeros((len(images), images.shape[1] * images.shape[2] // 256, 1), np.float32)
    return tokens, tokens


def measure(loader: Loader, sequences: int) -> dict[str, Any]:
    """Capacities, fill, frequencies and waits of the loader's first sequences."""
    planner, keys = loader.planner, loader.mixture.keys
    used, counts, placed = np.zeros(3), Counter[str](), {}
    for n in range(sequences):
        for draw in planner.sequence(n):
            used += planner.sizes[draw.source][draw.sample]
            counts[keys[draw.source].task] += 1
            placed[draw.source, draw.number] = n
    total = sum(counts.values())
    weights = loader.mixture.task_weights()
    order = planner.schedule.draws(planner.schedule.start, total)
    waits = (placed[d.source, d.number] - sequences * i // total for i, d in enumerate(order))
    off = {task: counts[task] - weight * total for task, weight in weights.items()}
    worst = max(off, key=lambda task: abs(off[task] / (weights[task] * total)))
    return {
        "capacities": list(planner.capacities),
        "tokens_per_row": planner.capacities.total,
        "fill": round(float(used.sum()) / (sequences * planner.capacities.total), 4),
        "fill_by_stream": [
            round(float(n) / (sequences * room), 3) if room else None
            for n, room in zip(used, planner.capacities, strict=True)
        ],
        "samples": total,
        "worst_frequency": {
            "task": worst,
            "wanted": round(weights[worst] * total, 2),
            "seen": counts[worst],
            "error": round(abs(off[worst]) / (weights[worst] * total), 4),
        },
        "longest_wait": max(waits),
        "weights": {task: round(weight, 4) for task, weight in weights.items()},
        "left_out": len(loader.left_out),
    }


def tokenizer_for(name: str | None, cfg: DataConfig, folder: Path) -> tuple[Tokenizer, ModelConfig]:
    """The named tokenizer, or a BPE of about Qwen2's fineness trained on the characters' own texts."""
    model = model_preset("bagel-7b")
    if name:
        return load_tokenizer(name, model), model
    everything = dataclasses.replace(cfg, tasks=dict.fromkeys(TASKS, 1.0), character_weights={})
    texts = [part.text for sample in read_samples(everything) for part in sample.parts]
    tokenizer = train_tokenizer(texts, 8000, folder)
    return tokenizer, dataclasses.replace(model, special_tokens=tokenizer.special)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder that holds train/<NAME>/")
    parser.add_argument("--tokenizer", help="model directory; without one, a BPE is trained on the texts")
    parser.add_argument("--characters", nargs="*", default=[], help="folder names; all by default")
    parser.add_argument("--each", action="store_true", help="measure each character alone too")
    parser.add_argument("--recipes", nargs="*", default=["default"])
    parser.add_argument("--tasks", type=json.loads, default={}, help='own weights, such as {"vqa": 1}')
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    together = tuple(args.characters)
    alone = together or tuple(folder.name for folder in find_characters(Path(args.data), "train"))
    cfg = DataConfig(path=args.data, characters=together, seed=args.seed, cache_dir="")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, model = tokenizer_for(args.tokenizer, cfg, Path(temporary))
        for recipe in args.recipes if not args.tasks else [""]:
            for who in (together, *(((name,) for name in alone) if args.each else ())):
                one = dataclasses.replace(cfg, characters=who, recipe=recipe or "default", tasks=args.tasks)
                loader = make_loader(one, model, tokenizer, no_moments)
                result = measure(loader, args.sequences)
                about = {"mixture": recipe or args.tasks, "characters": who or "all"}
                print(json.dumps(about | result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))

"""Measures how many packed sequences a second the loader gives from a warm cache, and how full they are.

The pictures' moments come from a stand-in for the autoencoder: with a warm cache the real one is never called. One
warm-up window is not timed. Example:

    python scripts/bench_loader.py --data data/personalized_data --tokenizer models/BAGEL-7B-MoT --workers 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import model_preset
from unichar_jax.data.loader import make_loader, read_samples
from unichar_jax.data.tokenizer import load_tokenizer, train_tokenizer
from unichar_jax.errors import UserError


def blank_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero moments of BAGEL's shape: 64 values for each 16 x 16 pixels."""
    count, height, width, _ = images.shape
    tokens = np.zeros((count, height * width // 256, 64), np.float32)
    return tokens, tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder that holds train/<NAME>/")
    parser.add_argument("--tokenizer", help="model directory; without one, a BPE is trained on the texts")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=200)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cfg = DataConfig(
            path=args.data, recipe=args.recipe, workers=args.workers, cache_dir=str(folder / "cache")
        )
        model = model_preset("bagel-7b")
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer, model)
        else:
            texts = [part.text for sample in read_samples(cfg) for part in sample.parts]
            tokenizer = train_tokenizer(texts, 8000, folder / "tokenizer")
            model = dataclasses.replace(model, special_tokens=tokenizer.special)
        began = time.perf_counter()
        loader = make_loader(cfg, model, tokenizer, blank_moments)
        ready = time.perf_counter() - began
        print(loader.describe(), file=sys.stderr)

        for _ in range(cfg.window):
            next(loader)
        filled = 0
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.sequences):
            batch = next(loader)
            filled += sum(
                int((stream.meta.segment > 0).sum()) for stream in (batch.text, batch.vit, batch.latent)
            )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        loader.close()
    tokens = args.sequences * loader.capacities.total
    result = {
        "workers": args.workers,
        "sequences_per_second": round(args.sequences / seconds, 1),
        "tokens_per_row": loader.capacities.total,
        "fill": round(filled / tokens, 4),  # less dropped prompts
        "prepare_seconds": round(ready, 1),
        "cpu_seconds_in_main": round(cpu, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))

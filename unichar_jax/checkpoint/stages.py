"""The adapters of both stages as one folder: a run's, and those of the runs that it started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unichar_jax.checkpoint import footing, runs, store
from unichar_jax.checkpoint.lora import adapters_in, base_of, merged, open_step, save
from unichar_jax.models import lora


def export(
    run: str | Path, dst: str | Path, *, dtype: Any = None, character: Mapping[str, str] | None = None
) -> int:
    """Writes the adapters of a run and of the runs below it as one folder, for the base that they all stand on.

    Sums of products are products of what is set side by side: ``A1 B1 + A2 B2 = [A1 A2] [B1; B2]``. So the ranks
    add up, and nothing is approximated. Arguments as ``export``.

    Returns:
      How many stages the folder holds.

    Raises:
      UserError: a run of the chain has no adapters, or is not the one that the next was trained on.
    """
    stages: list[dict[str, np.ndarray]] = []
    at, above, seen = Path(run), None, set[Path]()
    while True:
        step = runs.resolve(at)
        weights = open_step(step, runs.weights_item(step))
        home = store.config_folder(step)
        cfg, base = store.load_config(home), base_of(home)
        if above is not None:
            footing.require(above, footing.of_weights(merged(weights), cfg), f"{at}, on which it was trained")
        stages.insert(0, adapters_in(weights))
        above = footing.of_weights(weights, cfg)
        seen.add(home.resolve())
        at = runs.read_info(home).path(base)
        if not (at / store.CONFIG_FILE).is_file() and at.parent.name != "checkpoints":
            break
        home = store.config_folder(at)
        if not runs.is_run(home) or home.resolve() in seen:
            break
    names = sorted({n for s in stages for n in s})
    joined = {
        n: np.concatenate([s[n] for s in stages if n in s], axis=int(n.endswith(lora.A))) for n in names
    }
    save(dst, joined, cfg, base=base, dtype=dtype, footing=above, character=character)
    return len(stages)

"""From a run's folder to what works with it: an engine, drawing settings, the character it was trained on.

A run says everything in its ``config.json``; a stage that starts from another run points there with ``base``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unichar_jax.checkpoint import runs

if TYPE_CHECKING:
    from unichar_jax.sampling.engine import Engine
    from unichar_jax.sampling.flow import FlowSettings


def load_engine(path: Path, dtype: str = "float32") -> Engine:
    """The engine of a run (its latest step, averaged weights if kept) or of a model directory."""
    from unichar_jax.models.decoder import Compute
    from unichar_jax.sampling.engine import Engine

    step = runs.resolve(path)
    return Engine.load(step, compute=Compute(dtype=dtype), item=runs.weights_item(step))


def is_small(path: Path) -> bool:
    """Whether the model draws with few latents, as those for laptops do."""
    from unichar_jax.checkpoint import store

    return store.load_config(runs.resolve(path)).max_latent_size <= 16


def flow_settings(steps: int, guidance: float, run: Path) -> FlowSettings:
    """Drawing settings; a small model's few latents want no resolution shift."""
    from unichar_jax.sampling.flow import FlowSettings, Guidance

    small = is_small(run)
    return FlowSettings(
        steps + 1, 1.0 if small else 3.0, Guidance(guidance, interval=(0.0, 1.0) if small else (0.4, 1.0))
    )


def run_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run; empty for a model directory."""
    path = run / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if runs.is_run(run) else {}


def lineage(run: Path) -> list[dict[str, Any]]:
    """Configurations of a run and of the runs it started from, the latest first."""
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while (config := run_config(run)) and run.resolve() not in seen:
        found.append(config)
        seen.add(run.resolve())
        run = Path(str(config.get("base", "")))
        run = run.parent.parent if run.parent.name == "checkpoints" else run  # a step of a run
    return found


def training_data(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The data folder that a run was trained on, and its characters; (None, ()) if that is not known."""
    for config in lineage(run):
        data = config.get("data") or {}
        if data.get("path"):
            return Path(data["path"]).expanduser(), tuple(data.get("characters") or ())
    return None, ()

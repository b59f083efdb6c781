"""``unichar plan CONFIG --topology v5e:8x8``: compiles the training step for a pod without the pod."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unichar_jax.cli.main import parses_itself
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from unichar_jax.config.model import ModelConfig

USAGE = (
    "unichar plan CONFIG --topology v5e:8x8|v5p:2x2x2|v6e:4x4|h200:1x1x8 [--json FILE] [--field value ...]"
)


@parses_itself
def plan(args: list[str]) -> int:
    """Exit code 0 if the run fits, 3 if it does not."""
    parser = argparse.ArgumentParser(prog="unichar plan", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args(args)
    if not rest or (own.topology is None and "--help" not in rest):
        raise UserError(f"which experiment, and for which hardware? usage: {USAGE}")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run, and no accelerator is to be taken
    from unichar_jax.cli.train import parse
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.plan.sft import make_plan, report
    from unichar_jax.plan.topology import Topology

    cfg = parse(SFTConfig, rest, "unichar plan CONFIG", "sft")
    topology = Topology.parse(own.topology)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result = make_plan(cfg, sizes(cfg.base, say), topology, say)
    if own.json:
        own.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    print(report(result))
    return 0 if result.fits else 3


def sizes(base: str, say: Callable[[str], None]) -> ModelConfig:
    """The model's sizes: of the base if it is here, else of BAGEL-7B-MoT, and then it is said."""
    from unichar_jax.checkpoint import store
    from unichar_jax.config import presets
    from unichar_jax.config.model import MODEL_PRESETS, model_preset

    for folder in (Path(base), presets.resource_dir("checkpoints") / base):
        if (folder / store.CONFIG_FILE).is_file():
            return store.load_config(folder)
    if base in MODEL_PRESETS:
        return model_preset(base)
    say(f"base '{base}' is not on this machine: planning with the sizes of bagel-7b")
    return model_preset("bagel-7b")

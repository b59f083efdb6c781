"""``unichar plan WHAT --topology v5e:8x8``: compiles a job for hardware that is not here.

WHAT is an experiment of either stage, ``draw``, or ``chat``: memory, work, and the least time it can take.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from unichar_jax.cli.main import parses_itself
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from unichar_jax.config.model import ModelConfig
    from unichar_jax.plan.topology import Topology

USAGE = "unichar plan CONFIG|draw|chat --topology v5e:8x8|h100:1x1x8|... [--json FILE] [--out DIR] [--field value ...]"


@parses_itself
def plan(args: list[str]) -> int:
    """Exit code 0 if the job fits, 3 if it does not."""
    parser = argparse.ArgumentParser(prog="unichar plan", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder of records, one JSON file for each kind of device")
    own, rest = parser.parse_known_args(args)
    if not rest or (own.topology is None and "--help" not in rest):
        raise UserError(f"what, and for which hardware? usage: {USAGE}")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run, and no accelerator is to be taken
    from unichar_jax.plan.topology import Topology

    result, text = planned(rest, lambda: Topology.parse(own.topology))
    if own.out:
        from unichar_jax.plan import bench

        command = shlex.join(["unichar", "plan", rest[0], "--topology", own.topology, *rest[1:]])
        say(f"recorded in {bench.keep(bench.compiled(result), command, own.out)}")
    if own.json:
        own.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    print(text)
    return 0 if result.fits else 3


def planned(rest: list[str], topology: Callable[[], Topology]) -> tuple[Any, str]:
    """The plan that the words ask for, and its report."""
    from unichar_jax.cli.train import parse
    from unichar_jax.config import presets
    from unichar_jax.config.grpo import GRPOConfig
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.plan import sampling, sft, stage2, workload

    inference: dict[str, tuple[Any, Any]] = {
        "draw": (sampling.Drawing, sampling.plan_drawing),
        "chat": (sampling.Talking, sampling.plan_talking),
    }
    if rest[0] in inference:
        kind, make = inference[rest[0]]
        job = tyro.cli(kind, args=rest[1:], prog=f"unichar plan {rest[0]}")
        # It computes as the preset of training does, and has nothing to recompute.
        compute = dataclasses.replace(presets.load(SFTConfig, "sft-bagel-7b").compute, remat="none")
        made = make(job, sizes(job.base, say), compute, topology())
        return made, workload.report(made)
    if not rest[0].startswith("-") and presets.is_of(GRPOConfig, rest[0]):
        cfg = parse(GRPOConfig, rest, "unichar plan CONFIG", "grpo")
        round_ = stage2.plan_round(cfg, sizes(cfg.base, say), topology())
        return round_, workload.report(round_)
    cfg = parse(SFTConfig, rest, "unichar plan CONFIG", "sft")
    step = sft.make_plan(cfg, sizes(cfg.base, say), topology(), say)
    return step, sft.report(step)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sizes(base: str, say: Callable[[str], None]) -> ModelConfig:
    """The model's sizes: of the base if it is here, of the base of the preset that makes it, else of BAGEL-7B-MoT;
    what a start would refuse is said."""
    from unichar_jax.checkpoint import store
    from unichar_jax.checkpoint.remote import is_remote
    from unichar_jax.config import presets
    from unichar_jax.config.model import model_preset
    from unichar_jax.training.start import find_base

    if not is_remote(base):  # a plan fetches nothing
        try:
            return find_base(base).cfg
        except UserError as error:
            if (start := presets.runs().get(base, base)) != base:
                return sizes(start, say)
            say(f"a start would end here: {error}")
            if (Path(base) / store.CONFIG_FILE).is_file():
                return store.load_config(base)
    say(f"base '{base}' is not on this machine: planning with the sizes of bagel-7b")
    return model_preset("bagel-7b")

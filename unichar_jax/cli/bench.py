"""``unichar bench CONFIG``: times the training step here; with ``--topology``, what can be told without hardware."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path

from unichar_jax.cli.main import parses_itself
from unichar_jax.errors import UserError

USAGE = (
    "unichar bench CONFIG [--topology v5e:8x8] [--steps 10] [--layers N] [--out FOLDER] [--field value ...]"
)


@parses_itself
def bench(args: list[str]) -> int:
    """Exit code 0 if the step ran, or fits."""
    parser = argparse.ArgumentParser(prog="unichar bench", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", help="compile for this and time nothing")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--layers", type=int, help="of the decoder, where not all of them fit")
    parser.add_argument("--out", type=Path, help="folder of records, one JSON file for each kind of device")
    own, rest = parser.parse_known_args(args)
    if not rest:
        raise UserError(f"which experiment? usage: {USAGE}")
    if own.steps < 1 or (own.layers is not None and own.layers < 1):
        raise UserError(f"--steps {own.steps}, --layers {own.layers}: expected positive numbers.")
    if own.topology and own.layers:
        raise UserError("--layers with --topology: a compiled record is of the whole model; leave one out.")
    if own.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run
    from unichar_jax.cli.plan import sizes
    from unichar_jax.cli.train import parse
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.plan import bench as bench_lib
    from unichar_jax.plan import sft as plan_lib
    from unichar_jax.plan.topology import Topology

    cfg = parse(SFTConfig, rest, "unichar bench CONFIG", "sft")
    topology = Topology.parse(own.topology) if own.topology else None

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    model = sizes(cfg.base, say)
    command = ["unichar", "bench", *rest]
    if own.layers:
        decoder = dataclasses.replace(model.decoder, num_layers=own.layers)
        model = dataclasses.replace(model, decoder=decoder)
        command += ["--layers", str(own.layers)]
    if topology is None:
        record = bench_lib.measure(cfg, model, own.steps, say)
        print(bench_lib.report(record))
    else:
        plan = plan_lib.make_plan(cfg, model, topology, say)
        record = bench_lib.compiled(plan)
        command = ["unichar", "plan", rest[0], "--topology", topology.text, *rest[1:]]
        print(plan_lib.report(plan))
    if own.out:
        say(f"recorded in {bench_lib.keep(record, shlex.join(command), own.out)}")
    return 0 if topology is None or plan.fits else 3

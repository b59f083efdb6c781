"""Peak memory and collectives of the training step as the TPU compiler makes it: a regression changes a file.

Each preset of stage 1 is compiled at the debug model's size for the topologies that the documents name. One of them
is compiled by the default run, all of them by the slow one.

python -m tests.plan.test_golden_programs      writes the file anew, after a change that was meant
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from unichar_jax.config import presets
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import SFTConfig
from unichar_jax.plan.sft import make_plan
from unichar_jax.plan.topology import Topology

GOLDEN = Path(__file__).parent / "golden_programs.json"
PRESETS = [name for name in presets.available() if name.startswith("sft-") and "bagel" in name]
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:4x4")
CAPACITIES = (256, 256, 128)
FIRST = ("sft-bagel-7b", "v5e:2x4")
CASES = [(name, topology) for name in PRESETS for topology in TOPOLOGIES]

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, which runs on a CPU host: pip install 'unichar-jax[tpu]'",
)


def compiled(name: str, topology: str) -> dict[str, Any]:
    """What the file says of one program: bytes of one device and of its host, and how often each collective runs."""
    cfg = presets.load(SFTConfig, name)
    data = dataclasses.replace(cfg.data, capacities=CAPACITIES)
    plan = make_plan(dataclasses.replace(cfg, data=data), model_preset("debug"), Topology.parse(topology))
    assert plan.memory is not None and (plan.kernel, plan.proven) == ("splash", True)
    return {
        "device": plan.memory.device,
        "temporaries": plan.memory.temporaries,
        "host": plan.memory.host,
        "collectives": {c.kind: c.count for c in plan.collectives},
        "sent": sum(c.traffic for c in plan.collectives),
    }


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text("utf-8"))


def libtpu() -> str:
    return importlib.metadata.version("libtpu")


def check(name: str, topology: str) -> None:
    if golden()["libtpu"] != libtpu():
        pytest.skip(f"the file is of libtpu {golden()['libtpu']}, and this is {libtpu()}")
    found, expected = compiled(name, topology), golden()[f"{name} {topology}"]
    assert found["collectives"] == expected["collectives"]
    assert found["sent"] == pytest.approx(expected["sent"], rel=1e-6)
    for kind in ("device", "temporaries", "host"):
        assert found[kind] == pytest.approx(expected[kind], rel=0.01), kind


@needs_compiler
def test_the_step_for_a_tpu_slice_is_the_one_on_file():
    check(*FIRST)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "topology"), [case for case in CASES if case != FIRST])
def test_every_preset_and_topology_is_the_one_on_file(name, topology):
    check(name, topology)


def test_the_file_has_every_preset_and_topology():
    assert golden().keys() - {"libtpu"} == {f"{name} {topology}" for name, topology in CASES}


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    programs = {f"{name} {topology}": compiled(name, topology) for name, topology in CASES}
    GOLDEN.write_text(json.dumps({"libtpu": libtpu()} | programs, indent=1) + "\n")

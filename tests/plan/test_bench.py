"""Timing the step: what a record holds, that it is kept once, and that a full row is what it says."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from unichar_jax.cli import main as cli
from unichar_jax.config.model import model_preset
from unichar_jax.errors import UserError
from unichar_jax.models import flops
from unichar_jax.plan import bench
from unichar_jax.plan.sft import _work

MODEL = model_preset("debug")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small step, timed twice by the command on the eight simulated devices."""
    out = tmp_path_factory.mktemp("bench")
    words = ["bench", "sft-debug", "--steps", "2", "--layers", "1", "--data.capacities", "32", "0", "16"]
    for _ in range(2):
        assert cli.main([*words, "--data.rows-per-device", "1", "--out", str(out)]) == 0
    return out


def test_a_record_of_the_same_command_is_replaced(folder):
    (path,) = folder.iterdir()
    (record,) = json.loads(path.read_text())
    assert path.name == "cpu.json" and record["mark"] == "measured"
    assert record["command"].startswith("unichar bench sft-debug ") and record["command"].endswith(
        "--layers 1"
    )
    assert (record["layers"], record["rows"], record["capacities"]) == (1, 8, [32, 0, 16])


def test_speed_follows_from_the_time(folder):
    (record,) = json.loads((folder / "cpu.json").read_text())
    assert 0 < record["fastest_seconds"] <= record["step_seconds"]
    assert record["tokens_per_s"] == pytest.approx(48 / record["step_seconds"])
    assert record["mfu"] is None and np.isfinite(record["loss"])  # the table has no peak of this device
    assert "of the peak" in bench.report(record)
    assert " 25.0%" in bench.report(record | {"mfu": 0.25})


def test_a_full_row_is_full():
    text, vit, latent = 40, 24, 16
    batch = bench.full_batch(MODEL, (text, vit, latent), 2)
    work = flops.Work(*jax.jit(lambda b: dataclasses.astuple(flops.work_of(b)))(batch))
    assert (work.text, work.vit, work.latent, work.labelled) == (80, 48, 32, 80)
    # Causal text; the image sees the text and itself; so does the noised one, and the image before it.
    one = text * (text + 1) / 2 + vit * (text + vit) + latent * (text + vit + latent)
    assert (work.pairs, work.vit_pairs) == (2 * one, 2 * vit**2)
    # The plan's formula takes what is looked at as causal; it stays below.
    assumed = _work((text, vit, latent), 2)
    assert assumed.pairs < work.pairs
    assert flops.forward(MODEL, assumed) == pytest.approx(float(flops.forward(MODEL, work)), rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which experiment"),
        (["sft-debug", "--steps", "0"], "positive"),
        (["sft-debug", "--topology", "v5e:2x4", "--layers", "2"], "leave one out"),
    ],
)
def test_mistakes_are_explained(words, message):
    from unichar_jax.cli.bench import bench as command

    with pytest.raises(UserError, match=message):
        command(words)

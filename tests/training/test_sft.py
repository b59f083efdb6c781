"""Unified-SFT end to end on a small character: train, stop, resume, load."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from unichar_jax.checkpoint import runs, store
from unichar_jax.config import presets
from unichar_jax.config.compute import MeshConfig
from unichar_jax.config.train import SaveConfig, SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.training import sft
from unichar_jax.training.loop import Preempted
from unichar_jax.training.metrics import read


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Runs here use one device; the sharded step has tests of its own."""
    whole = sft.mesh_lib.make_mesh
    monkeypatch.setattr(sft.mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:1]))


def _config(root: Path, run: Path, steps: int, every: int) -> SFTConfig:
    cfg = presets.load(SFTConfig, "sft-debug")
    data = dataclasses.replace(cfg.data, path=str(root), rows_per_device=1)
    return dataclasses.replace(cfg, data=data, run_dir=str(run), steps=steps, save=SaveConfig(every=every))


def _weights(run: Path, item: str) -> dict[str, np.ndarray]:
    from unichar_jax.models import params

    model = store.load_model(runs.resolve(run), item=item)
    return {k: np.asarray(v) for k, v in params.flat(model).items()}


def test_resumed_run_is_the_run(tiny_root, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sft.train(_config(tiny_root, whole, 20, 20), quiet=True)
    sft.train(_config(tiny_root, parts, 10, 10), quiet=True)
    sft.train(_config(tiny_root, parts, 20, 10), quiet=True)

    assert read(whole / "metrics.jsonl") == read(parts / "metrics.jsonl")
    for item in ("weights", "ema"):
        a, b = _weights(whole, item), _weights(parts, item)
        assert all(np.array_equal(a[k], b[k]) for k in a), item


def test_sigterm_saves_and_the_run_goes_on(tiny_root, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    stop = lambda step, state: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(Preempted):
        sft.train(_config(tiny_root, run, 6, 100), hooks=[(3, stop)], quiet=True)
    stopped = runs.complete_steps(run)[-1]
    assert stopped in (3, 4)
    sft.train(_config(tiny_root, run, 6, 100), quiet=True)
    sft.train(_config(tiny_root, whole, 6, 100), quiet=True)
    assert read(run / "metrics.jsonl") == read(whole / "metrics.jsonl")


def test_the_run_is_a_model_directory(tiny_root, tmp_path):
    run = sft.train(_config(tiny_root, tmp_path / "run", 1, 1), quiet=True)
    assert store.load_config(run).decoder.num_layers == 2
    store.load_autoencoder(run)
    assert presets.from_dict(SFTConfig, runs.read_info(run).settings) == _config(tiny_root, run, 1, 1)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_root, tmp_path):
    cfg = _config(tiny_root, tmp_path / "run", 6, 2)
    sft.train(dataclasses.replace(cfg, steps=2), quiet=True)
    broken = dataclasses.replace(cfg.optimizer, learning_rate=1e30)
    with pytest.raises(UserError, match=r"step \d+: .*not finite"):
        sft.train(dataclasses.replace(cfg, optimizer=broken), quiet=True, allow_changes=True)
    assert runs.complete_steps(tmp_path / "run")[0] == 2


def test_unknown_base_is_explained(tiny_root, tmp_path):
    cfg = dataclasses.replace(_config(tiny_root, tmp_path / "run", 1, 1), base="mimi")
    with pytest.raises(UserError, match="base 'mimi'"):
        sft.train(cfg, quiet=True)

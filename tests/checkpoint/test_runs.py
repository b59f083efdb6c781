"""From what a user names to the weights of a run."""

from __future__ import annotations

import pytest

from unichar_jax.checkpoint import convert, runs, store
from unichar_jax.config.model import model_preset
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel


def test_a_relative_path_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    cfg = model_preset("debug")
    model, autoencoder = (params.initialize(m, 0) for m in (UnifiedModel(cfg), Autoencoder(cfg.autoencoder)))
    store.write_bagel(tmp_path / "torch", model, cfg, autoencoder)
    convert.convert(tmp_path / "torch", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    loaded = store.load_model("model")
    assert params.count(loaded) == params.count(UnifiedModel(cfg))


def test_resolve(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="not a directory"):
        runs.resolve(run)
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert runs.resolve(run) == run  # no config.json: a model directory as it is
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no complete checkpoint"):
        runs.resolve(run)
    for step in (5, 10, 20):
        (run / "checkpoints" / str(step)).mkdir()
    for step in (5, 10):
        (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
    monkeypatch.chdir(tmp_path)
    assert runs.resolve("run") == run / "checkpoints" / "10"

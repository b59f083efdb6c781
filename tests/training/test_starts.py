"""A start that is refused says what is wrong and changes nothing; one that goes on is the run that was there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from unichar_jax.checkpoint import runs, store
from unichar_jax.cli import doctor
from unichar_jax.cli.main import main
from unichar_jax.cli.plan import sizes
from unichar_jax.config import presets
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import SaveConfig, SFTConfig
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.parallel.mesh import MeshConfig
from unichar_jax.training import sft
from unichar_jax.training.start import find_base

CFG = model_preset("debug")


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    whole = mesh_lib.make_mesh
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:1]))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_debug_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "base"
    store.write_bagel(
        folder,
        params.initialize(UnifiedModel(CFG), 0),
        CFG,
        params.initialize(Autoencoder(CFG.autoencoder), 0),
        tokenizer_files_from=tmp_path / "tokenizer",
    )
    return folder


def _config(root: Path, run: Path, **fields: object) -> SFTConfig:
    cfg = presets.load(SFTConfig, "sft-debug")
    data = dataclasses.replace(cfg.data, path=str(root), rows_per_device=1)
    given = dataclasses.replace(cfg, data=data, run_dir=str(run), steps=2, save=SaveConfig(every=1))
    return dataclasses.replace(given, **fields)


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["ema.safetensors"], "no weights"),
        (["ae.safetensors"], "no ae.safetensors"),
        (["tokenizer.json", "vocab.json", "merges.txt"], "no tokenizer"),
    ],
)
def test_a_base_that_lacks_something_starts_nothing(base, tiny_root, tmp_path, files, named):
    """Training, plan and doctor say the same."""
    for name in files:
        (base / name).unlink()
    cfg = _config(tiny_root, tmp_path / "run", base=str(base))
    with pytest.raises(UserError, match=named) as error:
        sft.train(cfg, quiet=True)
    assert "hf download" in str(error.value) and "--base debug" in str(error.value)
    assert not (tmp_path / "run").exists()
    told: list[str] = []
    assert sizes(str(base), told.append) == CFG
    assert str(error.value) in told[0]
    assert doctor.first_batch(cfg, tiny_root).found == str(error.value)


def test_random_weights_are_what_a_presets_name_asks_for():
    assert find_base("debug").weights is None
    with pytest.raises(UserError, match="base 'debgu'"):
        find_base("debgu")


def test_a_refused_start_leaves_a_finished_run_as_it_was(base, tiny_root, tmp_path):
    run = sft.train(_config(tiny_root, tmp_path / "run", base=str(base)), quiet=True)
    before = _everything(run)
    wrong = _config(tiny_root, run, base=str(base))
    broken = tmp_path / "broken"
    (broken / "train").mkdir(parents=True)
    for cfg in (
        dataclasses.replace(wrong, base="mimi"),
        dataclasses.replace(wrong, data=dataclasses.replace(wrong.data, path=str(broken))),
        dataclasses.replace(wrong, data=dataclasses.replace(wrong.data, look_max=9_800)),
        dataclasses.replace(wrong, seed=1),
    ):
        with pytest.raises(UserError):
            sft.train(cfg, quiet=True)
        assert _everything(run) == before


def test_what_differs_is_told_field_by_field(tiny_root, tmp_path):
    run = sft.train(_config(tiny_root, tmp_path / "run"), quiet=True)
    cfg = _config(tiny_root, run, seed=5, ce_weight=0.5, log_every=3, steps=3)
    changed = dataclasses.replace(cfg.optimizer, learning_rate=1e-4)
    recipe = dataclasses.replace(cfg.data, text_dropout=0.2)
    cfg = dataclasses.replace(cfg, optimizer=changed, data=recipe)
    with pytest.raises(UserError) as error:
        sft.train(cfg, quiet=True)
    told = str(error.value)
    for line in (
        "seed: 4396 then, 5 now",
        "ce_weight: 0.25 then, 0.5 now",
        "optimizer.learning_rate: 0.001 then, 0.0001 now",
        "data.text_dropout: 0.1 then, 0.2 now",
        "--allow-changes",
        "at step 2",
    ):
        assert line in told
    assert "log_every" not in told and "steps:" not in told and "save" not in told
    sft.train(cfg, quiet=True, allow_changes=True)
    assert runs.complete_steps(run)[-1] == 3
    assert runs.read_info(run).settings["seed"] == 5


@pytest.mark.slow
def test_devices_may_change_at_an_equal_global_batch(tiny_root, tmp_path):
    cfg = _config(tiny_root, tmp_path / "run")
    two = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, rows_per_device=2))
    sft.train(two, quiet=True)
    longer = dataclasses.replace(cfg, steps=3, accumulate=2)
    sft.train(longer, quiet=True)
    with pytest.raises(UserError, match="accumulate: 2 then, 1 now"):
        sft.train(dataclasses.replace(longer, accumulate=1, steps=4), quiet=True)


def test_a_base_may_move(base, tiny_root, tmp_path):
    """Its weights are known again in another folder, and other weights are not taken for them."""
    run = sft.train(_config(tiny_root, tmp_path / "run", base=str(base)), quiet=True)
    moved = base.rename(tmp_path / "moved")
    sft.train(_config(tiny_root, run, base=str(moved), steps=3), quiet=True)
    converted = tmp_path / "converted"
    assert main(["convert", str(moved), str(converted)]) == 0
    assert find_base(str(converted)).fingerprint == find_base(str(moved)).fingerprint
    assert find_base(str(run)).fingerprint != find_base(str(moved)).fingerprint
    with pytest.raises(UserError, match="base: "):
        sft.train(_config(tiny_root, run, base="debug", steps=4), quiet=True)


def test_the_other_stage_is_another_folder(tiny_root, tmp_path):
    from unichar_jax.config.grpo import GRPOConfig
    from unichar_jax.training import grpo

    run = sft.train(_config(tiny_root, tmp_path / "run"), quiet=True)
    before = _everything(run)
    with pytest.raises(UserError, match="a run of sft is there"):
        grpo.train(GRPOConfig(base="debug", run_dir=str(run), prompts=str(tmp_path)), quiet=True)
    assert _everything(run) == before

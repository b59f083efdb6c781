"""``unichar evaluate``: what it takes, what it leaves in its folder; once with a real (random) model."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_json
from tests.evaluation.conftest import Scripted
from unichar_jax.app import engines, evaluate
from unichar_jax.app.evaluate import Evaluation, run_evaluation
from unichar_jax.app.sheet import contact_sheet
from unichar_jax.cli.main import main
from unichar_jax.config.model import model_preset
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Results


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """Two model folders, whose models answer by rule."""
    asked = []

    def subject(cfg, engine, path):
        made = Scripted(fingerprint=path.name)
        asked.append(made)
        return made

    monkeypatch.setattr(engines, "load_engine", lambda path, dtype, weights=None: nullcontext())
    monkeypatch.setattr(engines, "is_small", lambda path: False)
    monkeypatch.setattr(evaluate, "_subject", subject)
    for name in ("base", "sft"):
        (tmp_path / name).mkdir()
    return tmp_path, asked


def test_leaves_tables_sheet_and_report(stubbed, tiny_root):
    folder, asked = stubbed
    cfg = Evaluation(
        str(folder / "sft"),
        data=tiny_root,
        seeds=2,
        compare=(str(folder / "base"), str(folder / "base@profile")),
        out=folder / "out",
    )
    found = run_evaluation(cfg)
    assert [r.label for r in found.results] == ["originals", "base", "base, profile", "sft"]
    assert found.results[-1].characters == ["Tess"]
    assert found.results[-1].settings["versions"]["jax"]
    assert "no encoders were given" in json.dumps(found.results[-1].left_out)
    saved = Results.load(folder / "out" / "results-base-profile.json")
    assert saved.settings["context"] == "profile"
    assert Image.open(found.sheet).width > 128 * 3 * 2
    page = found.report.read_text()
    assert "sft: Tess" in page
    assert "Change: sft against base, paired" in page
    assert page.count("<img") > 4 * 2
    assert len(asked) == 3
    assert all(a.asked for a in asked)
    run_evaluation(cfg)
    assert not any(a.asked for a in asked[3:])
    alone = run_evaluation(replace(cfg, compare=()))
    assert [r.label for r in alone.results] == ["originals", "sft"]
    assert "Change:" not in alone.report.read_text()


def test_a_shipped_model_has_a_name(stubbed, tiny_root, monkeypatch):
    folder, _ = stubbed
    monkeypatch.setattr(evaluate.presets, "resource_dir", lambda name: folder)
    monkeypatch.chdir(folder / "sft")
    found = run_evaluation(Evaluation("base", data=tiny_root, tasks=("vqa", "t2i"), seeds=1, originals=False))
    assert found.folder == Path("runs") / "evaluation-base"
    assert [r.label for r in found.results] == ["base"]


def test_shares_are_kept_and_measured_later(stubbed, tiny_root):
    folder, asked = stubbed
    cfg = dict(run=str(folder / "sft"), data=tiny_root, seeds=1, out=folder / "out")
    for share in ("0/2", "1/2"):
        found = run_evaluation(Evaluation(**cfg, shard=share))
        assert not found.results
        assert found.report is None
    found = run_evaluation(Evaluation(**cfg))
    assert len(asked) == 3
    assert not asked[2].asked
    assert found.results[-1].records


def test_mistakes_are_named(stubbed, tiny_root):
    folder, _ = stubbed
    run = str(folder / "sft")
    for cfg, message in (
        (Evaluation(run), "--data FOLDER"),
        (Evaluation(str(folder / "absent"), data=tiny_root), "not a directory"),
        (Evaluation(f"{run}@pictures", data=tiny_root), "@profile"),
        (Evaluation(run, data=tiny_root, shard="2/2"), "I/N"),
        (Evaluation(run, data=tiny_root, tasks=("t2",)), "did you mean 't2i'"),
        (Evaluation(run, data=tiny_root, encoders="nowhere"), "--encoders FOLDER"),
        (Evaluation(run, data=tiny_root, characters=("Tes",)), "did you mean 'Tess'"),
        (Evaluation(run, data=tiny_root, judge_url="ftp://x", judge_model="m"), "http://"),
    ):
        with pytest.raises(UserError, match=message):
            run_evaluation(cfg)


def test_a_run_says_what_it_was_trained_on_and_for(tmp_path):
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    for run in (sft, grpo):
        (run / "checkpoints").mkdir(parents=True)
    write_json(sft / "config.json", {"base": "mini", "data": {"path": "somewhere", "characters": ["Pip"]}})
    terms = [
        {"name": "text_image_match", "weight": 0.5},
        {"name": "identity_band", "weight": 0.0},
        {"name": "diversity", "weight": 0.1},
    ]
    write_json(grpo / "config.json", {"base": str(sft / "checkpoints" / "150"), "reward": terms})
    root, names = engines.training_data(grpo)
    assert (root.name, names) == ("somewhere", ("Pip",))
    assert engines.training_data(tmp_path) == (None, ())
    assert evaluate._rewarded(grpo) == ("clip_t", "diversity")
    assert evaluate._rewarded(sft) == ()


def test_a_real_model_end_to_end(tiny_root, tmp_path, capsys, monkeypatch):
    """Random weights: likelihoods, replies and pictures go through the engine, and nothing else is missing."""
    from unichar_jax.checkpoint import store
    from unichar_jax.models import params
    from unichar_jax.models.autoencoder import Autoencoder
    from unichar_jax.models.unified import UnifiedModel

    cfg, words = model_preset("debug"), tmp_path / "tokenizer"
    words.mkdir()
    write_debug_tokenizer(words)
    model = params.initialize(UnifiedModel(cfg), 0)
    autoencoder = params.initialize(Autoencoder(cfg.autoencoder), 1)
    base = tmp_path / "debug"
    store.write_bagel(base, model, cfg, autoencoder, tokenizer_files_from=words)
    monkeypatch.setenv("COLUMNS", "160")
    args = ["evaluate", str(base), "--data", str(tiny_root), "--out", str(tmp_path / "out"), "--seeds", "1"]
    args += ["--tasks", "knowledge_mcq", "t2t2i", "--steps", "2", "--max-tokens", "4"]
    assert main([*args, "--encoders", str(words)]) == 1
    assert "holds none of" in capsys.readouterr().err
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "right answer" in printed
    assert "report:" in printed
    results = Results.load(tmp_path / "out" / "results-debug.json")
    assert {task for task, _ in results.measured} == {"knowledge_mcq", "t2t2i"}
    accuracy = results.interval("knowledge_mcq", "accuracy")
    assert 0 <= accuracy.mean <= 1
    drawn = [r for r in results.records if r.task == "t2t2i"]
    assert len(drawn) == 2
    assert all(Image.open(r.picture).size[0] >= 16 for r in drawn)


def test_a_sheet_has_a_place_for_every_picture():
    from tests.app.dummy import report

    comparison = report(prompts=2, seeds=2).comparison
    sheet = contact_sheet(comparison, side=40)
    assert sheet.width > 4 * 2 * 40
    assert sheet.height > 2 * 40
    assert len(sheet.getcolors(2**20)) > 100

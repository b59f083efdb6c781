"""What a run keeps, and what leaves it: its base's files under their names, its own settings, its pictures' sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.conftest import draw_picture, write_json
from unichar_jax.app import engines
from unichar_jax.app.web import guests
from unichar_jax.checkpoint import runs, store
from unichar_jax.checkpoint.lora import FOLDER
from unichar_jax.cli.main import main
from unichar_jax.config import presets
from unichar_jax.config.grpo import EvalConfig, GRPOConfig, RewardTerm, RolloutConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import LoraConfig, SFTConfig
from unichar_jax.data import portraits
from unichar_jax.data.cache import ImageCache
from unichar_jax.data.images import ImageTransform
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.data.transforms import Transforms
from unichar_jax.evaluation.subject import EngineSubject, Prompt
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.decoder import Compute
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.parallel.mesh import MeshConfig
from unichar_jax.sampling.roster import BASE
from unichar_jax.sampling.session import Persona
from unichar_jax.scoring import visual_questions
from unichar_jax.training import grpo, sft
from unichar_jax.training.grpo import run as grpo_run

CFG = model_preset("debug")
OWN = {
    "config.json": {"model_type": "bagel"},
    "generation_config.json": {"eos_token_id": 2},
    "preprocessor_config.json": {"patch_size": 14},
}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    whole = mesh_lib.make_mesh
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:1]))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A BAGEL directory with the files that only others read."""
    write_debug_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "a-base"
    store.write_bagel(
        folder,
        params.initialize(UnifiedModel(CFG), 0),
        CFG,
        params.initialize(Autoencoder(CFG.autoencoder), 0),
        tokenizer_files_from=tmp_path / "tokenizer",
    )
    for name, content in OWN.items():
        write_json(folder / name, content)
    llm = json.loads((folder / "llm_config.json").read_text())
    write_json(folder / "llm_config.json", llm | {"max_window_layers": 28})
    return folder


def _sft(root: Path, run: Path, base: Path | str = "debug", **data: object) -> SFTConfig:
    cfg = presets.load(SFTConfig, "sft-debug")
    given = dataclasses.replace(cfg.data, path=str(root), rows_per_device=1, **data)
    return dataclasses.replace(cfg, data=given, base=str(base), run_dir=str(run), steps=1)


def _grpo(root: Path, run: Path, base: Path) -> GRPOConfig:
    rows = [
        dict(text=f"Tess {i}", character="Tess", scene_id=str(i), reference_images_path="", vqa_questions=[])
        for i in range(2)
    ]
    prompts = run.parent / "Tess_pure_t2i_with_vqa.jsonl"  # beside the run
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GRPOConfig(
        base=str(base),
        run_dir=str(run),
        prompts=str(prompts),
        references=str(root / "train" / "Friends-Tess"),
        held_out=0,
        reward=(RewardTerm("visual_questions"),),
        rollout=RolloutConfig(height=32, width=32, num_timesteps=3, window_range=(0, 2)),
        lora=LoraConfig(rank=2, alpha=4.0, experts=("gen",), targets=("q",)),
        rounds=1,
        prompts_per_round=1,
        group=2,
        eval=EvalConfig(every=0),
        compute=Compute(dtype="float32"),
        pictures_every=0,
    )


def test_a_run_keeps_its_bases_files_and_its_export_is_a_bagel_directory(base, tiny_root, tmp_path, capsys):
    cfg = dataclasses.replace(
        _sft(tiny_root, tmp_path / "a-run", base),
        trainable="lora",
        lora=LoraConfig(rank=2, alpha=4.0, targets=("q",)),
    )
    run = sft.train(cfg, quiet=True)
    assert presets.from_dict(SFTConfig, runs.read_info(run).settings) == cfg
    exported = tmp_path / "out" / "exported"
    assert main(["convert", str(run), str(exported)]) == 0
    assert main(["convert", "--lora-export", str(run), str(tmp_path / "out" / "adapters")]) == 0
    tokenizer = [p.name for p in (tmp_path / "tokenizer").iterdir()]
    for name in (*OWN, "llm_config.json", "vit_config.json", "extra_config.json", *tokenizer):
        assert (run / name).read_bytes() == (base / name).read_bytes(), name
        assert (exported / name).read_bytes() == (base / name).read_bytes(), name
    assert {p.name for p in exported.iterdir()} == {p.name for p in base.iterdir()}
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    adapters = json.loads((run / FOLDER / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == "a-base"


@pytest.mark.slow
def test_training_engine_reward_and_evaluation_see_the_same(tiny_root, tmp_path, monkeypatch):
    """With sizes that no model of this size would be guessed to have; patches are compared bit for bit."""
    folder = tiny_root / "train" / "Friends-Tess"
    draw_picture(folder / "0.png", 0, (56, 84))  # of a size that nobody has to change
    cut, trained = ImageCache.patches, {}

    def patches(self, picture, transform, img_num=1):
        trained[picture.path] = cut(self, picture, transform, img_num)
        return trained[picture.path]

    monkeypatch.setattr(ImageCache, "patches", patches)
    sizes = dict(look_min=42, look_max=84, draw_min=32, draw_max=96, square=False)
    steps = dict(steps=4)
    run = sft.train(dataclasses.replace(_sft(tiny_root, tmp_path / "run", **sizes), **steps), quiet=True)
    assert folder / "0.png" in trained and len(trained) > 1

    built, build = [], grpo_run.build
    monkeypatch.setattr(grpo_run, "build", lambda *a: built.append(build(*a)) or built[-1])
    second = grpo.train(_grpo(tiny_root, tmp_path / "second", run), quiet=True)

    expected = Transforms(ImageTransform(14, 42, 84, max_pixels=2_007_040), ImageTransform(16, 32, 96))
    for home in (run, second, runs.resolve(second)):
        assert Transforms.of_folder(home) == expected
    for home in (run, second):
        with engines.load_engine(home) as engine:
            assert engine.parts.transforms == expected
            subject, model = EngineSubject(engine), engine.models[BASE]
            for path, seen in trained.items():
                np.testing.assert_array_equal(engine.parts.look(path).tokens, seen)
                np.testing.assert_array_equal(subject._parts(Prompt("?", path))[0].tokens, seen)

    given, see = [], visual_questions._patches
    monkeypatch.setattr(visual_questions, "_patches", lambda *a: given.append(see(*a)) or given[-1])
    with Image.open(folder / "0.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), np.float32) / np.float32(255)
    built[0]._look(model, pixels[None])
    seen = trained[folder / "0.png"]
    np.testing.assert_array_equal(np.asarray(given[0])[0, : len(seen)], seen)


def test_a_directory_that_is_no_run_has_the_usual_sizes(base):
    assert Transforms.of_folder(base) == Transforms.usual(CFG)
    bagel = Transforms.usual(model_preset("bagel-7b"))
    assert (bagel.look.max_size, bagel.draw.max_size, bagel.look.square) == (980, 1024, False)


@pytest.mark.slow
def test_a_copied_run_is_met_anywhere(tiny_root, tmp_path, monkeypatch, capsys):
    """Chat, draw, serve and evaluate work on a copy, from another folder, with the data gone; evaluation, which
    measures against held-out pictures, is told where they are now."""
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir(), away.mkdir()
    monkeypatch.chdir(here)
    data = shutil.copytree(tiny_root, here / "data")
    sft.train(_sft(Path("data"), Path("sft")), quiet=True)
    grpo.train(_grpo(Path("data"), Path("grpo"), Path("sft")), quiet=True)
    known = [asdict(who) for who in engines.portraits(Path("sft"))]
    monkeypatch.chdir(away)
    assert engines.training_data(here / "sft") == (data, ())  # while it is there

    for name in ("sft", "grpo"):
        shutil.copytree(here / name, away / name)
    moved = shutil.move(data, tmp_path / "elsewhere")
    shutil.rmtree(here)
    monkeypatch.setattr(Console, "input", lambda *_, **__: "")
    for name in ("sft", "grpo"):
        run = away / name
        assert main(["chat", name]) == 0
        assert "Tess: Hello, I roll." in capsys.readouterr().out
        assert main(["draw", name, "Tess", "-n", "1", "--steps", "2"]) == 0
        (guest,) = guests.invite([run], load=lambda *_, **__: None)
        (who,) = engines.portraits(run)
        assert guest.persona == Persona("Tess", "Tess is a blue circle — calm, round.", "Hello, I roll.")
        assert [caption for _, caption in guest.pictures] == [c for _, c in known[0]["pictures"]]
        assert (who.greetings, who.ideas) == (known[0]["greetings"], known[0]["ideas"])
        with Image.open(who.pictures[1][0]) as small, Image.open(moved / "train/Friends-Tess/1.png") as large:
            assert small.size == large.size  # as small already
            assert min(small.getpixel((0, 0))) > 240  # on white
        assert main(["evaluate", name, "--tasks", "vqa"]) == 1
        assert "--data FOLDER" in capsys.readouterr().err
        assert main(["evaluate", name, "--tasks", "vqa", "--data", str(moved)]) == 0
    assert runs.read_info(away / "grpo").before[0]["data"]["path"] == "data"


def test_a_picture_that_is_kept_is_small(tmp_path):
    big = tmp_path / "big.png"
    Image.new("RGB", (1600, 800), "red").save(big)
    who = portraits.Portrait("Ann", "a", "b", "Ann", ((big, "red"),), ("hi",), ("red",))
    told = portraits.keep(tmp_path / "run", [who])
    with Image.open(tmp_path / "run" / told[0]["pictures"][0][0]) as small:
        assert small.size == (portraits.SIDE, portraits.SIDE // 2)
    assert str(tmp_path) not in json.dumps(told)

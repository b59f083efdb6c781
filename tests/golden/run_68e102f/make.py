"""Makes the runs in this folder: with the code of commit 68e102f, and never again.

They stand for what users have on their disks. ``runs.tar.xz`` holds a run of each stage, with checkpoints that
can be resumed, their base and their data; ``recorded.json`` and ``drawn.npz`` what that code made of them.
``tests/training/test_old_runs.py`` reads them with today's code. From the repository:

    git worktree add --detach ../at-68e102f 68e102f
    cd tests/golden/run_68e102f
    PYTHONPATH=../../../../at-68e102f python make.py

The model is smaller than ``debug``, because a checkpoint is four of it. Pictures have the sizes that this code
guesses for a model as small as that, whatever a run says: what is recorded holds for code that does not guess.
Adam's epsilon is large, so that the rounding of another processor is not amplified where a gradient is small.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np

from tests.conftest import write_tiny_character
from unichar_jax.checkpoint import runs, store
from unichar_jax.config import presets
from unichar_jax.config.grpo import EvalConfig, GRPOConfig, NFTConfig, RewardTerm, RolloutConfig
from unichar_jax.config.model import AutoencoderConfig, DecoderConfig, VisionConfig, model_preset
from unichar_jax.config.train import LoraConfig, OptimizerConfig, SaveConfig, SFTConfig
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.decoder import Compute
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.flow import FlowSettings, Guidance
from unichar_jax.sampling.session import Persona, RolePlay
from unichar_jax.sampling.text import TextSettings
from unichar_jax.training import grpo, sft

jax.config.update("jax_num_cpu_devices", 1)  # the tests' fixtures asked for eight
HERE = Path(__file__).resolve().parent
SFT_STEPS, GRPO_ROUNDS, MORE = 40, 1, 3  # steps and rounds that are kept, and how many are recorded beyond
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-3, ema_decay=0.9)
PROMPTS = ("Tess rolls in the snow.", "Tess is blue.", "Tess sleeps under a tree.")
LINES = ("Hi 1", "What do you do at 2 o'clock?")
MODEL = dataclasses.replace(
    model_preset("debug"),
    decoder=DecoderConfig(
        hidden_size=16, mlp_size=32, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=512
    ),
    vision=VisionConfig(hidden_size=16, mlp_size=32, num_layers=1, num_heads=2, max_patches_per_side=8),
    autoencoder=AutoencoderConfig(channels=4, multipliers=(1, 1, 2, 2), num_res_blocks=1, norm_groups=2),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no path of this machine is kept
        write_data(Path("data"))
        write_base(Path("base"))
        sft.train(stage_1(SFT_STEPS), quiet=True)
        grpo.train(stage_2(GRPO_ROUNDS), quiet=True)
        told, drawn = {}, {}
        for name in ("sft", "grpo"):
            told[name], drawn[name] = talk(Path(name))
        with tarfile.open(HERE / "runs.tar.xz", "w:xz", preset=9) as archive:
            for name in ("data", "base", "sft", "grpo"):
                archive.add(name, filter=plain)
        # What comes next is recorded with the runs where they are: they are in the archive already.
        told["grpo"]["next"] = continued(grpo.train, stage_2(GRPO_ROUNDS + MORE))
        told["sft"]["next"] = continued(sft.train, stage_1(SFT_STEPS + MORE))
        (HERE / "recorded.json").write_text(json.dumps(told, indent=1) + "\n")
        np.savez_compressed(HERE / "drawn.npz", **drawn)


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without owner, time, and the files in which Orbax tells where a checkpoint was written."""
    if member.name.endswith("commit_success.txt"):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def write_base(folder: Path) -> None:
    write_debug_tokenizer(Path("."))
    model = params.initialize(UnifiedModel(MODEL), 0)
    autoencoder = params.initialize(Autoencoder(MODEL.autoencoder), 1)
    store.write_bagel(folder, model, MODEL, autoencoder, tokenizer_files_from=".")


def write_data(root: Path) -> None:
    write_tiny_character(root / "personalized_data" / "train" / "Friends-Tess", 2)
    folder = root / "personalized_t2i" / "Friends-Tess"
    folder.mkdir(parents=True)
    question = {"type": "yes_no", "category": "look", "weight": 1.0, "is_negative": False}
    asked = [
        {"question": "Is it blue?", "answer": "yes", **question},
        {"question": "Is there snow?", "answer": "no", **question},
    ]
    rows = [
        dict(text=t, character="Tess", scene_id=str(i), reference_images_path="", vqa_questions=asked)
        for i, t in enumerate(PROMPTS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "Friends-Tess_pure_t2i_with_vqa.jsonl").write_text(lines)


def stage_1(steps: int) -> SFTConfig:
    cfg = presets.load(SFTConfig, "sft-debug")
    data = dataclasses.replace(
        cfg.data,
        path="data/personalized_data",
        rows_per_device=1,
        tokens_per_row=512,
        draw_min=96,
        draw_max=96,
        look_min=70,
        look_max=70,
    )
    return dataclasses.replace(
        cfg,
        base="base",
        run_dir="sft",
        data=data,
        steps=steps,
        optimizer=OPTIMIZER,
        save=SaveConfig(every=100, keep=1),
    )


def stage_2(rounds: int) -> GRPOConfig:
    return GRPOConfig(
        base="sft",
        run_dir="grpo",
        prompts="data/personalized_t2i/Friends-Tess",
        references="data/personalized_data/train/Friends-Tess",
        held_out=1,
        algorithm="nft",
        reward=(RewardTerm("visual_questions"),),
        rollout=RolloutConfig(height=96, width=96, num_timesteps=4, shift=1.0, window_range=(0, 3)),
        nft=NFTConfig(kl=1e-2),
        lora=LoraConfig(rank=2, alpha=4.0, experts=("gen",), targets=("q", "v")),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3),
        rounds=rounds,
        prompts_per_round=2,
        group=4,
        whole_std=True,
        eval=EvalConfig(every=0),
        compute=Compute(dtype="float32"),
        save=SaveConfig(every=100, keep=1),
        pictures_every=0,
    )


def talk(run: Path) -> tuple[dict, np.ndarray]:
    """What the run says, about a picture too, and what it draws."""
    step = runs.resolve(run)
    greedy, free = TextSettings(12, 0.0), TextSettings(12, 1.0, seed=1)
    character = Path("data") / "personalized_data" / "train" / "Friends-Tess"
    with Engine.load(step, compute=Compute(dtype="float32"), item=runs.weights_item(step)) as engine:
        play = RolePlay(engine, Persona.from_folder(character))
        said = {line: play.reply(line, free).reply for line in LINES}
        seen = engine.answer(character / "1.png", "Colour 0?", greedy)
        settings = FlowSettings(6, 1.0, Guidance(2.0, interval=(0.0, 1.0)))
        pictures = engine.generate_images(PROMPTS[:2], 1, settings, size=(96, 96), seed=3)
    drawn = np.stack([np.asarray(row[0]) for row in pictures])
    return {"said": said, "seen": seen}, drawn


def continued(train, cfg) -> list[dict]:
    train(cfg, quiet=True)
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()[-MORE:]
    timed = ("seconds_draw", "seconds_score", "seconds_learn")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


if __name__ == "__main__":
    main()

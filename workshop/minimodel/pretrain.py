"""Makes the mini base: the unified model pretrained on unnamed characters of the mini world.

    python -m workshop.minimodel.pretrain

The vision tower learns to see first (``workshop/minimodel/seeing.py``), as BAGEL's did, and is then left as it is. The
rest is the same model, objective, step, loop and checkpoints as Unified-SFT; only the data differs
(``workshop/minimodel/corpus.py``).
Needs the mini autoencoder (``workshop/minimodel/autoencoder.py``) in ``--out``. Stops and resumes at any checkpoint;
``--start DIR`` goes on from finished weights with a new optimizer; writes a sheet of drawings beside its log
as it goes, and at the end the averaged weights in BAGEL's own names, with configs and tokenizer, so that the
result is a BAGEL directory like any other.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from unichar_jax.checkpoint import store
from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.config.compute import Compute
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import OptimizerConfig, SFTConfig
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from unichar_jax.models import params
from unichar_jax.models.autoencoder import patchify
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.pixels import decode_images
from unichar_jax.training import state as state_lib
from unichar_jax.training.loop import Loop
from unichar_jax.training.metrics import MetricsLog
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.step import make_sft_step
from workshop.minimodel import corpus
from workshop.minimodel.seeing import teach_to_see
from workshop.miniworld import unnamed
from workshop.miniworld.draw import contact_sheet

TOKENIZER_SEED, TOKENIZER_RECORDS = 1_000_000, 3_000
SHEET_SEED, SHEET_SIZE = 2_000_000, 16


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Settings of one run; the defaults make weights like those that ship (checkpoints/README.md has their history)."""

    out: Path = Path("checkpoints/mini")
    """Folder of the autoencoder, which receives the model."""
    work: Path = Path("cache/pretrain")
    """Folder of checkpoints and metrics."""
    corpus: Path = Path("cache/corpus")
    """Folder of the tokenised corpus."""
    start: Path | None = None
    """BAGEL directory of weights to start from; random ones if none is given."""
    pool: Path = Path("cache/pool")
    """Folder of the pictures that the vision tower is taught with."""
    seeing_minutes: float = 13.0
    """Training time of the vision tower and the connector, before anything else."""
    seeing_pictures: int = 16_000
    records: int = 20_000
    picture_steps: int = 1_200
    """Steps of the first stage, drawing."""
    looking_steps: int = 400
    """Steps of the second stage, describing pictures."""
    steps: int = 2_400
    """Steps in all."""
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    decay_steps: int = 350
    """Last steps, over which the learning rate falls."""
    ema_decay: float = 0.98
    """Of the published average; a long one would still remember the start, and the decay averages already."""
    ce_weight: float = 0.5
    save_every: int = 200
    seed: int = 0


class _DeviceData:
    """Host batches put on the device."""

    def __init__(self, data: corpus.PretrainingData):
        self.data, self.state, self.restore = data, data.state, data.restore

    def __next__(self) -> Any:
        return jax.tree.map(jnp.asarray, next(self.data))


def prepare(cfg: Pretraining) -> tuple[Tokenizer, Any]:
    """Tokenizer, corpus and moments, each made if it is not there; returns tokenizer and autoencoder."""
    if not (cfg.out / "tokenizer.json").exists():
        seeds = range(TOKENIZER_SEED, TOKENIZER_SEED + TOKENIZER_RECORDS)
        strings = (s for seed in seeds for s in corpus.all_strings(unnamed.unnamed_texts(seed)))
        train_tokenizer(strings, model_preset("mini").decoder.vocab_size, cfg.out)
    for name, content in model_preset("mini").to_bagel().items():
        (cfg.out / name).write_text(json.dumps(content, indent=1) + "\n")
    tokenizer = load_tokenizer(cfg.out, model_preset("mini"))
    if not (cfg.corpus / "pictures.npy").exists():
        corpus.build(cfg.corpus, cfg.records, tokenizer)
    autoencoder = store.load_autoencoder(cfg.out)
    if not (cfg.corpus / "moments.npy").exists():
        patch = model_preset("mini").latent_patch_size

        @jax.jit
        def moments(pixels: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(patchify(m, patch) for m in autoencoder.moments(pixels))

        corpus.add_moments(cfg.corpus, moments)
    return tokenizer, autoencoder


def draw_sheet(model: UnifiedModel, autoencoder: Any, tokenizer: Tokenizer, steps: int = 25) -> Image.Image:
    """Held-out captions: the drawing code's pictures above, the model's below."""
    records = [unnamed.unnamed_sample(SHEET_SEED + i) for i in range(SHEET_SIZE)]
    ids = [tokenizer.encode(r["caption"]) for r in records]
    special, longest = tokenizer.special, max(map(len, ids)) + 2
    padded = np.zeros((len(ids), longest), np.int32)
    for row, text in zip(padded, ids, strict=True):
        row[: len(text) + 2] = special.frame(text)
    lengths = jnp.asarray([len(i) + 2 for i in ids])
    cache = kv.prefill_text(
        model, kv.empty(model, len(ids), kv.bucket(longest)), jnp.asarray(padded), lengths
    )
    side = corpus.PICTURE_SIZE // model.cfg.pixels_per_latent
    shape = (len(ids), side * side, model.cfg.latent_dim)
    latents = flow.sample_latents(
        model,
        flow.Contexts(cache),
        jax.random.normal(jax.random.key(0), shape),
        (side, side),
        flow.FlowSettings(steps, 1.0, flow.Guidance(text_scale=3.0, interval=(0.0, 1.0))),
    )
    drawn = np.asarray(decode_images(autoencoder, latents, (side, side), model.cfg.latent_patch_size))
    half = SHEET_SIZE // 2
    truth = [r["image"] for r in records]
    rows = [*truth[:half], *drawn[:half], *truth[half:], *drawn[half:]]
    return contact_sheet(rows, half)


def taught_to_see(cfg: Pretraining, model: UnifiedModel, tokenizer: Tokenizer) -> UnifiedModel:
    """The model with tower and connector after their own training; its measurements join the logs."""
    if not cfg.seeing_minutes:
        return model
    work = cfg.work / "seeing"
    model, seen = teach_to_see(
        model, tokenizer, work, cfg.pool, minutes=cfg.seeing_minutes, pictures=cfg.seeing_pictures
    )
    logs = cfg.out / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "seeing.json").write_text(json.dumps(seen, indent=1) + "\n", "utf-8")
    shutil.copyfile(work / "log.jsonl", logs / "seeing.jsonl")
    return model


def train(cfg: Pretraining) -> None:
    """Runs (or resumes) pretraining and writes the model into ``cfg.out``."""
    tokenizer, autoencoder = prepare(cfg)
    model_cfg = store.load_config(cfg.out)
    sft = SFTConfig(
        compute=Compute(dtype="float32"),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=cfg.learning_rate,
            min_learning_rate=cfg.learning_rate / 20,
            warmup_steps=cfg.warmup_steps,
            schedule="trapezoid",
            decay_steps=cfg.decay_steps,
            eps=1e-8,
            weight_decay=0.01,
            ema_decay=cfg.ema_decay,
        ),
        steps=cfg.steps,
        ce_weight=cfg.ce_weight,
        ce_chunk=128,
        seed=cfg.seed,
    )
    declared = UnifiedModel(model_cfg, sft.compute)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    if cfg.start is None:
        model = params.initialize(declared, cfg.seed)
    else:
        model = store.load_model(cfg.start, compute=sft.compute, dtype=jnp.float32)
    model = taught_to_see(cfg, model, tokenizer)
    # The decoder learns to read what the tower sees; its first gradients would only spoil that.
    layout, state = state_lib.create(model, declared, optimizer, trainable="not_vision", ema=True)
    step = make_sft_step(layout, optimizer, sft, model_cfg.autoencoder, len(corpus.TASKS))
    cfg.work.mkdir(parents=True, exist_ok=True)
    tasks = list(corpus.TASKS)
    log = MetricsLog(cfg.work / "metrics.jsonl", sft.steps, names={"task_ce": tasks, "task_mse": tasks})

    def sheet(done: int, state: state_lib.TrainState) -> None:
        averaged = layout.assemble(state.ema, state.frozen)
        draw_sheet(averaged, autoencoder, tokenizer).save(cfg.work / f"sheet-{done:05d}.png")
        write(averaged)

    def write(averaged: UnifiedModel) -> None:
        """The averaged weights as a BAGEL directory, written beside and moved in place."""
        made = cfg.work / "model"
        shutil.rmtree(made, ignore_errors=True)
        store.write_bagel(made, averaged, model_cfg, dtype=jnp.bfloat16)
        (made / "ema.safetensors").replace(cfg.out / "ema.safetensors")
        logs = cfg.out / "logs"
        logs.mkdir(exist_ok=True)
        shutil.copy(cfg.work / "metrics.jsonl", logs / "pretraining.jsonl")

    looking, everything = cfg.picture_steps, cfg.picture_steps + cfg.looking_steps
    stages = ((0, corpus.PICTURES), (looking, corpus.LOOKING), (everything, corpus.EVERYTHING))
    loop = Loop(
        jax.jit(step, donate_argnums=0),
        layout,
        _DeviceData(corpus.PretrainingData(cfg.corpus, model_cfg, stages, cfg.seed)),
        CheckpointManager(cfg.work, declared, keep=1),
        log,
        steps=sft.steps,
        save_every=cfg.save_every,
        log_every=10,
        hooks=[(cfg.save_every, sheet)],
    )
    sheet(sft.steps, loop.run(loop.resume(state)))


if __name__ == "__main__":
    train(tyro.cli(Pretraining, description=__doc__))

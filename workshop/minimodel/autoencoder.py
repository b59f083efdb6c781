"""Trains the mini model's autoencoder on pictures of the mini world.

    python -m workshop.minimodel.autoencoder --minutes 50

Training takes random crops of a pool of drawn pictures; the last part of the schedule sees whole pictures
so that the attention block meets the size it will serve at. Starting again with the same ``--work``
resumes (``small.fit``).

``--decoder-only`` refines the decoder and leaves the encoder bit for bit as it is, so that cached latents
and the models trained on them stay valid. Never used for BAGEL's own autoencoder, which is not trained at
all.
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

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.safetensors_io import open_file, write_file
from unichar_jax.config.model import model_preset
from unichar_jax.errors import UserError
from unichar_jax.files import replacing
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from workshop.minimodel.small import (
    Budget,
    Metrics,
    Pool,
    TrainState,
    Weights,
    fit,
    picture_pool,
    to_float,
    to_pixels,
)

HELD_OUT_SEED = 1_000_003


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of one run. How the shipped weights were made is in checkpoints/mini/logs/autoencoder.json."""

    out: Path = Path("checkpoints/mini")
    """Folder that receives ae.safetensors, and the log and sheet under logs/."""
    work: Path = Path("cache/autoencoder")
    """Folder of the resumable state; a finished run is repeated by removing it."""
    pool: Path = Path("cache/pool")
    """Folder of the drawn pictures."""
    start: Path | None = None
    """Weights to start from (an ae.safetensors); random if absent."""
    minutes: float = 50.0
    """Training time, excluding evaluation; the learning rate has reached its end when it is over."""
    decoder_only: bool = False
    """Leave the encoder as it is (needs --start)."""
    pictures: int = 12_000
    measured: int = 512
    """Pictures for the final measurement."""
    crop: int = 64
    batch: int = 12
    whole_after: float = 0.85
    """Fraction of the training time after which whole 96-px pictures are seen."""
    learning_rate: float = 4e-3
    kl_weight: float = 1e-3
    """Weight of the mean KL divergence per latent element, in nats."""
    latent_noise: float = 0.0
    """Extra noise on the latents, in units of their standard deviation: makes a decoder forgiving."""
    average: float = 0.999
    report_minutes: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decoder_only and self.start is None:
            raise UserError(
                "autoencoder: --decoder-only refines existing weights, but --start is not given;"
                " add --start checkpoints/mini/ae.safetensors."
            )
        if not 0 < self.crop <= 96 or self.crop % 8:
            raise UserError(
                f"autoencoder: crop must be a multiple of 8 up to 96, got {self.crop}; try --crop 64."
            )


# -- pieces ------------------------------------------------------------------------------------------------


def crops(pool: Pool, rng: np.random.Generator, batch: int, crop: int) -> np.ndarray:
    """Random ``crop`` x ``crop`` windows of random pictures, uint8 ``[batch, crop, crop, 3]``."""
    room = pool.pictures.shape[1] - crop
    windows = np.empty((batch, crop, crop, 3), np.uint8)
    for window in windows:
        picture = pool.pictures[rng.integers(len(pool.pictures))]
        y, x = rng.integers(room + 1, size=2)
        window[:] = picture[y : y + crop, x : x + crop]
    return windows


def assemble(weights: dict[str, jax.Array]) -> Autoencoder:
    """The module of flat weights."""
    declared = Autoencoder(model_preset("mini").autoencoder)
    return params.map_named(lambda name, _: weights[name], declared)


def reconstruction_loss(output: jax.Array, target: jax.Array) -> jax.Array:
    """L1 + squared error + L1 of the differences between neighbours (keeps thin lines), all means."""
    error = output - target
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return jnp.abs(error).mean() + 4.0 * jnp.square(error).mean() + 0.5 * edges


def kl_to_standard_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Mean over elements of KL(N(mean, exp(logvar)) || N(0, 1)), in nats."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()


# -- files -------------------------------------------------------------------------------------------------


def save_weights(path: Path, model: Autoencoder) -> None:
    """Writes an autoencoder under its published PyTorch names, float32, complete or not at all."""
    tensors = table.module_to_torch(model, table.autoencoder_table(model.cfg))
    specs = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with replacing(path) as made:
        write_file(made, specs, tensors.items())


def load_weights(path: Path) -> Autoencoder:
    """Reads what ``save_weights`` wrote, for the mini preset."""
    cfg, file = model_preset("mini").autoencoder, open_file(path)
    entries = table.autoencoder_table(cfg)
    if missing := [e.torch for e in entries if e.torch not in file.tensors]:
        raise UserError(
            f"{path}: not an autoencoder of the mini preset; {len(missing)} tensors are missing, the"
            f" first is {missing[0]}. Give the file of checkpoints/mini."
        )
    tensors = {e.torch: file.read(e.torch) for e in entries}
    filled = table.module_from_torch(Autoencoder(cfg), entries, tensors)
    return jax.tree.map(jnp.asarray, filled)


# -- measuring ---------------------------------------------------------------------------------------------


@jax.jit
def _reconstruct(model: Autoencoder, images: jax.Array) -> jax.Array:
    return model.decode(model.encode(images))


def reconstruct(model: Autoencoder, pictures: np.ndarray, batch: int = 16) -> np.ndarray:
    """Pictures through the autoencoder and back, uint8 ``[N, S, S, 3]`` to the same."""
    parts = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    return np.concatenate([to_pixels(_reconstruct(model, to_float(p))) for p in parts])


def psnr(pictures: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, each picture by itself, then their mean."""
    error = np.square(pictures.astype(np.float64) - other).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255.0**2 / error)).mean())


def latent_statistics(model: Autoencoder, pictures: np.ndarray, batch: int = 16) -> dict[str, Any]:
    """Statistics of unscaled latents over pictures, from which ``scale`` and ``shift`` follow.

    ``scale = 1 / std`` and ``shift = mean`` of posterior samples give latents of zero mean and unit
    deviation.
    """
    moments = jax.jit(lambda m, x: m.moments(x))
    parts = [moments(model, to_float(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
    mean = np.concatenate([np.asarray(m, np.float64) for m, _ in parts])
    noise = np.concatenate([np.exp(np.asarray(v, np.float64)) for _, v in parts])
    std = float(np.sqrt(mean.var() + noise.mean()))
    return {
        "scale": 1.0 / std,
        "shift": float(mean.mean()),
        "posterior_mean_std": float(mean.std()),
        "posterior_noise_std": float(np.sqrt(noise.mean())),
        "channel_mean": mean.mean(axis=(0, 1, 2)).tolist(),
        "channel_std": mean.std(axis=(0, 1, 2)).tolist(),
    }


def comparison_sheet(pictures: np.ndarray, other: np.ndarray, columns: int = 8) -> Image.Image:
    """Rows of originals, each above its reconstruction, at twice the size."""
    count = len(pictures) // columns * columns
    rows = []
    for i in range(0, count, columns):
        rows += [np.concatenate(list(x[i : i + columns]), axis=1) for x in (pictures, other)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


# -- the run -----------------------------------------------------------------------------------------------


def make_loss(cfg: AutoencoderTraining):
    """``(weights, pictures uint8 [B, S, S, 3], key) -> (loss, metrics)``."""

    def loss_fn(weights: Weights, pictures: jax.Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        model, images = assemble(weights), to_float(pictures)
        mean, logvar = model.moments(images)
        if cfg.decoder_only:
            mean, logvar = jax.lax.stop_gradient((mean, logvar))
        key, strength_key, noise_key = jax.random.split(key, 3)
        z = model.sample(mean, logvar, jax.random.normal(key, mean.shape))
        if cfg.latent_noise:
            # Each picture its own strength, so that clean latents stay in the training set.
            strength = cfg.latent_noise * jax.random.uniform(strength_key, (len(z), 1, 1, 1))
            z = z + strength * z.std() * jax.random.normal(noise_key, z.shape)
        reconstruction = reconstruction_loss(model.decode(z), images)
        kl = kl_to_standard_normal(mean, logvar)
        return reconstruction + cfg.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    return loss_fn


def train(cfg: AutoencoderTraining) -> TrainState:
    """Trains, or resumes, until ``cfg.minutes`` of training time are spent; returns the last state."""
    pool = picture_pool(cfg.pool, cfg.pictures, cfg.seed)
    held_out = picture_pool(cfg.pool, min(64, cfg.measured), HELD_OUT_SEED).pictures
    if cfg.start is not None:
        model = load_weights(cfg.start)
    else:
        model = params.initialize(Autoencoder(model_preset("mini").autoencoder), cfg.seed)

    def batch(rng: np.random.Generator, progress: float) -> np.ndarray:
        return crops(pool, rng, cfg.batch, 96 if progress > cfg.whole_after else cfg.crop)

    def evaluate(weights: Weights) -> dict[str, float]:
        output = reconstruct(assemble(weights), held_out)
        comparison_sheet(held_out[:24], output[:24]).save(cfg.work / "sheet.png")
        return {"held_out_psnr": psnr(held_out, output)}

    budget = Budget(
        cfg.work,
        cfg.minutes,
        cfg.learning_rate,
        cfg.average,
        cfg.report_minutes,
        cfg.seed,
        frozen="encoder." if cfg.decoder_only else "",
    )
    return fit(budget, params.flat(model), make_loss(cfg), batch, evaluate)


def publish(cfg: AutoencoderTraining, state: TrainState) -> dict[str, Any]:
    """Writes weights, statistics, log and sheet to ``cfg.out``; returns the statistics."""
    pool = picture_pool(cfg.pool, cfg.pictures, cfg.seed).pictures[: cfg.measured]
    held_out = picture_pool(cfg.pool, cfg.measured, HELD_OUT_SEED + 1).pictures
    model = assemble(state.average)
    output = reconstruct(model, held_out)
    summary = {
        "step": int(state.step),
        "held_out_psnr": round(psnr(held_out, output), 3),
        "held_out_pictures": len(held_out),
        **latent_statistics(model, pool),
    }
    logs, stem = cfg.out / "logs", "decoder" if cfg.decoder_only else "autoencoder"
    logs.mkdir(parents=True, exist_ok=True)
    save_weights(cfg.out / "ae.safetensors", model)
    (logs / f"{stem}.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    shutil.copyfile(cfg.work / "log.jsonl", logs / f"{stem}.jsonl")
    shutil.copyfile(cfg.work / "sheet.png", logs / f"{stem}.png")
    return summary


def main() -> None:
    cfg = tyro.cli(AutoencoderTraining)
    print(json.dumps(publish(cfg, train(cfg)), indent=1))


if __name__ == "__main__":
    main()

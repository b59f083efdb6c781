"""The mini base's vision tower and connector, taught to see before the unified model learns to read them.

BAGEL starts from a SigLIP tower that sees already; ours has to be made. Captions teach a tower through a
whole decoder, at a hundred times the cost of a picture here: 25 patches through five layers, and two
questions about the mean of the tokens. A linear head for each attribute that the drawing code knows reads
the tower (and is thrown away); the decoder's own output vectors of the words that say them read the
connector, so that what is seen arrives as something like the words for it. The mean makes every token carry
what was seen. Pictures are worn as a generator wears them. No look of the named cast occurs
(``small.picture_pool``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import ModelConfig
from unichar_jax.data.images import MINI_VIT_TRANSFORM, position_ids
from unichar_jax.data.tokenizer import Tokenizer
from unichar_jax.models import params
from unichar_jax.models.autoencoder import patchify
from unichar_jax.models.encoders.transformer import unit
from unichar_jax.models.streams import TokenMeta
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.models.vision import Connector, VisionTower
from workshop.minimodel.encoders import attribute_loss, reading_heads, worn
from workshop.minimodel.small import Budget, Metrics, Weights, fit, picture_pool, to_float
from workshop.miniworld.world import ATTRIBUTES

SEED, HELD_OUT_SEED = 11, 1_000_011
SIDE = MINI_VIT_TRANSFORM.max_size


def look(tower: VisionTower, images: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Images ``[B, 70, 70, 3]`` in [-1, 1] to the tower's features, ``[B, 25, hidden]``."""
    tokens = patchify(images, cfg.vision.patch_size)
    b, n = tokens.shape[:2]
    side = images.shape[1] // cfg.vision.patch_size
    grid = np.broadcast_to(position_ids(side, side, cfg.vision.max_patches_per_side), (b, n))
    one, none = jnp.ones((b, n), jnp.int32), jnp.zeros((b, n), jnp.int32)
    meta = TokenMeta(segment=one, order=none, position=none, block=one, noisy=none)
    return tower(tokens, jnp.asarray(grid), meta, Compute(dtype="float32"))


def word_vectors(model: UnifiedModel, tokenizer: Tokenizer) -> dict[str, jax.Array]:
    """Unit output vectors of the words of each attribute, ``[hidden, values]``: of their first tokens."""
    head = model.lm_head.kernel[...]
    return {
        name: unit(head[:, np.array([tokenizer.encode(f" {v}")[0] for v in values])].T).T
        for name, values in ATTRIBUTES.items()
    }


def word_loss(said: jax.Array, words: dict[str, jax.Array], labels: jax.Array) -> jax.Array:
    """Cross-entropy of the words that say a picture, summed over attributes.

    A picture has three colours and a mean cannot tell whose is which: each of the three is equally right.

    Args:
      said: float32 ``[B, hidden]``, the mean of the connector's tokens.
      words: as ``word_vectors``.
      labels: int32 ``[B, 10]`` in the order of ``ATTRIBUTES``.
    """
    names, loss = list(ATTRIBUTES), 0.0
    coloured = [n for n in names if ATTRIBUTES[n] == ATTRIBUTES["colour"]]
    for name in names:
        log = jax.nn.log_softmax(said @ words[name])
        right = coloured if name in coloured else [name]
        for other in right:
            picked = jnp.take_along_axis(log, labels[:, [names.index(other)]], axis=-1)
            loss -= picked.mean() / len(right)
    return loss


def seen_pictures(pictures: np.ndarray) -> np.ndarray:
    """Drawings uint8 ``[N, 96, 96, 3]`` at the size at which the model looks at them, ``[N, 70, 70, 3]``."""
    size = (SIDE, SIDE)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures])


def teach_to_see(
    model: UnifiedModel,
    tokenizer: Tokenizer,
    work: Path,
    pool: Path,
    *,
    minutes: float,
    pictures: int,
    held_out: int = 1024,
    batch: int = 64,
) -> tuple[UnifiedModel, dict[str, Any]]:
    """Trains (or resumes) tower and connector of a model of arrays.

    Returns:
      The model with their averaged weights in place, and the held-out accuracy of the heads.
    """
    cfg = model.cfg
    taught = picture_pool(pool, pictures, SEED)
    held = picture_pool(pool, held_out, HELD_OUT_SEED)
    images, held_images = seen_pictures(taught.pictures), seen_pictures(held.pictures)
    words = word_vectors(model, tokenizer)
    # Copies, because training gives its arrays away.
    parts = {k: jnp.copy(v) for k, v in params.flat(model).items() if k.startswith(("vision.", "connector."))}
    tower, connector = VisionTower(cfg.vision), Connector(cfg.vision, cfg.decoder)

    def part(weights: Weights, name: str, declared: Any) -> Any:
        return params.map_named(lambda k, _: weights[f"{name}.{k}"], declared)

    def loss_fn(weights: Weights, rows: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        features = look(part(weights, "vision", tower), worn(to_float(rows[0]), key), cfg)
        reading = attribute_loss(logits(weights, features), rows[1])
        saying = word_loss(part(weights, "connector", connector)(features).mean(axis=1), words, rows[1])
        return reading + saying, {"cross_entropy": reading, "words": saying}

    def logits(weights: Weights, features: jax.Array) -> dict[str, jax.Array]:
        return {n: features.mean(axis=1) @ weights[f"heads.{n}.kernel"] for n in ATTRIBUTES}

    def batch_fn(rng: np.random.Generator, progress: float) -> Any:
        index = rng.integers(len(images), size=batch)
        return images[index], taught.labels[index]

    @jax.jit
    def read(weights: Weights, x: jax.Array) -> dict[str, jax.Array]:
        found = logits(weights, look(part(weights, "vision", tower), x, cfg))
        return {n: values.argmax(-1) for n, values in found.items()}

    def accuracy(weights: Weights) -> dict[str, float]:
        count = len(held_images)
        found = [read(weights, to_float(held_images[i : i + 64])) for i in range(0, count, 64)]
        right = {
            n: float((np.concatenate([f[n] for f in found]) == held.labels[:, i]).mean())
            for i, n in enumerate(ATTRIBUTES)
        }
        return {"mean": float(np.mean(list(right.values()))), **right}

    budget = Budget(work, minutes, learning_rate=2e-3, report_minutes=1.0, seed=SEED)
    start = {**parts, **reading_heads(cfg.vision.hidden_size, ATTRIBUTES)}
    average = fit(budget, start, loss_fn, batch_fn, accuracy).average
    return params.map_named(lambda name, x: average.get(name, x), model), accuracy(average)

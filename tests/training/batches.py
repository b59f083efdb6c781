"""Random packed batches of a small model, laid out by the library's own code."""

from __future__ import annotations

import numpy as np

from unichar_jax.config.model import ModelConfig
from unichar_jax.data import layout
from unichar_jax.data.images import position_ids
from unichar_jax.models.streams import Batch

CAPACITIES = layout.Sizes(text=48, vit=8, latent=16)


def random_batch(cfg: ModelConfig, rows: int, seed: int = 0) -> Batch:
    """Rows of one T2I sample, one question about an image, and one dialogue; lengths vary."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int, **kwargs) -> layout.TextPart:
        ids = rng.integers(8, cfg.decoder.vocab_size, int(rng.integers(low, high)))
        return layout.TextPart(ids, **kwargs)

    def image() -> layout.LatentPart:
        h, w = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        shape = (h * w, cfg.latent_dim)
        mean, logvar = rng.normal(size=shape), rng.normal(size=shape) - 3
        grid = position_ids(h, w, cfg.max_latent_size)
        return layout.LatentPart(
            mean.astype(np.float32), logvar.astype(np.float32), grid, timestep=float(rng.normal())
        )

    def look() -> layout.VitPart:
        patches = rng.uniform(-1, 1, (4, cfg.vision.patch_dim)).astype(np.float32)
        return layout.VitPart(patches, position_ids(2, 2, cfg.vision.max_patches_per_side))

    packed = []
    for _ in range(rows):
        samples = [
            [text(2, 8), image()],
            [look(), text(2, 5), text(2, 6, loss=True)],
            [text(2, 5), text(2, 6, loss=True)],
        ]
        packed.append([layout.lay_out(parts, cfg, task=i) for i, parts in enumerate(samples)])
    return layout.collate(packed, CAPACITIES, cfg)

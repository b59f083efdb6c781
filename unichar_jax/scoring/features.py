"""Features of pictures: preprocessing and a frozen encoder as one compiled function, and their cosines.

``ImageEncoder`` is what every scorer that compares features takes, so a small encoder serves the small model
through the same scorers as DINOv2 or CLIP serve the real one. Features of references are kept by content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.models.encoders.transformer import unit
from unichar_jax.parallel.mesh import constrain
from unichar_jax.scoring.base import FeatureCache, References, in_batches


class ImageEncoder:
    """Pictures in, unit vectors out.

    Args:
      module: the encoder with its weights.
      apply: ``apply(module, preprocessed images [B, h, w, 3]) -> [B, D]``.
      preprocess: pictures in [0, 1] of one size to the images that ``apply`` takes.
      batch_size: pictures in one call of the compiled function (a multiple of the devices uses them all).
    """

    def __init__(
        self,
        module: Any,
        apply: Callable[[Any, jax.Array], jax.Array],
        preprocess: Callable[[jax.Array], jax.Array],
        batch_size: int = 32,
    ):
        def encode(module: Any, images: jax.Array) -> jax.Array:
            images = constrain(images, ("batch", None, None, None))
            return unit(apply(module, images))

        # Two programs: pictures come in several sizes, and only the small one compiles anew for each.
        self._preprocess, self._encode = jax.jit(preprocess), jax.jit(encode)
        self._module, self._batch_size = module, batch_size
        self._cache = FeatureCache()

    def __call__(self, images: jax.Array) -> jax.Array:
        """Pictures ``[N, H, W, 3]`` in [0, 1] to unit vectors ``[N, D]``, float32."""
        return in_batches(lambda x: self._encode(self._module, self._preprocess(x)), images, self._batch_size)

    def references(self, references: References) -> np.ndarray:
        """Unit vectors ``[R, D]`` of reference pictures of any sizes; computed once for each content."""

        def compute(places: list[int]) -> np.ndarray:
            pictures = (jnp.asarray(references.pictures[i])[None] / 255 for i in places)
            ready = jnp.concatenate([self._preprocess(p) for p in pictures])
            return np.asarray(in_batches(lambda x: self._encode(self._module, x), ready, self._batch_size))

        return self._cache.get(references.keys, compute)

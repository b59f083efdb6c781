"""Identity: does the picture show this character?

The similarity of a picture is its largest cosine to any reference picture, in the space of an image encoder
(DINOv2 for the real model). Similarity alone rewards copying a reference, so the reference's reward is a
*dead band*: nothing inside [low, high], and a penalty that grows outside of it.

Sources: DINOv2 (arXiv 2304.07193); UniCharacter (arXiv 2605.08129), Character-GRPO.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unichar_jax.errors import UserError
from unichar_jax.scoring.base import ScoreContext
from unichar_jax.scoring.features import ImageEncoder

REFERENCE_BAND = (0.5, 0.9)
"""Low and high of the reference's configuration."""


def nearest_cosine(features: jax.Array, references: jax.Array) -> jax.Array:
    """Largest cosine ``[N]`` of unit vectors ``[N, D]`` to any of ``[R, D]``."""
    return jnp.max(features @ references.T, axis=-1)


def dead_band(similarity: jax.Array, low: float, high: float) -> jax.Array:
    """``-2 (s - high)`` above the band, ``-2 (low - s)`` below it, 0 inside."""
    above, below = jnp.maximum(similarity - high, 0), jnp.maximum(low - similarity, 0)
    return -2 * (above + below)


class IdentityScorer:
    """Similarity to the references, or with ``band = (low, high)`` the dead band's penalty (at most 0)."""

    def __init__(
        self,
        encode: ImageEncoder,
        *,
        band: tuple[float, float] | None = None,
        name: str = "identity",
    ):
        if band is not None and not band[0] < band[1]:
            raise UserError(f"scorer '{name}': expected low < high in the band, got {band}.")
        self.name = name
        self._encode, self._band = encode, band

    def __call__(self, images: jax.Array, context: ScoreContext) -> jax.Array:
        if not context.references.pictures:
            raise UserError(
                f"scorer '{self.name}': the character has no reference pictures to compare with; give some,"
                " or leave this scorer out."
            )
        references = jnp.asarray(self._encode.references(context.references))
        similarity = nearest_cosine(self._encode(images), references)
        return similarity if self._band is None else dead_band(similarity, *self._band)

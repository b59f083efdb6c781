"""Diversity: how much a picture differs from the others of its group.

The score of a picture is its mean distance to the other pictures of its *whole* group, wherever they are in
the batch and on whatever device: a picture that repeats the others earns less than one that does not. (The
reference gives one number to all pictures of a group that happen to be on one device: no credit within the
group, and noise from the placement.) A group of one has diversity 0.

Sources: LPIPS (arXiv 1801.03924); UniCharacter (arXiv 2605.08129), Character-GRPO.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.models.encoders.lpips import Lpips
from unichar_jax.parallel.mesh import constrain
from unichar_jax.scoring.base import ScoreContext, group_table
from unichar_jax.scoring.features import ImageEncoder


def mean_distance_to_others(distances: jax.Array | np.ndarray, valid: jax.Array | np.ndarray) -> jax.Array:
    """Credit ``[..., G]`` from distances ``[..., G, G]`` (diagonal 0) of the ``valid [..., G]`` pictures."""
    total = jnp.sum(distances * valid[..., None, :], axis=-1)
    others = jnp.sum(valid, axis=-1, keepdims=True) - 1
    return jnp.where(valid, total / jnp.maximum(others, 1), 0)


class LpipsDiversity:
    """Mean LPIPS distance to the others of the group.

    Args:
      model: LPIPS.
      size: pictures are first resized to this side (bilinear with antialiasing); None compares them in full,
        as the reference does.
      name: what weights and curves call it.
    """

    def __init__(self, model: Lpips, *, size: int | None = None, name: str = "diversity"):
        self.name = name
        self._model, self._size = model, size
        self._credits = jax.jit(self._all_groups)

    def __call__(self, images: jax.Array, context: ScoreContext) -> jax.Array:
        index, valid = group_table(context.groups)
        return _to_pictures(self._credits(self._model, images, index, valid), index, valid)

    def _all_groups(self, model: Lpips, images: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
        if self._size is not None:
            shape = (images.shape[0], self._size, self._size, 3)
            images = jax.image.resize(images, shape, "linear", antialias=True)

        def one_group(group: tuple[jax.Array, jax.Array]) -> jax.Array:
            index, valid = group
            members = constrain(images[index], ("batch", None, None, None))
            return mean_distance_to_others(model.pairwise(model.features(members)), valid)

        # One group at a time: its five maps of every picture are the peak of memory.
        return jax.lax.map(one_group, (index, valid))


class FeatureDiversity:
    """Mean cosine distance ``1 - cos`` to the others of the group, in the space of an image encoder."""

    def __init__(self, encode: ImageEncoder, *, name: str = "diversity"):
        self.name = name
        self._encode = encode

    def __call__(self, images: jax.Array, context: ScoreContext) -> jax.Array:
        index, valid = group_table(context.groups)
        members = self._encode(images)[index]
        apart = 1 - jnp.einsum("kgd,khd->kgh", members, members)
        apart = apart * (1 - jnp.eye(index.shape[1]))  # rounding leaves the diagonal near 0
        return _to_pictures(mean_distance_to_others(apart, valid), index, valid)


def _to_pictures(by_group: jax.Array, index: np.ndarray, valid: np.ndarray) -> jax.Array:
    """From ``[K, G]`` back to the batch's order ``[N]``."""
    return jnp.zeros(valid.sum(), by_group.dtype).at[index[valid]].set(by_group[valid])

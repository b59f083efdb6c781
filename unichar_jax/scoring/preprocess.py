"""From pictures in [0, 1] to what a published encoder expects, on the device and in batches.

The published pipelines resize 8-bit pictures with PIL. Here the same arithmetic runs inside the compiled
program, so that a reward never leaves the device; ``tests/scoring/test_preprocess.py`` holds it to PIL's
result within one step of 255 (and the bilinear variant to PyTorch's, which does not round).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, cut out the centre square, normalise.

    Attributes:
      resize: length of the shorter side after resizing, in pixels; aspect is kept.
      crop: side of the centre square, in pixels.
      mean, std: of each channel, on the scale of [0, 1].
      filter: "bicubic" resizes as PIL does, "bilinear" as torchvision does with tensors; both antialias.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, images: jax.Array) -> jax.Array:
        """``[B, H, W, 3]`` in [0, 1] to ``[B, crop, crop, 3]``, float32, normalised."""
        b, height, width, _ = images.shape
        short = min(height, width)
        size = (self.resize * height // short, self.resize * width // short)
        x = images.astype(jnp.float32)
        if self.filter == "bicubic":
            x = pil_bicubic(x, *size)
        else:
            x = jax.image.resize(x, (b, *size, 3), "linear", antialias=True)
        top, left = ((n - self.crop) // 2 for n in size)
        x = x[:, top : top + self.crop, left : left + self.crop]
        return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def pil_bicubic(images: jax.Array, height: int, width: int) -> jax.Array:
    """PIL's bicubic resizing of ``[B, H, W, C]`` in [0, 1]: columns, then rows, each rounded to 8 bits.

    Where the filter overshoots, cutting between the passes changes a picture visibly; rounding hardly.
    """
    for axis, size in ((2, width), (1, height)):
        shape = (*images.shape[:axis], size, *images.shape[axis + 1 :])
        images = jax.image.resize(images, shape, "cubic", antialias=True)
        images = jnp.floor(255 * jnp.clip(images, 0, 1) + 0.5) / 255
    return images


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CLIP = Preprocess(224, 224, _CLIP_MEAN, _CLIP_STD)
"""As CLIP was trained (arXiv 2103.00020)."""

CLIP_BILINEAR = Preprocess(224, 224, _CLIP_MEAN, _CLIP_STD, "bilinear")
"""As UniCharacter's reward scores pictures (arXiv 2605.08129)."""

DINOV2 = Preprocess(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The Hub's processor of DINOv2 (arXiv 2304.07193)."""

"""Preprocessing on the device against PIL, which the published pipelines use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from unichar_jax.scoring import preprocess

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def picture(width: int, height: int, kind: str) -> Image.Image:
    """Hard edges, or noise: the two hard cases of resizing."""
    if kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
        return Image.fromarray(pixels.astype(np.uint8))
    image = Image.new("RGB", (width, height), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 5, height // 6, width // 2, height - 9), fill=(200, 20, 90), outline=(0, 0, 0))
    draw.line((3, 2, width - 5, height - 3), fill=(0, 0, 0), width=2)
    return image


def published(image: Image.Image, p: preprocess.Preprocess) -> np.ndarray:
    """Resize the shorter side with PIL, cut the centre, scale to [0, 1], normalise."""
    w, h = image.size
    short = min(w, h)
    image = image.resize((p.resize * w // short, p.resize * h // short), _FILTERS[p.filter])
    left, top = (image.width - p.crop) // 2, (image.height - p.crop) // 2
    image = image.crop((left, top, left + p.crop, top + p.crop))
    return (np.asarray(image) / 255 - np.array(p.mean)) / np.array(p.std)


@pytest.mark.parametrize("size", [(512, 512), (96, 96), (300, 411)], ids=str)
@pytest.mark.parametrize("name", ["CLIP", "CLIP_BILINEAR", "DINOV2"])
def test_against_pil(name, size):
    """Bicubic is PIL's to one step of 255; bilinear does not round, PIL does, once after each pass."""
    p = getattr(preprocess, name)
    images = [picture(*size, kind) for kind in ("edges", "noise")]
    got = np.asarray(jax.jit(p)(jnp.stack([np.asarray(image) for image in images]) / 255))
    assert got.shape == (2, p.crop, p.crop, 3)
    expected = np.stack([published(image, p) for image in images])
    difference = np.abs(got - expected) * np.array(p.std) * 255
    largest, mean = (1.01, 0.01) if p.filter == "bicubic" else (1.5, 0.4)
    assert difference.max() <= largest, f"largest difference {difference.max():.2f} of 255"
    assert difference.mean() <= mean, f"mean difference {difference.mean():.4f} of 255"

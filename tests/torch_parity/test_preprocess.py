"""Preprocessing on the device against the Hub's image processors and PyTorch's float resizing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.parity.golden import assert_close  # noqa: E402
from tests.scoring.test_preprocess import picture  # noqa: E402
from unichar_jax.scoring import preprocess  # noqa: E402

pytestmark = pytest.mark.torch


def _processor(name: str):
    if name == "CLIP":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil()
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    # The preprocessor_config.json of facebook/dinov2-base.
    return BitImageProcessorPil(
        size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )


@pytest.mark.parametrize("name", ["CLIP", "DINOV2"])
@pytest.mark.parametrize("size", [(330, 330), (301, 412)], ids=str)
def test_against_the_published_processor(name, size):
    p = getattr(preprocess, name)
    image = picture(*size, "edges")
    expected = _processor(name)(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    got = np.asarray(jax.jit(p)(jnp.asarray(np.asarray(image))[None] / 255))
    difference = np.abs(got - expected) * np.array(p.std) * 255
    assert difference.max() <= 1.01, f"largest difference {difference.max():.2f} of 255"
    assert difference.mean() <= 0.01, f"mean difference {difference.mean():.4f} of 255"


def test_bilinear_is_the_float_resizing_of_pytorch():
    p = preprocess.CLIP_BILINEAR
    pixels = np.asarray(picture(300, 411, "noise"), np.float32)[None] / 255
    resized = torch.nn.functional.interpolate(
        torch.tensor(pixels.transpose(0, 3, 1, 2)),
        size=(224 * 411 // 300, 224),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    top = (resized.shape[2] - 224) // 2
    expected = resized[:, :, top : top + 224].numpy().transpose(0, 2, 3, 1)
    got = np.asarray(jax.jit(p)(pixels)) * np.array(p.std) + np.array(p.mean)
    assert_close(got, expected, 1e-5, "resized pixels")

"""The vision tower against ``transformers``' SigLIP on full square grids (both number positions alike)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.parity.golden import assert_close  # noqa: E402
from tests.torch_parity.common import TOLERANCE, numpy_tensors, randomize  # noqa: E402
from unichar_jax.checkpoint import table  # noqa: E402
from unichar_jax.config.compute import Compute  # noqa: E402
from unichar_jax.config.model import MODEL_PRESETS, VisionConfig  # noqa: E402
from unichar_jax.models import params  # noqa: E402
from unichar_jax.models.autoencoder import patchify  # noqa: E402
from unichar_jax.models.streams import TokenMeta  # noqa: E402
from unichar_jax.models.unified import UnifiedModel  # noqa: E402

pytestmark = pytest.mark.torch

_PREFIX = "vit_model.vision_model."
_PATCH_WEIGHT = _PREFIX + "embeddings.patch_embedding.weight"


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_vision_tower_on_two_packed_images():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    v = VisionConfig(
        hidden_size=40, mlp_size=72, num_layers=3, num_heads=4, patch_size=6, max_patches_per_side=5
    )
    side = v.patch_size * v.max_patches_per_side
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=v.hidden_size,
            intermediate_size=v.mlp_size,
            num_hidden_layers=v.num_layers,
            num_attention_heads=v.num_heads,
            patch_size=v.patch_size,
            image_size=side,
            layer_norm_eps=v.norm_eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
            attn_implementation="eager",
        )
    )
    given = {
        _PREFIX + n.removeprefix("vision_model."): x for n, x in numpy_tensors(randomize(theirs)).items()
    }
    # A convolution of patches is a matmul: [O, C, kh, kw] -> [O, (kh, kw, C)], channel fastest.
    given[_PATCH_WEIGHT] = given[_PATCH_WEIGHT].transpose(0, 2, 3, 1).reshape(v.hidden_size, -1)

    cfg = dataclasses.replace(MODEL_PRESETS["debug"], vision=v)
    declared, entries = UnifiedModel(cfg, Compute(dtype="float32")), table.model_table(cfg)
    tensors = table.module_to_torch(params.initialize(declared, 1), entries)
    assert set(given) == {n for n in tensors if n.startswith(_PREFIX)}
    tower = table.module_from_torch(declared, entries, tensors | given).vision

    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images)).last_hidden_state.numpy()

    count = v.max_patches_per_side**2
    patches = patchify(jnp.asarray(images.transpose(0, 2, 3, 1)), v.patch_size).reshape(1, 2 * count, -1)
    grid = jnp.tile(jnp.arange(count), 2)[None]
    segment = jnp.repeat(jnp.array([[1, 2]]), count, axis=1)
    zero = jnp.zeros_like(segment)
    meta = TokenMeta(segment, zero, zero, jnp.ones_like(segment), zero)
    got = tower(patches, grid, meta, Compute(dtype="float32"))
    assert_close(got.reshape(2, count, -1), expected, TOLERANCE, "features")

"""Reading, drawing and learning over a cache with the GPU kernel (in interpret mode): dense attention's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.decoding import decode
from unichar_jax.config.compute import Compute
from unichar_jax.models import attention
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, text
from unichar_jax.sampling.flow import Contexts, FlowSettings, Guidance

from .conftest import CONFIG

GRID = (4, 3)


@pytest.fixture
def models(model: UnifiedModel, monkeypatch) -> tuple[UnifiedModel, UnifiedModel]:
    """The same weights with the kernel, whatever the number of queries, and with dense attention."""
    monkeypatch.setattr(attention, "FEW_QUERIES", 1)
    flash = jax.tree.map(lambda x: x, model)
    flash.compute = Compute(dtype="float32", attention="flash_interpret")
    return flash, model


def close(got, expected, tolerance: float = 2e-5) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(got) / scale, np.asarray(expected) / scale, atol=tolerance)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def read(model: UnifiedModel, prompts) -> kv.KVCache:
    """Texts of 5, 12 and 2 tokens; then a picture in two of the rows, and more text in two."""
    cache = kv.prefill_text(model, kv.empty(model, 3, 48), *prompts)
    grid = np.broadcast_to(np.arange(8), (3, 8))
    cache = kv.prefill_vit(model, cache, noise(3, 8, CONFIG.vision.patch_dim), grid, np.array([6, 0, 8]))
    cache = kv.prefill_latent(model, cache, noise(3, 8, CONFIG.latent_dim), grid, np.array([0, 4, 8]))
    return kv.prefill_text(model, cache, prompts[0][::-1], np.array([3, 9, 0]))


def test_what_is_read_is_what_dense_attention_reads(models, prompts):
    flash, dense = (read(model, prompts) for model in models)
    jax.tree.map(np.testing.assert_array_equal, flash.meta, dense.meta)
    np.testing.assert_array_equal(flash.length, [5 + 8 + 3, 12 + 6 + 9, 2 + 10 + 10])
    used = np.asarray(dense.meta.segment > 0)[None, :, None, :, None]
    for got, expected in ((flash.k, dense.k), (flash.v, dense.v)):
        close(got * used, np.asarray(expected * used))


@pytest.mark.slow
def test_a_velocity_is_the_same_and_so_is_its_gradient(models, prompts):
    """Rows of different lengths; learned from through the cache."""
    start, cache = noise(3, GRID[0] * GRID[1], CONFIG.latent_dim), read(models[1], prompts)

    def loss(x, model):
        v = flow.velocity(model, cache, x, jnp.float32(0.6), GRID)
        return jnp.square(v).sum(), v

    flash, dense = (jax.jit(jax.grad(loss, has_aux=True))(start, model) for model in models)
    for got, expected in zip(flash, dense, strict=True):
        close(got, np.asarray(expected))


@pytest.mark.slow
def test_pictures_are_the_same(models, prompts):
    """Guided by an empty context and by one of another capacity."""
    settings = FlowSettings(num_timesteps=3, guidance=Guidance(3.0, 1.5))
    start = noise(3, GRID[0] * GRID[1], CONFIG.latent_dim)
    text_alone = kv.prefill_text(models[1], kv.empty(models[1], 3, 16), *prompts)
    contexts = Contexts(read(models[1], prompts), None, text_alone)
    flash, dense = (flow.sample_latents(model, contexts, start, GRID, settings) for model in models)
    close(flash, np.asarray(dense), 1e-4)  # guidance triples what differs, twice


def test_texts_are_the_same(models, prompts):
    wanted = [text.TextSettings(max_tokens=6)] * 3
    flash, dense = (decode(model, read(model, prompts), wanted)[0] for model in models)
    assert flash == dense
    assert all(flash)


def test_the_kernel_is_what_reads_and_draws(models, prompts, monkeypatch):
    """Else the tests above compare dense attention with itself."""
    meta = kv.image_meta(read(models[1], prompts), jnp.full(3, 8), 8, noisy=1)
    cached = [read(models[1], prompts).meta]
    assert attention.prepare(meta, meta, "flash_interpret", cached).kernel == "flash_interpret"
    assert attention.prepare(meta, meta, "chunked", cached).kernel == "reference"
    assert attention.prepare(meta, meta, "flash_interpret", cached * 2).kernel == "reference"
    monkeypatch.setattr(attention, "FEW_QUERIES", 11)
    assert attention.prepare(meta, meta, "flash_interpret", cached).kernel == "reference"

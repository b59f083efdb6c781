"""The model against the reference numbers: autoencoder, tower, packed forward pass and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import golden
from tests.parity.golden import assert_close
from tests.parity.packed import train_batch
from unichar_jax.checkpoint import table
from unichar_jax.models import attention, params
from unichar_jax.models.streams import TokenMeta, VitStream, visible
from unichar_jax.training import objective

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_autoencoder():
    g, ae = golden.tensors(), golden.autoencoder()
    to_nhwc, to_nchw = (0, 2, 3, 1), (0, 3, 1, 2)
    mean, logvar = ae.moments(g["vae.image"].transpose(to_nhwc))
    latent = ae.sample(mean, logvar, g["vae.eps"].transpose(to_nhwc))
    decoded = ae.decode(g["vae.latent"].transpose(to_nhwc))
    for name, got in dict(mean=mean, logvar=logvar, latent=latent, decoded=decoded).items():
        assert_close(np.asarray(got).transpose(to_nchw), g[f"vae.{name}"], TOLERANCE, f"vae.{name}")


def test_patchify_of_pixels():
    g, cfg = golden.tensors(), golden.config().vision
    tokens = []
    for name in ("vit.image0", "vit.image1"):
        from unichar_jax.models.autoencoder import patchify

        tokens.append(np.asarray(patchify(g[name].transpose(1, 2, 0), cfg.patch_size)))
    np.testing.assert_array_equal(np.concatenate(tokens), g["vit.tokens"])


def test_vision_tower():
    g, model = golden.tensors(), golden.model()
    cfg = golden.config().vision
    lengths = [g[n].shape[1] * g[n].shape[2] // cfg.patch_size**2 for n in ("vit.image0", "vit.image1")]
    segment = jnp.asarray(np.repeat([1, 2], lengths)[None])
    zero, one = jnp.zeros_like(segment), jnp.ones_like(segment)
    meta = TokenMeta(segment, zero, zero, one, zero)
    vit = VitStream(jnp.asarray(g["vit.tokens"])[None], jnp.asarray(g["vit.position_ids"])[None], meta)
    hidden = model.vision(vit.patches, vit.grid, vit.meta, model.compute)
    assert_close(hidden[0], g["vit.hidden"], TOLERANCE, "vit.hidden")
    assert_close(model.embed_vit(vit)[0], g["vit.embed"], TOLERANCE, "vit.embed")


def test_visible_equals_reference_mask():
    packed = train_batch()
    meta = packed.meta_in_sequence_order()
    got = np.asarray(visible(meta, meta))[0]
    np.testing.assert_array_equal(got, golden.tensors()["train.attention_allowed"])


def test_packed_forward():
    g, model, packed = golden.tensors(), golden.model(), train_batch()
    x_t, t, target = objective.noised(packed.batch.latent, packed.x0, packed.noise, packed.shift)
    b = packed.batch
    metas = TokenMeta.concatenate(b.text.meta, b.vit.meta, b.latent.meta)
    und = jnp.concatenate([model.embed_text(b.text.ids), model.embed_vit(b.vit)], axis=1)
    gen = model.embed_latent(x_t, t, b.latent.grid)
    u, v, _ = model.backbone(und, gen, metas)
    hidden = np.zeros_like(g["train.last_hidden"])
    hidden[packed.sequence_index] = np.concatenate([u[0], v[0]])
    assert_close(hidden, g["train.last_hidden"], TOLERANCE, "train.last_hidden")

    text_hidden, latent_hidden = model.forward(b.text, b.vit, x_t, t, b.latent.grid, b.latent.meta)
    labelled = np.asarray(b.text.weight[0]) > 0
    ce = objective.token_cross_entropy(model.logits(text_hidden), b.text.targets)[0][labelled]
    assert_close(ce, g["train.ce_per_token"], TOLERANCE, "train.ce_per_token")
    drawn = np.asarray(b.latent.weight[0]) > 0
    mse = jnp.square(model.velocity(latent_hidden) - target)[0][drawn]
    assert_close(mse, g["train.mse_per_token"], TOLERANCE, "train.mse_per_token")


def _loss(model, packed, chunk=5):
    terms = objective.unified_terms(
        model, packed.batch, packed.x0, packed.noise, shift=packed.shift, chunk=chunk
    )
    return objective.combine(terms, objective.weights_of(packed.batch), 0.25, 1.0), terms


def test_losses():
    g, packed = golden.tensors(), train_batch()
    loss, terms = _loss(golden.model(), packed)
    assert_close(terms.ce / terms.ce_weight, g["train.loss_ce"], TOLERANCE, "train.loss_ce")
    assert_close(terms.mse / terms.mse_weight, g["train.loss_mse"], TOLERANCE, "train.loss_mse")
    assert_close(loss, g["train.loss"], TOLERANCE, "train.loss")


@pytest.mark.parametrize("remat", ["none", "full", "attention", "most"])
def test_gradients(remat):
    from unichar_jax.config.compute import Compute

    packed = train_batch()
    model = golden.model(Compute(dtype="float32", remat=remat))
    gradient = jax.jit(jax.grad(lambda m: _loss(m, packed)[0]))(model)
    got = table.module_to_torch(gradient, table.model_table(golden.config()))
    expected = golden.weights("train_grads.safetensors")
    assert set(got) == set(expected)
    total = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in expected.values()))
    assert_close(total, golden.tensors()["train.grad_norm"], TOLERANCE, "train.grad_norm")
    for name, value in got.items():
        if _mathematically_zero(name):
            assert np.linalg.norm(value) <= 1e-6 * total, name
        else:
            assert_close(value, expected[name], GRADIENT_TOLERANCE, name)


def _mathematically_zero(name: str) -> bool:
    """Softmax does not change when one vector is added to all keys: the tower's key biases have no gradient.

    (The decoder's key biases pass through a norm and a rotation, so theirs do.)
    """
    return name.startswith("vit_model.") and name.endswith(".k_proj.bias")


def test_frozen_tables_are_recomputed():
    for name, expected in golden.weights().items():
        if name in table.frozen_tables(golden.config()):
            np.testing.assert_array_equal(table.frozen_table(golden.config(), name), expected)


def test_declarations_cover_the_real_model():
    """BAGEL-7B-MoT by abstract evaluation: no weights in memory."""
    from unichar_jax.config.model import ModelConfig
    from unichar_jax.models.autoencoder import Autoencoder
    from unichar_jax.models.unified import UnifiedModel

    cfg = ModelConfig()
    entries, frozen = table.model_table(cfg), table.frozen_tables(cfg)
    frozen_count = sum(side * side * width for side, width in frozen.values())
    assert len(entries) + len(frozen) == 1223
    assert params.count(UnifiedModel(cfg)) + frozen_count == 14_607_260_128
    gen = [e for e in entries if "moe_gen" in e.torch]
    assert len(gen) == 393
    assert sum(int(np.prod(e.shape)) for e in gen) == 6_525_628_928
    assert len(table.autoencoder_table(cfg.autoencoder)) == 244
    assert params.count(Autoencoder(cfg.autoencoder)) == 83_819_683


def test_rows_that_see_nothing_are_zero():
    meta = TokenMeta(*(jnp.zeros((1, 3), jnp.int32) for _ in range(5)))
    q = jnp.ones((1, 3, 2, 4))
    out = attention.attend(attention.prepare(meta, meta), q, q, q)
    assert not np.asarray(out).any()

"""The mini autoencoder's training: losses, crops, files, and what the shipped weights achieve."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.safetensors_io import open_file, write_file
from unichar_jax.config.model import model_preset
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from workshop.minimodel import autoencoder as ae
from workshop.minimodel.small import Pool, picture_pool

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "mini" / "ae.safetensors"


@pytest.fixture(scope="module")
def model():
    return params.initialize(Autoencoder(model_preset("mini").autoencoder), 0)


def test_losses_have_their_known_values():
    x = jnp.zeros((2, 4, 4, 3))
    assert float(ae.reconstruction_loss(x, x)) == 0
    # A constant error of 0.5 has no edges: 0.5 + 4 * 0.25.
    assert float(ae.reconstruction_loss(x + 0.5, x)) == pytest.approx(1.5)
    column = x.at[:, :, 2:].set(1.0)  # one edge between columns 1 and 2 of each row
    assert float(ae.reconstruction_loss(column, x)) == pytest.approx(0.5 + 4 * 0.5 + 0.5 / 3)
    zeros = jnp.zeros((2, 3))
    assert float(ae.kl_to_standard_normal(zeros, zeros)) == 0
    assert float(ae.kl_to_standard_normal(zeros + 2, zeros)) == pytest.approx(2.0)
    assert float(ae.kl_to_standard_normal(zeros, zeros + np.log(4))) == pytest.approx(1.5 - np.log(2))


def test_psnr_is_a_mean_over_pictures():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    other = black.copy()
    other[0], other[1] = 255, 51  # 0 dB, and 20 log10(5) dB
    assert ae.psnr(black, other) == pytest.approx(0.5 * 20 * np.log10(5))


def test_crops_are_windows_of_the_pool():
    pictures = np.arange(96 * 96 * 3, dtype=np.uint32).reshape(1, 96, 96, 3).astype(np.uint8)
    windows = ae.crops(Pool(pictures, np.zeros((1, 10))), np.random.default_rng(0), 3, 64)
    assert windows.shape == (3, 64, 64, 3)
    every = {pictures[0, y : y + 64, x : x + 64].tobytes() for y in range(33) for x in range(33)}
    assert all(window.tobytes() in every for window in windows)


def test_files_have_the_published_names_and_come_back_exactly(model, tmp_path):
    path = tmp_path / "ae.safetensors"
    ae.save_weights(path, model)
    names = open_file(path).tensors
    assert names["encoder.down.1.block.0.nin_shortcut.weight"].shape == (16, 8, 1, 1)
    assert names["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    back = ae.load_weights(path)
    for (name, a), b in zip(params.named_leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_foreign_file_is_refused(tmp_path):
    write_file(tmp_path / "x.safetensors", {"a": ((1,), np.float32)}, [("a", np.zeros(1, np.float32))])
    with pytest.raises(UserError, match="not an autoencoder of the mini preset"):
        ae.load_weights(tmp_path / "x.safetensors")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="--start"):
        ae.AutoencoderTraining(decoder_only=True)
    with pytest.raises(UserError, match="multiple of 8"):
        ae.AutoencoderTraining(crop=60)


def test_decoder_only_gives_the_encoder_no_gradient(model):
    cfg = ae.AutoencoderTraining(decoder_only=True, start=SHIPPED, latent_noise=0.3)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    grads, _ = jax.jit(jax.grad(ae.make_loss(cfg), has_aux=True))(
        params.flat(model), pictures, jax.random.key(0)
    )
    for name, g in grads.items():
        assert bool(jnp.any(g != 0)) == name.startswith("decoder."), name


def test_statistics_say_how_to_normalise(model):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    found = ae.latent_statistics(model, pictures)
    mean, logvar = (np.asarray(x, np.float64) for x in model.moments(pictures / 127.5 - 1.0))
    assert found["shift"] == pytest.approx(mean.mean(), rel=1e-3)
    assert found["scale"] == pytest.approx((mean.var() + np.exp(logvar).mean()) ** -0.5, rel=1e-3)


def test_shipped_weights_keep_the_pictures(tmp_path):
    if not SHIPPED.exists():
        pytest.skip("checkpoints/mini/ae.safetensors is not in this checkout")
    shipped = ae.load_weights(SHIPPED)
    assert {e.torch for e in table.autoencoder_table(shipped.cfg)} == set(open_file(SHIPPED).tensors)
    pictures = np.asarray(picture_pool(tmp_path, 16, seed=9_000_001).pictures)
    assert ae.psnr(pictures, ae.reconstruct(shipped, pictures)) > 24


@pytest.mark.slow
def test_a_run_from_start_to_files_and_a_refined_decoder(tmp_path):
    cfg = ae.AutoencoderTraining(
        out=tmp_path / "out",
        work=tmp_path / "work",
        pool=tmp_path / "pool",
        minutes=0.05,
        whole_after=1.0,
        pictures=8,
        measured=8,
        crop=16,
        batch=1,
    )
    first = ae.publish(cfg, ae.train(cfg))
    weights = cfg.out / "ae.safetensors"
    encoder = {n: np.array(x) for n, x in params.flat(ae.load_weights(weights)).items() if n[:2] == "en"}
    assert (cfg.out / "logs" / "autoencoder.jsonl").read_text().count('"step"') == 1
    refine = dataclasses.replace(cfg, work=tmp_path / "refine", decoder_only=True, start=weights)
    second = ae.publish(refine, ae.train(refine))
    assert second["step"] > 1
    assert second["scale"] == first["scale"]
    after = params.flat(ae.load_weights(weights))
    for name, x in encoder.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)

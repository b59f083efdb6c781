"""The autoencoder in pieces: the same picture whole, in strips, by blocks of queries, and nearly in bfloat16."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from unichar_jax.checkpoint import store
from unichar_jax.models import autoencoder as ae
from unichar_jax.models import params
from workshop.miniworld import unnamed

MINI = Path(__file__).parents[2] / "checkpoints" / "mini"


@pytest.fixture(scope="module")
def mini() -> ae.Autoencoder:
    return store.load_autoencoder(MINI)


@pytest.fixture(scope="module")
def latents(mini: ae.Autoencoder) -> jax.Array:
    pictures = np.stack([np.asarray(unnamed.unnamed_sample(900 + i)["image"]) for i in range(8)])
    return jax.jit(lambda a, x: a.encode(x))(mini, pictures.astype(np.float32) / 127.5 - 1)


def decoded(autoencoder: ae.Autoencoder, latents: jax.Array) -> np.ndarray:
    """In grey levels, not yet whole ones."""
    values = jax.jit(lambda a, z: a.decode(z))(autoencoder, latents)
    return np.clip(np.asarray(values) * 0.5 + 0.5, 0, 1) * 255


def test_bfloat16_moves_a_picture_by_less_than_a_grey_level(mini: ae.Autoencoder, latents: jax.Array) -> None:
    whole = decoded(mini, latents)
    moved = np.abs(decoded(ae.decoding_in(mini, "bfloat16"), latents) - whole)
    assert 0 < moved.mean() < 0.15
    assert np.mean(moved >= 1) < 1e-3
    np.testing.assert_array_equal(decoded(ae.decoding_in(mini, "float32"), latents), whole)


def test_only_the_decoders_inner_convolutions_change(mini: ae.Autoencoder) -> None:
    lowered = params.flat(ae.decoding_in(mini, "bfloat16"))
    changed = {name for name, x in lowered.items() if x.dtype != np.float32}
    assert changed
    assert all(".conv" in n or ".nin_shortcut" in n or ".upsample" in n for n in changed)
    assert not any(n.startswith("encoder") or "conv_in" in n or "conv_out" in n for n in changed)


@pytest.mark.parametrize("positions", [2**10, 3 * 2**8])
def test_strips_and_blocks_are_the_whole(mini, latents, monkeypatch, positions: int) -> None:
    """Strips of 96 x 96 positions and of fewer, in numbers that divide the height or not; queries by 50."""
    one = latents[:1]
    whole = decoded(mini, one)
    monkeypatch.setattr(ae, "POSITIONS_AT_ONCE", positions)
    monkeypatch.setattr(ae, "QUERIES_AT_ONCE", 50)
    lowered = jax.jit(lambda a, z: a.decode(z)).lower(mini, one).as_text()
    assert lowered.count("stablehlo.while") > 5
    np.testing.assert_allclose(decoded(mini, one), whole, atol=2e-3)  # of 255: float32's rounding


def test_strips_of_a_batch_are_the_whole(mini: ae.Autoencoder, latents: jax.Array, monkeypatch) -> None:
    whole = decoded(mini, latents)
    monkeypatch.setattr(ae, "POSITIONS_AT_ONCE", 2**13)
    np.testing.assert_allclose(decoded(mini, latents), whole, atol=2e-3)

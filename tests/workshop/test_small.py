"""The loop of the small models: pools are drawn once, runs resume, frozen weights stay."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.errors import UserError
from workshop.minimodel import small

TARGET = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3).repeat(2, axis=1)


def _fit(work, minutes=5.0, **settings):
    """A linear regression of 100 steps a minute, on a clock that each look moves by 0.6 s."""
    ticks = itertools.count()
    weights = {"a.kernel": jnp.zeros((4, 6)), "b.bias": jnp.ones(6)}

    def loss_fn(weights, batch, key):
        loss = jnp.square(batch @ weights["a.kernel"] + weights["b.bias"] - batch @ TARGET).mean()
        return loss, {"loss": loss}

    def batch_fn(rng, progress):
        assert 0 <= progress < 1
        return rng.standard_normal((8, 4)).astype(np.float32)

    budget = small.Budget(work, minutes, learning_rate=0.05, report_minutes=1.0, **settings)
    measure = lambda w: {"measured": float(w["b.bias"][0])}  # noqa: E731
    return small.fit(budget, weights, loss_fn, batch_fn, measure, clock=lambda: 0.6 * next(ticks))


def test_fit_learns_logs_and_resumes_where_it_ended(tmp_path):
    state = _fit(tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert log[-1]["step"] == int(state.step)
    assert log[-1]["measured"] == pytest.approx(float(state.average["b.bias"][0]), rel=1e-4)
    again = _fit(tmp_path)  # the time is spent: nothing is trained
    assert int(again.step) == int(state.step)
    np.testing.assert_array_equal(again.weights["a.kernel"], state.weights["a.kernel"])
    longer = _fit(tmp_path, minutes=6.0)
    assert int(state.step) + 100 <= int(longer.step) <= int(state.step) + 102


def test_frozen_weights_stay_bit_for_bit(tmp_path):
    state = _fit(tmp_path, frozen="b.")
    np.testing.assert_array_equal(state.weights["b.bias"], np.ones(6, np.float32))
    np.testing.assert_array_equal(state.average["b.bias"], np.ones(6, np.float32))
    assert np.abs(np.asarray(state.weights["a.kernel"])).max() > 0


def test_a_state_of_another_model_is_refused(tmp_path):
    small.save_state(tmp_path / "state.npz", small.fresh_state({"a.kernel": jnp.zeros((3, 4))}))
    with pytest.raises(UserError, match=r"state\.npz.*Remove the file"):
        small.load_state(tmp_path / "state.npz", small.fresh_state({"a.kernel": jnp.zeros((4, 4))}))


def test_learning_rate_warms_up_and_decays(tmp_path):
    budget = small.Budget(tmp_path, 1.0, learning_rate=1.0)
    assert budget.rate_at(0, 0.0) == pytest.approx(0.01)
    assert budget.rate_at(1000, 0.0) == pytest.approx(1.0)
    assert budget.rate_at(1000, 0.5) == pytest.approx(0.505)
    assert budget.rate_at(1000, 1.0) == pytest.approx(0.01)


def test_a_pool_is_drawn_once_and_keeps_characters_together(tmp_path):
    pool = small.picture_pool(tmp_path, 6, seed=1, scenes=2)
    assert pool.pictures.shape == (6, 96, 96, 3)
    assert pool.pictures.dtype == np.uint8
    looks = pool.labels[:, :6]
    np.testing.assert_array_equal(looks[0::2], looks[1::2])
    assert (looks[0] != looks[2]).any()
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = small.picture_pool(tmp_path, 6, seed=1, scenes=2)
    np.testing.assert_array_equal(again.pictures, pool.pictures)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(small.to_pixels(small.to_float(pixels)), pixels)
    np.testing.assert_array_equal(small.to_pixels(np.array([-1.5, 1.5])), [0, 255])

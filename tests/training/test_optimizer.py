"""The learning-rate schedules."""

from __future__ import annotations

import numpy as np
import pytest

from unichar_jax.config.train import OptimizerConfig
from unichar_jax.errors import UserError
from unichar_jax.training.optimizer import schedule

PEAK, LEAST = 2e-3, 1e-4


def rates(kind: str, steps: int = 100, **more: int) -> np.ndarray:
    cfg = OptimizerConfig(learning_rate=PEAK, min_learning_rate=LEAST, warmup_steps=10, schedule=kind, **more)
    rate = schedule(cfg, steps)
    return np.asarray([float(rate(i)) for i in range(steps + 1)])


def test_every_schedule_warms_up_linearly_from_zero():
    for kind, more in (("constant", {}), ("cosine", {}), ("trapezoid", {"decay_steps": 40})):
        np.testing.assert_allclose(rates(kind, **more)[:11], np.linspace(0, PEAK, 11), rtol=1e-5)


def test_trapezoid_is_flat_and_then_falls_in_a_straight_line_to_the_least_at_the_last_step():
    found = rates("trapezoid", decay_steps=40)
    np.testing.assert_allclose(found[10:61], PEAK, rtol=1e-6)
    np.testing.assert_allclose(found[60:], np.linspace(PEAK, LEAST, 41), rtol=1e-5)


def test_trapezoids_of_different_lengths_agree_before_the_decay():
    np.testing.assert_array_equal(
        rates("trapezoid", 100, decay_steps=40)[:60], rates("trapezoid", 200, decay_steps=40)[:60]
    )


def test_cosine_ends_at_the_least_rate():
    assert rates("cosine")[-1] == pytest.approx(LEAST, rel=1e-5)


@pytest.mark.parametrize(("kind", "decay"), [("trapezoid", 0), ("cosine", 10)])
def test_decay_steps_belong_to_the_trapezoid(kind, decay):
    with pytest.raises(UserError, match="decay_steps"):
        rates(kind, decay_steps=decay)

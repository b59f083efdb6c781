"""Times, and the laws that a stochastic step must obey whatever its numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.errors import UserError
from unichar_jax.sampling import schedule
from unichar_jax.sampling.schedule import Noising

TIMES = schedule.times(9, 3.0)


def draw(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 3, 4))


def test_times_fall_from_one_to_zero_and_lean_towards_noise() -> None:
    assert TIMES[0] == 1
    assert TIMES[-1] == 0
    assert np.all(np.diff(TIMES) < 0)
    np.testing.assert_allclose(TIMES[4], 3 * 0.5 / (1 + 2 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(schedule.times(5, 1.0), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("solver", schedule.SOLVERS)
def test_a_step_without_noise_is_the_deterministic_one(solver: str) -> None:
    taken = schedule.step(Noising(solver, 0.0), draw(0), draw(1), TIMES[2], TIMES[3], TIMES[1], noise=draw(2))
    expected = schedule.euler(draw(0), draw(1), TIMES[2], TIMES[3])
    np.testing.assert_allclose(taken.next, expected, atol=1e-6)
    np.testing.assert_array_equal(taken.log_prob, 0)


@pytest.mark.parametrize(("solver", "level"), [("sde", 1.3), ("cps", 0.8)])
def test_a_drawn_sample_is_judged_as_it_was_drawn(solver: str, level: float) -> None:
    law, args = Noising(solver, level), (draw(0), draw(1), TIMES[2], TIMES[3], TIMES[1])
    drawn = schedule.step(law, *args, noise=draw(2))
    judged = schedule.step(law, *args, sample=drawn.next)
    np.testing.assert_array_equal(judged.log_prob, drawn.log_prob)
    assert np.all(np.asarray(drawn.log_prob) < 0)
    at_the_mean = schedule.step(law, *args, sample=drawn.mean)
    np.testing.assert_array_equal(at_the_mean.log_prob, 0)


def test_sde_log_prob_is_that_of_its_gaussian() -> None:
    noise = draw(2)
    taken = schedule.step(Noising("sde", 1.3), draw(0), draw(1), TIMES[2], TIMES[3], TIMES[1], noise=noise)
    np.testing.assert_allclose(taken.log_prob, -np.square(noise).mean(axis=(1, 2)) / 2, rtol=1e-4)


@pytest.mark.parametrize("solver", schedule.SOLVERS)
def test_times_may_differ_by_row(solver: str) -> None:
    law, steps = Noising(solver, 0.7), np.array([0, 4])
    both = schedule.step(law, draw(0), draw(1), TIMES[steps], TIMES[steps + 1], TIMES[1], noise=draw(2))
    for row, i in enumerate(steps):
        one = schedule.step(
            law,
            *(x[row : row + 1] for x in (draw(0), draw(1))),
            TIMES[i],
            TIMES[i + 1],
            TIMES[1],
            noise=draw(2)[row : row + 1],
        )
        np.testing.assert_allclose(both.next[row], one.next[0], rtol=1e-5)
        np.testing.assert_allclose(both.log_prob[row], one.log_prob[0], rtol=1e-5)


@pytest.mark.parametrize("index", [0, 7])
def test_log_prob_has_a_finite_gradient_at_both_ends_of_the_schedule(index: int) -> None:
    def log_prob(v: jax.Array) -> jax.Array:
        taken = schedule.step(
            Noising("sde", 1.3), draw(0), v, TIMES[index], TIMES[index + 1], TIMES[1], sample=draw(3)
        )
        return taken.log_prob.sum()

    assert np.all(np.isfinite(jax.grad(log_prob)(draw(1))))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'sde'"):
        Noising("sdee")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"noising\.level"):
        Noising(level=-1)
    with pytest.raises(UserError, match="at least 2 times"):
        schedule.times(1, 3.0)
    with pytest.raises(ValueError, match="either noise or sample"):
        schedule.step(Noising(), jnp.zeros((1, 1)), jnp.zeros((1, 1)), 0.5, 0.4, 0.9)

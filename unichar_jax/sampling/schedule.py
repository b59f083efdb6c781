"""Times of the flow, and one step along it: Euler, SDE and CPS.

Times run from 1 (noise) to 0 (data). A stochastic step is a Gaussian around a mean; ``step`` returns the
mean, the next sample, its log-probability and the noise scale, and is the same pure function in a rollout
(which draws the next sample) and in the policy update (which is given it). Everything is float32 and
broadcasts over the batch.

Sources: the SDE of Flow-GRPO (arXiv 2505.05470), coefficients-preserving sampling (CPS, arXiv 2509.05952),
both as used by UniCharacter (arXiv 2605.08129).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.errors import UserError, require_known

Solver = Literal["sde", "cps"]
SOLVERS = ("sde", "cps")


def times(num_timesteps: int, shift: float) -> np.ndarray:
    """``num_timesteps`` times from 1 to 0, float32: ``s u / (1 + (s - 1) u)`` of evenly spaced u.

    They bound ``num_timesteps - 1`` steps, each of one model evaluation (one for each guidance branch).
    """
    if num_timesteps < 2 or shift <= 0:
        raise UserError(
            f"schedule: num_timesteps {num_timesteps} and shift {shift}: expected at least 2 times and a"
            " positive shift."
        )
    # float32 throughout, as in the reference: 1 - t near t = 1 magnifies the rounding.
    u, s = np.linspace(1, 0, num_timesteps, dtype=np.float32), np.float32(shift)
    return s * u / (1 + (s - 1) * u)


class Step(NamedTuple):
    """One stochastic step.

    Attributes:
      mean: of the next sample, ``[B, ...]``.
      next: the next sample, ``[B, ...]``.
      log_prob: ``[B]``, of ``next``: the mean over its elements, without the normalising constant; 0 where
        the step is deterministic.
      scale: the noise scale sigma, shape of ``t``.
    """

    mean: jax.Array
    next: jax.Array
    log_prob: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class Noising:
    """How a step is made stochastic.

    Attributes:
      solver: "sde" (Flow-GRPO) or "cps".
      level: noise level eta; 0 makes every step deterministic.
    """

    solver: Solver = "sde"
    level: float = 1.3

    def __post_init__(self) -> None:
        require_known("noising.solver:", self.solver, SOLVERS)
        if self.level < 0:
            raise UserError(f"noising.level: expected at least 0, got {self.level}.")


def euler(x: jax.Array, v: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """The deterministic step ``x + v (t' - t)``."""
    return x + v * _wide(t_next - t, x)


def step(
    noising: Noising,
    x: jax.Array,
    v: jax.Array,
    t: jax.Array,
    t_next: jax.Array,
    t_second: jax.Array,
    *,
    noise: jax.Array | None = None,
    sample: jax.Array | None = None,
) -> Step:
    """One stochastic step; give ``noise`` to draw the next sample, or ``sample`` to judge a given one.

    Args:
      noising: solver and noise level.
      x: the sample at ``t``, float32 ``[B, N, D]``.
      v: velocity (data to noise) there.
      t, t_next: times of this step, scalars or ``[B]``.
      t_second: second time of the schedule; stands in for t = 1, where the SDE's scale diverges.
      noise: standard normal like x.
      sample: the next sample.
    """
    if (noise is None) == (sample is None):
        raise ValueError("step: give either noise or sample")
    law = _sde if noising.solver == "sde" else _cps
    mean, scale, std, precision = law(noising.level, x, v, t, t_next, t_second)
    if sample is None:
        sample = mean + _wide(std, x) * noise
    error = jnp.square(sample - mean) * _wide(precision, x)
    log_prob = -error.mean(axis=tuple(range(1, x.ndim)))
    return Step(mean, sample, log_prob, scale)


def _sde(level, x, v, t, t_next, t_second):
    """``sigma = eta sqrt(t / (1 - t))``; the drift keeps the marginals of the flow."""
    dt = t_next - t
    scale = level * jnp.sqrt(t / (1 - jnp.where(t == 1, t_second, t)))
    half = scale**2 / 2
    mean = x * _wide(1 + half * dt / t, x) + v * _wide((1 + half * (1 - t) / t) * dt, x)
    variance = scale**2 * -dt
    precision = jnp.where(variance > 0, 0.5 / jnp.where(variance > 0, variance, 1), 0)
    return mean, scale, scale * jnp.sqrt(-dt), precision


def _cps(level, x, v, t, t_next, t_second):
    """``sigma = t' sin(eta pi / 2)``; noise replaces a part of the predicted noise, so its amount is kept."""
    del t_second
    scale = t_next * jnp.sin(level * jnp.pi / 2)
    data, noise = x - _wide(t, x) * v, x + _wide(1 - t, x) * v
    kept = jnp.sqrt(t_next**2 - scale**2)
    mean = data * _wide(1 - t_next, x) + noise * _wide(kept, x)
    return mean, scale, scale, jnp.where(scale > 0, 1.0, 0.0)


def _wide(coefficient: jax.Array, x: jax.Array) -> jax.Array:
    """A scalar or ``[B]`` coefficient shaped to multiply ``[B, ...]``."""
    coefficient = jnp.asarray(coefficient, jnp.float32)
    trailing = x.ndim - coefficient.ndim if coefficient.ndim else 0
    return coefficient.reshape(coefficient.shape + (1,) * trailing)

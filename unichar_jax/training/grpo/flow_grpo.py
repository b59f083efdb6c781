"""Flow-GRPO: a few steps of the flow are made stochastic, and the likely ones among the good are made
likelier.

For a stochastic step ``x -> x'`` with Gaussian mean mu and deviation s, the log-probability is the *mean*
over elements of ``-(x' - mu)^2 / (2 s^2)`` and the loss is that of PPO, ``max(-A r, -A clip(r, 1 - low, 1 +
high))`` with ratio ``r = exp(log p - log p_old)``. Old log-probabilities are the rollout's own; they are
never computed again. Guidance is part of the policy: both branches carry gradient, unless the policy is
guidance-free.

Optional: the divergence from the reference model, ``mean((mu - mu_ref)^2) / (2 s^2)``, where ``s^2`` has
the factor |dt| that the variance of a step has; and GRPO-Guard's ratio. The log-ratio of two Gaussians
around nearby means has a negative mean and a spread that depends on the step; Guard removes both, which
leaves ``log r = mean(z (mu - mu_old))`` with z the noise of the rollout (drawn again from its key), and
divides the loss by |dt| to weigh steps alike.

Sources: Flow-GRPO (arXiv 2505.05470); a window of steps, MixGRPO (arXiv 2507.21802); PPO (arXiv
1707.06347); GRPO-Guard (arXiv 2510.22319); constants of UniCharacter (arXiv 2605.08129).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.config.grpo import FlowGRPOConfig
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import flow
from unichar_jax.sampling.flow import Contexts, Grid, RolloutSettings
from unichar_jax.training.grpo.algorithm import Metrics, Policies


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """The stochastic steps of B pictures.

    Attributes:
      latents: before each step and after the last, float32 ``[B, w + 1, N, latent_dim]``.
      log_probs: of the steps as they were drawn, ``[B, w]``.
      steps: their indices in the schedule, int32 ``[B, w]``.
      keys: the pictures' random keys ``[B]``.
    """

    latents: jax.Array
    log_probs: jax.Array
    steps: jax.Array
    keys: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Item:
    """A stochastic step ``x -> next`` (``[..., N, latent_dim]``): log-probability, index, picture's key."""

    x: jax.Array
    next: jax.Array
    log_prob: jax.Array
    step: jax.Array
    key: jax.Array


@dataclass(frozen=True)
class FlowGRPO:
    """See the module's docstring.

    Attributes:
      cfg: clip ranges and switches.
      settings: times, guidance, noise and window.
      grid: rows and columns of latent tokens.
      share_prefix: a group shares its initial noise and the steps before its window.
      ema_decay: of the averaged weights that are saved beside the learner's.
    """

    cfg: FlowGRPOConfig
    settings: RolloutSettings
    grid: Grid
    share_prefix: bool = False
    ema_decay: float = 0.0
    follows = False

    @property
    def kl(self) -> float:
        return self.cfg.kl

    def decay(self, round_: int) -> float:
        del round_
        return self.ema_decay

    def draw(
        self,
        model: UnifiedModel,
        contexts: Contexts,
        keys: jax.Array,
        start: jax.Array,
        *,
        noise: jax.Array | None = None,
        step_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, Record]:
        """As ``Algorithm.draw``; given noise (see ``flow.rollout``) replaces the keys' in tests."""
        if noise is None:
            group = keys.shape[0] // contexts.full.batch
            own = keys[::group] if self.share_prefix else keys
            noise = flow.draw_noise(own, 0, self.grid, model.cfg.latent_dim)
        rolled = flow.rollout(
            model, contexts, noise, keys, start, self.grid, self.settings, step_noise=step_noise
        )
        steps = jnp.broadcast_to(rolled.steps, rolled.log_probs.shape)
        return rolled.final, Record(rolled.latents, rolled.log_probs, steps, keys)

    def items(self, record: Record, key: jax.Array) -> Item:
        del key
        keys = jnp.broadcast_to(record.keys[:, None], record.steps.shape)
        before, after = record.latents[:, :-1], record.latents[:, 1:]
        return Item(before, after, record.log_probs, record.steps, keys)

    def loss(
        self, policies: Policies, contexts: Contexts, items: Item, advantages: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        cfg = self.cfg
        taken = self._judge(policies.learner, contexts, items)
        log_ratio = taken.log_prob - items.log_prob
        drift = log_ratio
        std = self._std(taken.scale, items.step)
        weight = 1.0
        if cfg.ratio_norm:
            z = self._noise(items)
            old_mean = items.next - std[:, None, None] * z
            log_ratio = (z * (taken.mean - old_mean)).mean(axis=(1, 2))
            weight = 1 / self._dt(items.step)
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = weight * jnp.maximum(-advantages * ratio, -advantages * clipped)
        metrics = {
            "policy_loss": loss,
            "ratio_drift": jnp.abs(jnp.expm1(drift)),
            "clip_low": (ratio < 1 - cfg.clip_low).astype(jnp.float32),
            "clip_high": (ratio > 1 + cfg.clip_high).astype(jnp.float32),
        }
        if policies.reference is not None:
            mean = jax.lax.stop_gradient(self._judge(policies.reference, contexts, items).mean)
            kl = jnp.square(taken.mean - mean).mean(axis=(1, 2)) / (2 * jnp.square(std))
            loss, metrics["kl"] = loss + cfg.kl * kl, kl
        return loss, metrics

    def _judge(self, model: UnifiedModel, contexts: Contexts, items: Item):
        rows = flow.branches(model, contexts, self.settings.flow.guidance)
        return flow.policy_step(model, rows, items.x, items.step, self.grid, self.settings, sample=items.next)

    def _dt(self, step: jax.Array) -> jax.Array:
        """Length of a step, positive."""
        times = jnp.asarray(self.settings.flow.times)
        return times[step] - times[step + 1]

    def _std(self, scale: jax.Array, step: jax.Array) -> jax.Array:
        """Deviation of a step's Gaussian from its noise scale."""
        if self.settings.noising.solver == "cps":
            return scale
        return scale * jnp.sqrt(self._dt(step))

    def _noise(self, items: Item) -> jax.Array:
        """The noise that the rollout drew for each step."""

        def draw(key: jax.Array, step: jax.Array) -> jax.Array:
            return flow.draw_noise(key[None], step + 1, self.grid, items.x.shape[-1])[0]

        return jax.vmap(draw)(items.key, items.step)

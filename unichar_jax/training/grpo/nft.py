"""DiffusionNFT: learn from clean pictures on the forward process; no log-probabilities, any solver.

A policy draws pictures along the deterministic flow. Each is noised again, ``x_t = (1 - t) x_0 + t n``, and
the learner's velocity v is judged in two implicit policies around the velocity v_old of the one that drew:

    positive  (1 - beta) v_old + beta v        negative  (1 + beta) v_old - beta v

Both predict the clean picture, ``x_t - t v``; the loss is ``c / beta (o e+ + (1 - o) e-)``, where the
optimality ``o = (1 + A / c) / 2`` maps an advantage within [-c, c] to [0, 1]. An error e is the mean
squared error divided by the (constant) mean absolute error, which weighs times alike. The velocity is that
of the prompt alone: learning is guidance-free, whatever guidance the drawing used, and members of a group may
differ in it (``NFTConfig.scales``). The drawing policy is a moving average that starts equal to the learner
after each of the first rounds and lags more and more.

Source: DiffusionNFT (arXiv 2509.16117).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.config.grpo import NFTConfig
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.flow import Contexts, FlowSettings, Grid
from unichar_jax.training.grpo.algorithm import Metrics, Policies


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Item:
    """A clean picture ``[..., N, latent_dim]``, a time, and a key for its noise."""

    clean: jax.Array
    t: jax.Array
    key: jax.Array


@dataclass(frozen=True)
class NFT:
    """See the module's docstring.

    Attributes:
      cfg: the method's numbers.
      settings: how pictures are drawn.
      grid: rows and columns of latent tokens.
      bound: c, the largest advantage.
    """

    cfg: NFTConfig
    settings: FlowSettings
    grid: Grid
    bound: float = 5.0
    follows = True

    @property
    def kl(self) -> float:
        return self.cfg.kl

    def decay(self, round_: int) -> float:
        return min(self.cfg.old_rate * round_, self.cfg.old_max)

    def draw(
        self, model: UnifiedModel, contexts: Contexts, keys: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As ``Algorithm.draw``; the record is the clean latents."""
        del start
        prompts, scales = contexts.full.batch, self.cfg.scales or (self.settings.guidance.text_scale,)
        noise = flow.draw_noise(keys, 0, self.grid, model.cfg.latent_dim)
        # Member g of a group is drawn with scale g mod len(scales).
        noise = noise.reshape(prompts, -1, len(scales), *noise.shape[1:])
        rows = jnp.repeat(jnp.arange(prompts), noise.shape[1])
        spread = Contexts(kv.take(contexts.full, rows))
        drawn = []
        for lane, scale in enumerate(scales):
            guidance = dataclasses.replace(self.settings.guidance, text_scale=scale)
            settings = dataclasses.replace(self.settings, guidance=guidance)
            mine = noise[:, :, lane].reshape(-1, *noise.shape[3:])
            drawn.append(flow.sample_latents(model, spread, mine, self.grid, settings))
        final = jnp.stack(drawn, axis=1).reshape(-1, *noise.shape[3:])
        return final, final

    def items(self, record: jax.Array, key: jax.Array) -> Item:
        """``times`` copies of each picture, at times spread evenly over the schedule's range."""
        pictures, copies = record.shape[0], self.cfg.times
        time_key, noise_key = jax.random.split(key)
        u = (jnp.arange(copies) + jax.random.uniform(time_key, (pictures, copies))) / copies
        # Times lean towards noise as the sampler's do; at exactly 0 there is nothing to predict.
        u, shift = jnp.maximum(u, 1e-3), self.settings.shift
        t = shift * u / (1 + (shift - 1) * u)
        keys = jax.random.split(noise_key, (pictures, copies))
        clean = jnp.broadcast_to(record[:, None], (pictures, copies, *record.shape[1:]))
        return Item(clean, t, keys)

    def loss(
        self, policies: Policies, contexts: Contexts, items: Item, advantages: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        beta, clean = self.cfg.beta, items.clean
        t = items.t[:, None, None]
        noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(items.key)
        x_t = (1 - t) * clean + t * noise

        def velocity(model: UnifiedModel) -> jax.Array:
            return flow.velocity(model, contexts.full, x_t, items.t, self.grid)

        def error(v: jax.Array) -> jax.Array:
            difference = x_t - t * v - clean
            scale = jax.lax.stop_gradient(jnp.abs(difference).mean(axis=(1, 2)))
            return jnp.square(difference).mean(axis=(1, 2)) / jnp.maximum(scale, 1e-5)

        assert policies.drawer is not None  # ``follows``
        v, old = velocity(policies.learner), jax.lax.stop_gradient(velocity(policies.drawer))
        optimality = jnp.clip(0.5 + 0.5 * advantages / self.bound, 0, 1)
        positive = error((1 - beta) * old + beta * v)
        negative = error((1 + beta) * old - beta * v)
        loss = (optimality * positive + (1 - optimality) * negative) * self.bound / beta
        metrics = {
            "policy_loss": loss,
            "moved": jnp.square(v - old).mean(axis=(1, 2)),
        }
        if policies.reference is not None:
            reference = jax.lax.stop_gradient(velocity(policies.reference))
            kl = jnp.square(v - reference).mean(axis=(1, 2))
            loss, metrics["kl"] = loss + self.cfg.kl * kl, kl
        return loss, metrics

"""A round of stage 2 as one step of the loop that both stages share, and the run around it.

A round draws, scores, and learns with all its updates, and is one step of the loop; an epoch, one walk
through the prompts, is several rounds. That is what makes resuming exact and simple: between rounds there
are no stored drawings, so a checkpoint is the state and one number (which round comes next), and everything
random follows from (seed, round). A run that is stopped inside a round draws that round again, bit for bit.
The alternative, checkpoints between the updates of a round, would have to store drawings (gigabytes at 1024
pixels) to save at most one round.

Pictures are drawn by the learner itself, or by a moving average that follows it, as the algorithm says. Old
log-probabilities are those of the drawing. Rewards are gathered before they are compared, so groups are
whole on any mesh.

Source: UniCharacter (arXiv 2605.08129), Character-GRPO.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.data.rl_prompts import RLPrompt
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.lora import switched_off
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import host
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.cache import KVCache
from unichar_jax.sampling.flow import Contexts
from unichar_jax.training.grpo.advantages import group_advantages
from unichar_jax.training.grpo.algorithm import Algorithm
from unichar_jax.training.grpo.flow_grpo import FlowGRPO
from unichar_jax.training.grpo.nft import NFT
from unichar_jax.training.grpo.rewards import Scores
from unichar_jax.training.grpo.rollouts import (
    Roller,
    Round,
    decode,
    grid_of,
    on_mesh,
    picture_keys,
    round_key,
    settings_of,
)
from unichar_jax.training.grpo.update import Share, finish_round, jit_update
from unichar_jax.training.grpo.watch import HackingWatch, best_and_worst
from unichar_jax.training.state import Arrays, Layout, TrainState


def make_algorithm(cfg: GRPOConfig, model: ModelConfig) -> Algorithm:
    """The algorithm that the configuration names."""
    settings = settings_of(cfg.rollout)
    grid = grid_of(cfg.rollout.height, cfg.rollout.width, model)
    if cfg.algorithm == "nft":
        return NFT(cfg.nft, settings.flow, grid, cfg.advantage_clip)
    return FlowGRPO(cfg.flow_grpo, settings, grid, cfg.rollout.share_prefix, cfg.optimizer.ema_decay)


class Trainer:
    """Rounds of stage 2; an instance is the loop's step: ``(state, round) -> (state, metrics)``.

    Making one puts nothing on a device; programs are compiled when they are first called.

    Args:
      cfg: the experiment.
      model_cfg: sizes of the model.
      algorithm: of ``make_algorithm``.
      layout: assembles models.
      optimizer: of the trained weights.
      autoencoder: to see what was drawn.
      rewards: to score it: ``(pictures, prompts, groups, model) -> Scores``.
      prompts: for training, then held out; the numbers in a round are places in this sequence.
      cache: the prompts, read (``rollouts.read_prompts``).
      reference: of ``reference_weights``.
      held_out: how many of the last prompts are held out.
      mesh: of the run.

    Attributes:
      watch: the early warning.
      state: the state before the round that is under way: complete, to be saved if a reward fails.
      last: pictures, scores and prompts of the last round.
    """

    state: TrainState

    def __init__(
        self,
        cfg: GRPOConfig,
        *,
        model_cfg: ModelConfig,
        algorithm: Algorithm,
        layout: Layout,
        optimizer: optax.GradientTransformation,
        autoencoder: Autoencoder,
        rewards: Callable[[jax.Array, Sequence[RLPrompt], np.ndarray, UnifiedModel], Scores],
        prompts: Sequence[RLPrompt],
        cache: KVCache,
        reference: Arrays | None,
        held_out: int = 0,
        mesh: Mesh | None = None,
    ):
        self.cfg, self.prompts, self.held_out = cfg, list(prompts), held_out
        self._layout, self._autoencoder, self._rewards, self._mesh = layout, autoencoder, rewards, mesh
        self._algorithm, self._cache, self._reference = algorithm, cache, reference
        self._settings = settings_of(cfg.rollout)
        self._grid = grid_of(cfg.rollout.height, cfg.rollout.width, model_cfg)
        self._patch = model_cfg.latent_patch_size
        self._roll = Roller(cfg, algorithm, self._settings, self._grid, self._patch)
        self._learn = jit_update(layout, algorithm, optimizer, cfg.micro_batch)
        self._finish = jax.jit(finish_round, donate_argnums=0)
        self._share = jax.jit(_share_of, static_argnums=2)
        self._draw_held_out = jax.jit(self._deterministic, static_argnames="settings")
        self.watch = HackingWatch()
        self.last: tuple[np.ndarray, Scores, list[str]] | None = None

    def __call__(self, state: TrainState, round_: Round) -> tuple[TrainState, dict[str, Any]]:
        cfg, self.state = self.cfg, state
        clock = [time.monotonic()]
        drawer = state.ema if self._algorithm.follows else state.params
        assert drawer is not None
        drawn = self._roll(
            self._layout.assemble(drawer, state.frozen), self._autoencoder, self._cache, round_
        )
        images = host(drawn.images)
        clock.append(time.monotonic())
        of_picture = np.repeat(round_.prompts, cfg.group)
        asked = [self.prompts[i] for i in of_picture]
        groups = np.repeat(np.arange(cfg.prompts_per_round), cfg.group)
        scores = self._score(state, drawn.images, images, asked, groups)
        # Advantages compare all pictures of a prompt, also where a round draws it twice.
        advantages = group_advantages(
            scores.rewards, of_picture, clip=cfg.advantage_clip, whole_std=cfg.whole_std
        )
        clock.append(time.monotonic())
        key = round_key(cfg.seed, round_.number, "update")
        share = Share(drawn.record, on_mesh(of_picture, self._mesh), on_mesh(advantages.values, self._mesh))
        frozen, moving = state.frozen, dataclasses.replace(state, frozen={})
        learned = []
        for i in range(cfg.updates):
            part = share if cfg.updates == 1 else self._share(share, jnp.int32(i), cfg.updates)
            moving, metrics = self._learn(
                moving, frozen, self._reference, self._cache, part, jax.random.fold_in(key, i)
            )
            learned.append(metrics)
        decay = jnp.float32(self._algorithm.decay(round_.number + 1))
        state = dataclasses.replace(self._finish(moving, decay), frozen=frozen)
        metrics = _mean(jax.device_get(learned))
        clock.append(time.monotonic())
        spread = float(np.mean(host(drawn.spread)))
        warning = self.watch.add(float(scores.rewards.mean()), spread)
        if warning:
            print(warning, file=sys.stderr, flush=True)
        self.state, self.last = state, (images, scores, [p.text for p in asked])
        return state, metrics | {
            **_score_metrics(scores, cfg.group),
            "advantage_std": advantages.std,
            "dead_groups": advantages.dead,
            "advantages_clipped": advantages.clipped,
            "spread": spread,
            "hacking_warning": float(warning is not None),
            "seconds_draw": clock[1] - clock[0],
            "seconds_score": clock[2] - clock[1],
            "seconds_learn": clock[3] - clock[2],
        }

    def _score(
        self,
        state: TrainState,
        images: jax.Array,
        fetched: np.ndarray,
        prompts: Sequence[RLPrompt],
        groups: np.ndarray,
    ) -> Scores:
        """Scores of pictures, whole on this process's devices; the model's frozen parts answer visual questions."""
        whole = images if images.is_fully_addressable else jnp.asarray(fetched)
        return self._rewards(whole, prompts, groups, self._layout.assemble(state.params, state.frozen))

    # -- held-out prompts -----------------------------------------------------------------------------------

    def evaluate(self, state: TrainState) -> tuple[dict[str, float], np.ndarray, Scores]:
        """Draws the held-out prompts from fixed noise, without stochastic steps, and scores them.

        Returns:
          Means for the log, the pictures uint8 ``[held out * pictures, H, W, 3]``, and their scores.
        """
        cfg, self.state = self.cfg, state
        count = cfg.eval.pictures
        first = len(self.prompts) - self.held_out
        rows = np.repeat(np.arange(first, len(self.prompts), dtype=np.int32), count)
        keys = picture_keys(round_key(cfg.seed, 0, "evaluation"), len(rows))
        weights = state.params if state.ema is None else state.ema  # what inference takes
        settings = dataclasses.replace(self._settings.flow, num_timesteps=cfg.eval.num_timesteps)
        model = self._layout.assemble(weights, state.frozen)
        drawn = self._draw_held_out(
            model, self._autoencoder, self._cache, on_mesh(rows, self._mesh), keys, settings=settings
        )
        images = host(drawn)
        scores = self._score(state, drawn, images, [self.prompts[i] for i in rows], rows - first)
        return _score_metrics(scores, count), images, scores

    def _deterministic(self, model, autoencoder, cache, rows, keys, *, settings):
        noise = flow.draw_noise(keys, 0, self._grid, model.cfg.latent_dim)
        contexts = Contexts(kv.take(cache, rows))
        latents = flow.sample_latents(model, contexts, noise, self._grid, settings)
        return decode(autoencoder, latents, self._grid, self._patch)

    def sheet(self) -> Any:
        """Best and worst pictures of the last round."""
        assert self.last is not None
        images, scores, prompts = self.last
        return best_and_worst(images, scores.rewards, prompts, self.cfg.group)


def reference_weights(cfg: GRPOConfig, algorithm: Algorithm, state: TrainState) -> Arrays | None:
    """Trained weights of the reference model, from a fresh state, before any checkpoint is restored.

    Adapters switched off, or a copy of the first weights; None where the algorithm takes no divergence from it.
    """
    if algorithm.kl == 0:
        return None
    if cfg.trainable == "lora":
        return switched_off(state.params)
    return jax.tree.map(jnp.copy, state.params)


def _share_of(share: Share, part: jax.Array, parts: int) -> Share:
    """Whole groups, one after the other."""
    size = share.prompts.shape[0] // parts
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, part * size, size), share)


def _score_metrics(scores: Scores, group: int) -> dict[str, float]:
    rewards = scores.rewards.reshape(-1, group)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_best": float(rewards.max(axis=1).mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in scores.terms.items()},
        **{
            f"reward_std/{name}": float(values.reshape(-1, group).std(axis=1).mean())
            for name, values in scores.terms.items()
        },
    }


def _mean(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the updates of a round; ``first/*`` are of its first, before anything was learned."""
    means = {k: np.mean([m[k] for m in updates], axis=0) for k in updates[0]}
    if "ratio_drift" in means:
        means["ratio_drift_first"] = updates[0]["ratio_drift"]
    return means

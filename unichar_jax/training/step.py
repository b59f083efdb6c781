"""One optimiser step of Unified-SFT: a pure function of (state, global batch), under ``jax.jit``.

Randomness is a function of (seed, step, purpose): a resumed run draws what the unbroken run drew.
Accumulation takes every A-th row of the batch as one micro-batch, divides by the weights of the whole batch,
and so equals the large batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unichar_jax.config.model import ModelConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.models import flops
from unichar_jax.models.streams import Batch
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.training import objective
from unichar_jax.training.metrics import USEFUL
from unichar_jax.training.state import Arrays, Layout, TrainState

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Passes that a product with weights takes part in: forward, gradients of activations, gradients of weights (with
# adapters, next to none). Where only one expert learns it is something in between: not reported.
PASSES = {"all": 3, "lora": 2}

_PURPOSES = {"noise": 0, "posterior": 1}


def purpose_key(seed: int, step: jax.Array, purpose: str) -> jax.Array:
    """The key for one purpose at one step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, _PURPOSES[purpose])


def apply_gradients(
    state: TrainState,
    gradients: Arrays,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Optimiser, then EMA; shared by both training stages."""
    updates, opt = optimizer.update(gradients, state.opt, state.params)
    trained: Arrays = optax.apply_updates(state.params, updates)  # type: ignore[assignment]
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, trained)
    return TrainState(state.step + 1, trained, state.frozen, opt, ema)


def split_rows(tree: Any, parts: int) -> Any:
    """``[B, ...]`` -> ``[parts, B / parts, ...]``, row r in part r mod parts, so no row leaves its device."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree
    )


def gradients_of(
    layout: Layout, state: TrainState, batch: Batch, cfg: SFTConfig, ae: Any, num_tasks: int
) -> tuple[Arrays, objective.Terms]:
    """Gradients of the loss of the whole global batch, and its terms."""
    latent = batch.latent
    eps = jax.random.normal(purpose_key(cfg.seed, state.step, "posterior"), latent.mean.shape)
    noise = jax.random.normal(purpose_key(cfg.seed, state.step, "noise"), latent.mean.shape)
    x0 = objective.sample_latent(latent, ae, eps)
    denominators = objective.weights_of(batch)

    def loss(trained: Arrays, batch: Batch, x0: jax.Array, noise: jax.Array):
        terms = objective.unified_terms(
            layout.assemble(trained, state.frozen),
            batch,
            x0,
            noise,
            shift=cfg.timestep_shift,
            num_tasks=num_tasks,
            chunk=cfg.ce_chunk,
        )
        return objective.combine(terms, denominators, cfg.ce_weight, cfg.mse_weight), terms

    gradient = jax.value_and_grad(loss, has_aux=True)
    if cfg.accumulate == 1:
        (_, terms), grads = gradient(state.params, batch, x0, noise)
        return grads, terms

    def body(total, part):
        (_, terms), grads = gradient(state.params, *part)
        return jax.tree.map(jnp.add, total, (grads, terms)), None

    parts = split_rows((batch, x0, noise), cfg.accumulate)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: gradient(state.params, *first))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
    return jax.lax.scan(body, zero, parts)[0]


def make_sft_step(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    cfg: SFTConfig,
    ae: Any,
    num_tasks: int,
) -> Step:
    """The step function, not yet jitted. ``ae`` is the autoencoder's config (latent scale and shift)."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, terms = gradients_of(layout, state, batch, cfg, ae, num_tasks)
        new = apply_gradients(state, grads, optimizer, cfg.optimizer.ema_decay)
        denominators = objective.weights_of(batch)
        metrics = {
            "loss": objective.combine(terms, denominators, cfg.ce_weight, cfg.mse_weight),
            "ce": terms.ce / jnp.maximum(terms.ce_weight, 1e-9),
            "mse": terms.mse / jnp.maximum(terms.mse_weight, 1e-9),
            "grad_norm": optax.global_norm(grads),
            "ce_tokens": terms.ce_weight,
            "mse_tokens": terms.mse_weight,
            "tokens": sum(
                (m.segment != 0).sum() for m in (batch.text.meta, batch.vit.meta, batch.latent.meta)
            ),
            "task_ce": terms.task_ce / jnp.maximum(terms.task_ce_weight, 1e-9),
            "task_mse": terms.task_mse / jnp.maximum(terms.task_mse_weight, 1e-9),
        }
        return new, metrics

    return step


def useful_flops(cfg: ModelConfig, batch: Batch, trainable: str) -> jax.Array | None:
    """Useful floating-point operations of a training step on ``batch``; None where they are not defined."""
    passes = PASSES.get(trainable)
    return None if passes is None else jnp.asarray(flops.train_step(cfg, flops.work_of(batch), passes))


def jit_step(
    cfg: SFTConfig,
    model: ModelConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """The compiled step of a run: ``make_sft_step`` plus the useful work of its batch, shardings pinned."""
    bare = make_sft_step(layout, optimizer, cfg, model.autoencoder, num_tasks)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = bare(state, batch)
        useful = useful_flops(model, batch, cfg.trainable)
        return state, metrics if useful is None else metrics | {USEFUL: useful}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh_lib.replicated(mesh)))

"""AdamW with clipping and schedule, and where its state lives on the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unichar_jax.config.train import OptimizerConfig
from unichar_jax.parallel import mesh as mesh_lib


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at an (optimiser) step, counted from 0."""
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    if cfg.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=cfg.min_learning_rate / peak)
    elif cfg.schedule == "trapezoid":
        flat = max(steps - warmup - cfg.decay_steps, 0)
        body = optax.linear_schedule(peak, cfg.min_learning_rate, cfg.decay_steps, transition_begin=flat)
    else:
        body = optax.constant_schedule(peak)
    if warmup == 0:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the optimiser, over a flat dictionary of parameters by name."""
    common = dict(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    moment = jnp.dtype(cfg.first_moment_dtype)
    if cfg.name == "adamw":
        optimizer = optax.adamw(schedule(cfg, steps), mu_dtype=moment, **common)
    else:
        optimizer = optax.contrib.muon(
            schedule(cfg, steps),
            mu_dtype=moment,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            adam_b1=cfg.beta1,
            adam_b2=cfg.beta2,
            adam_weight_decay=cfg.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    if cfg.max_grad_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), optimizer)


def _muon_dimensions(parameters: dict[str, Any]) -> dict[str, Any]:
    """The kernels that Muon takes: those of stacked layers, ``[layers, in, out]``."""

    def dimensions(name: str, x: Any) -> Any:
        stacked = ".layers." in name and name.endswith(".kernel")
        if not stacked or getattr(x, "ndim", 0) != 3:  # Optax also calls this on masked trees
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    return {name: dimensions(name, x) for name, x in parameters.items()}


def state_shardings(abstract_state: Any, parameters: dict[str, Any], mesh: Mesh) -> Any:
    """Shardings of an optimiser state: moments follow their parameter, counters are replicated.

    Args:
      abstract_state: ``jax.eval_shape`` of the optimiser's init.
      parameters: name -> array or struct with a sharding.
      mesh: of the result.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> Any:
        for entry in reversed(path):
            parameter = parameters.get(getattr(entry, "key", None))
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return mesh_lib.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)

"""The state of a training run, and the pure functions that make and assemble it.

Parameters are flat ``{name: array}`` dictionaries split into what is trained and what is frozen, so optimiser
state, EMA, checkpoints and logs all speak in the same readable names. ``Layout`` puts them back into the
module.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from unichar_jax.models import params
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.training.optimizer import state_shardings

Arrays = dict[str, jax.Array]
M = TypeVar("M")

# What each choice of ``trainable`` trains, by parameter name.
TRAINABLE = {
    "all": r".*",
    "gen": r"decoder\.(layers|norm)\.gen\..*|time_embedder\..*|latent_(in|out)\..*",
    "und": r"(?!decoder\.(layers|norm)\.gen\.|time_embedder\.|latent_(in|out)\.).*",
    "gen_expert": r"decoder\.(layers|norm)\.gen\..*",
    "lora": r".*\.lora_[ab]",
    "not_vision": r"(?!vision\.).*",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: optimiser steps taken; params: trained; frozen: not; opt: optimiser; ema: or None."""

    step: jax.Array
    params: Arrays
    frozen: Arrays
    opt: Any
    ema: Arrays | None


@dataclass(frozen=True, repr=False)
class Layout:
    """A module of declarations, as the bridge between flat parameters and the module's tree."""

    module: Any

    def assemble(self, *parts: Arrays) -> Any:
        """The module with its arrays, from dictionaries that together hold every name once."""
        arrays = {k: v for part in parts for k, v in part.items()}
        return params.map_named(lambda name, _: arrays[name], self.module)

    def flat(self, module: Any) -> Arrays:
        """``{name: array}`` of an assembled module."""
        return params.flat(module)

    def split(self, arrays: Arrays, pattern: str) -> tuple[Arrays, Arrays]:
        """Trained and frozen arrays, by full match of the name."""
        chosen = {k for k in arrays if re.fullmatch(pattern, k)}
        return (
            {k: v for k, v in arrays.items() if k in chosen},
            {k: v for k, v in arrays.items() if k not in chosen},
        )


def frozen_in(dtype: Any, declared: M, trainable: str) -> M:
    """The declarations of a run: what it does not train is kept in ``dtype``, that of its computations.

    A weight is cast to it before every use (``params.gathered``), so a frozen one loses nothing by being kept in
    it. What is trained stays float32, where small steps are not rounded away.
    """
    trained = re.compile(TRAINABLE[trainable])

    def declare(name: str, spec: params.ArraySpec) -> params.ArraySpec:
        return spec if trained.fullmatch(name) else dataclasses.replace(spec, dtype=np.dtype(dtype))

    return params.map_named(declare, declared)


def create(
    module: Any,
    declared: Any,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = "all",
    ema: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Layout, TrainState]:
    """A fresh state from a filled module (on the mesh already, if there is one)."""
    layout = Layout(declared)
    trained, frozen = layout.split(params.flat(module), TRAINABLE[trainable])
    if mesh is None:
        opt = jax.jit(optimizer.init)(trained)
        step = jnp.zeros((), jnp.int32)
    else:
        shardings = state_shardings(jax.eval_shape(optimizer.init, trained), trained, mesh)
        opt = jax.jit(optimizer.init, out_shardings=shardings)(trained)
        step = jax.device_put(jnp.zeros((), jnp.int32), mesh_lib.replicated(mesh))
    average = jax.tree.map(jnp.copy, trained) if ema else None
    return layout, TrainState(step, trained, frozen, opt, average)

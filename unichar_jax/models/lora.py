"""Low-rank adapters on the decoder's experts: ``W + A B`` with A ``[in, r]`` and B ``[r, out]``.

``add_lora`` declares the adapters on a module of declarations, so they are initialised, sharded, saved and
trained like any other array; ``attach`` fills them around loaded weights. B starts at zero, which leaves
the model as it is. The customary factor alpha / r is folded into A's initial values (deviation ``alpha /
r^2``): it then moves with the adapter, and nothing has to remember it. ``merge`` gives the plain model;
``switched_off`` the weights under which the adapted model computes what the base did, which is a reference
model that costs nothing.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel

M = TypeVar("M")

A, B = "lora_a", "lora_b"


def add_lora(
    module: UnifiedModel,
    rank: int,
    alpha: float,
    experts: Sequence[str] = ("und", "gen"),
    targets: Sequence[str] = ("q", "k", "v", "o", "gate", "up", "down"),
) -> UnifiedModel:
    """Declares adapters of ``rank`` on projections of a fresh module of declarations; returns that module."""
    for expert in experts:
        layer = getattr(module.decoder.layers, expert)
        for target in targets:
            dense = getattr(layer, target)
            spec = dense.kernel.get_value()
            (*lead, d_in, d_out), (*lead_dims, in_dim, out_dim) = spec.shape, spec.dims
            dense.lora_a = params.declare(
                (*lead, d_in, rank), (*lead_dims, in_dim, None), params.normal(alpha / rank**2)
            )
            dense.lora_b = params.declare((*lead, rank, d_out), (*lead_dims, None, out_dim), params.zeros)
    return module


def declared_in(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """Arguments of ``add_lora`` for adapters among stored arrays ``{on-disk name: shape}``; None without any."""
    pattern = re.compile(rf"decoder\.layers\.\d+\.(\w+)\.(\w+)\.{A}")
    found = {n: m for n in shapes if (m := pattern.fullmatch(n))}
    if not found:
        return None
    rank = shapes[next(iter(found))][-1]
    experts, targets = (tuple(sorted({m[i] for m in found.values()})) for i in (1, 2))
    return dict(rank=rank, alpha=1.0, experts=experts, targets=targets)


def attach(base: Any, declared: M, seed: int, mesh: Mesh | None = None) -> M:
    """Fills ``declared`` (with adapters) from a filled module without: its arrays, and fresh adapters."""
    arrays = params.flat(base)
    fresh = {n: s for n, s in params.named_leaves(declared) if n not in arrays}
    adapters = params.initialize(fresh, seed, mesh)
    return params.map_named(lambda name, _: {**arrays, **adapters}[name], declared)


def merge(adapted: Any, declared: M) -> M:
    """The plain model: ``declared`` (without adapters) filled from ``adapted``, products added in float32."""
    arrays = params.flat(adapted)

    def fill(name: str, _: Any) -> jax.Array:
        array = arrays[name]
        stem, _, leaf = name.rpartition(".")
        if leaf != "kernel" or f"{stem}.{A}" not in arrays:
            return array
        a, b = (arrays[f"{stem}.{n}"].astype(jnp.float32) for n in (A, B))
        return (array.astype(jnp.float32) + a @ b).astype(array.dtype)

    return params.map_named(fill, declared)


def switched_off(adapters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Adapters ``{name: array}`` that add nothing: all zero."""
    return {n: jnp.zeros_like(x) for n, x in adapters.items()}

"""Low-rank adapters on the decoder's experts: ``W + A B`` with A ``[in, r]`` and B ``[r, out]``.

``add_lora`` declares the adapters on a module of declarations, so they are initialised, sharded, saved and
trained like any other array; ``attach`` fills them around loaded weights. B starts at zero, which leaves
the model as it is. The customary factor alpha / r is folded into A's initial values (deviation ``alpha /
r^2``): it then moves with the adapter, and nothing has to remember it. ``merge`` gives the plain model;
``switched_off`` the weights under which the adapted model computes what the base did, which is a reference
model that costs nothing.

Away from training, adapters are a mapping ``{array name: stacked array}``, and ``adapted`` puts one around
a base, whose arrays it shares. A smaller rank is padded with zeros to a common one, which changes nothing:
models of many characters then have one structure, and one compiled program serves them all.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from unichar_jax.models import decoder, int8, params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib

M = TypeVar("M")

A, B = "lora_a", "lora_b"
EXPERTS, TARGETS = decoder.EXPERTS, decoder.PROJECTIONS

Places = Mapping[str, int]
"""Where adapters are, and of which rank: ``{"und.q": 16, ...}``."""


def add_lora(
    module: UnifiedModel,
    rank: int,
    alpha: float,
    experts: Sequence[str] = EXPERTS,
    targets: Sequence[str] = TARGETS,
) -> UnifiedModel:
    """Declares adapters of ``rank`` on projections of a fresh module of declarations; returns that module."""
    return declare(module, {f"{e}.{t}": rank for e in experts for t in targets}, alpha)


def declare(module: UnifiedModel, places: Places, alpha: float = 1.0) -> UnifiedModel:
    """``add_lora`` at any choice of places."""
    for place, rank in places.items():
        expert, target = place.split(".")
        dense = getattr(getattr(module.decoder.layers, expert), target)
        spec = dense.kernel.get_value()
        (*lead, d_in, d_out), (*lead_dims, in_dim, out_dim) = spec.shape, spec.dims
        dense.lora_a = params.declare(
            (*lead, d_in, rank), (*lead_dims, in_dim, "rank"), params.normal(alpha / rank**2)
        )
        dense.lora_b = params.declare((*lead, rank, d_out), (*lead_dims, "rank", out_dim), params.zeros)
    return module


def places_in(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Places of the adapters among arrays ``{name: shape}``, of a module or on disk; {} if there are none."""
    pattern = re.compile(rf"decoder\.layers\.(?:\d+\.)?(\w+\.\w+)\.{A}")
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        if m := pattern.fullmatch(name):
            found[m[1]] = max(shape[-1], found.get(m[1], 0))
    return dict(sorted(found.items()))


def is_adapter(name: str) -> bool:
    """Whether an array's name, of a module or on disk, is that of one side of a pair."""
    return name.endswith((f".{A}", f".{B}"))


def union(all_places: Iterable[Places]) -> dict[str, int]:
    """The places of all, each with its largest rank."""
    ranks: dict[str, int] = {}
    for places in all_places:
        for place, rank in places.items():
            ranks[place] = max(rank, ranks.get(place, 0))
    return dict(sorted(ranks.items()))


def attach(base: Any, declared: M, seed: int, mesh: Mesh | None = None) -> M:
    """Fills ``declared`` (with adapters) from a filled module without: its arrays, and fresh adapters."""
    arrays = params.flat(base)
    fresh = {n: s for n, s in params.named_leaves(declared) if n not in arrays}
    adapters = params.initialize(fresh, seed, mesh)
    return params.map_named(lambda name, _: {**arrays, **adapters}[name], declared)


def adapted(
    base: UnifiedModel, arrays: Mapping[str, jax.Array], places: Places | None = None
) -> UnifiedModel:
    """A base with adapters around it; what they leave alone is shared, not copied.

    Args:
      base: a filled model without adapters, on whatever mesh it is.
      arrays: adapters ``{name: stacked array}``, and arrays to use in place of the base's.
      places: where the result has adapters (default: where they are given). Smaller ones are padded with
        zeros to the rank that is asked for; absent ones are all zero.
    """
    shapes = {n: x.shape for n, x in arrays.items()}
    declared = UnifiedModel(base.cfg, base.compute)
    declared = declare(
        int8.declare(declared) if int8.is_int8(base) else declared,
        places_in(shapes) if places is None else places,
    )
    own = params.flat(base)
    home = own["decoder.norm.und.scale"]

    def fill(name: str, spec: params.ArraySpec) -> jax.Array:
        if name in own and name not in arrays:
            return own[name]
        array = arrays.get(name)
        if array is None:
            array = jnp.zeros(spec.shape, home.dtype)
        if array.shape != spec.shape:
            array = jnp.pad(array, [(0, want - n) for n, want in zip(array.shape, spec.shape, strict=True)])
        if isinstance(home.sharding, NamedSharding):
            sharding = mesh_lib.sharding_for(spec.dims, spec.shape, home.sharding.mesh)
            return jax.device_put(array, sharding)
        return array

    return params.map_named(fill, declared)


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

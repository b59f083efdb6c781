"""Kernels on a mesh: each device runs its own rows and heads, without collectives.

A kernel is a function of whole arrays; under a mesh it runs inside ``jax.shard_map``, rows split over the
batch axes and heads over ``tensor``. The compiler cannot split a Pallas call or a data-dependent loop by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from unichar_jax.parallel.mesh import spec_for


def platform() -> str:
    """``tpu``, ``gpu``/``cuda`` or ``cpu``: of the current mesh's devices, else of the default device.

    Under a mesh of described devices (ahead-of-time compilation) this is the platform compiled for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """What the devices of the current mesh, else the default device, call themselves, such as ``NVIDIA H100``."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind


def per_device(f: Callable[..., Any], rows: Any, *heads: jax.Array) -> Any:
    """``f(rows, *heads)`` on every device's part.

    Args:
      f: returns an array ``[B, L, heads, ...]`` if ``heads`` are given, else a tree of arrays ``[B, ...]``.
      rows: tree of arrays ``[B, ...]``.
      *heads: arrays ``[B, L, heads, d]``, e.g. q, k, v.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return f(rows, *heads)
    size = (heads or jax.tree.leaves(rows))[0].shape[0]
    (batch,) = spec_for(("batch",), (size,), mesh)
    # Heads are split only if every array's are: query groups must stay with their key head.
    split = {spec_for(("heads",), (x.shape[2],), mesh)[0] for x in heads}
    by_head = PartitionSpec(batch, None, split.pop() if len(split) == 1 else None)
    by_row = PartitionSpec(batch)
    specs = (by_row, *[by_head] * len(heads))
    return jax.shard_map(f, in_specs=specs, out_specs=by_head if heads else by_row, check_vma=False)(
        rows, *heads
    )

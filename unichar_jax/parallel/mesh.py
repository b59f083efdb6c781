"""The device mesh, and the one table from dimension names to mesh axes.

Every array of the model names its dimensions (``models/params.py``). ``AXES`` says which mesh axis a name is
split over; nothing else in the library mentions an axis. Axes are automatic (``AxisType.Auto``): the compiler
propagates shardings, and the code pins them only at a few named points (``constrain``), so that the same
functions run under a mesh, under none (a laptop), or under an abstract mesh for a pod that is not there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unichar_jax.config.compute import MeshConfig

AXIS_NAMES = ("data", "fsdp", "tensor")

# Dimension name -> mesh axis. A name that is absent is never split.
AXES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "rank": "fsdp",  # of an adapter's side that has no "embed": an axis is used once per array
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
}


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over ``devices`` (default: all), in an order that suits the interconnect."""
    config = config or MeshConfig()
    devices = list(devices if devices is not None else jax.devices())
    sizes = config.resolve(len(devices))
    return jax.make_mesh(sizes, AXIS_NAMES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_for(
    dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
    """The partition of an array from its dimension names.

    A dimension that its axis does not divide stays whole; a mesh axis is used once per array (first come).
    """
    used: set[str] = set()
    out: list[str | tuple[str, ...] | None] = []
    for dim, size in zip(dims, shape, strict=True):
        axes = AXES.get(dim or "", ())
        axes = (axes,) if isinstance(axes, str) else axes
        axes = tuple(a for a in axes if a in mesh.shape and mesh.shape[a] > 1 and a not in used)
        if axes and size % math.prod(mesh.shape[a] for a in axes) == 0:
            used.update(axes)
            out.append(axes if len(axes) > 1 else axes[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def sharding_for(dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec_for(dims, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over ``data`` x ``fsdp``: one pack per device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def constrain(x: jax.Array, dims: Sequence[str | None], *, drop: Sequence[str] = ()) -> jax.Array:
    """Pins ``x`` to the sharding of its dimension names under the current mesh; without a mesh, nothing.

    Args:
      x: any array.
      dims: one name (or None) for each dimension.
      drop: mesh axes to gather over, e.g. ``("fsdp",)`` for weights about to be used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    spec = spec_for(dims, x.shape, mesh)
    if drop:
        spec = PartitionSpec(*(_without(axes, drop) for axes in spec))
    return jax.lax.with_sharding_constraint(x, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
    """A weight whole on every device of ``fsdp``, for use; without a mesh, the weight.

    Its gradient goes back to where the weight lives: the sum over devices is a reduce-scatter. (The transpose of
    a plain constraint would ask for the whole gradient on every device: an all-reduce, twice the traffic.)
    """
    return constrain(x, dims, drop=("fsdp",))


gather.defvjp(lambda x, dims: (gather(x, dims), None), lambda dims, _, g: (constrain(g, dims),))


def _without(axes: str | tuple[str, ...] | None, drop: Sequence[str]) -> str | tuple[str, ...] | None:
    if axes is None or isinstance(axes, str):
        return None if axes in drop else axes
    kept = tuple(a for a in axes if a not in drop)
    return kept if len(kept) > 1 else (kept[0] if kept else None)


def host(x: jax.Array) -> np.ndarray:
    """An array in full on every process; with several, all must call this."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def global_batch_size(mesh: Mesh, per_device: int = 1) -> int:
    return per_device * mesh.shape["data"] * mesh.shape["fsdp"]


def process_slice(global_batch: int) -> slice:
    """Rows of the global batch that this process feeds."""
    per = global_batch // jax.process_count()
    return slice(jax.process_index() * per, (jax.process_index() + 1) * per)


def put_batch(batch, mesh: Mesh | None):
    """Host arrays ``[rows of this process, ...]`` to device arrays sharded over the batch axis."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

"""One declaration for each array of the model.

A module's constructor declares its arrays: ``self.kernel = declare((d_in, d_out), ("embed", "mlp"), lecun)``. A
declaration (``ArraySpec``: shape, dimension names, dtype, initialiser) is a leaf like any other, so a freshly
constructed module is a tree of declarations, and everything follows by mapping over it: ``initialize`` gives arrays,
``abstract`` gives shape structs with shardings (the target of a checkpoint or of an ahead-of-time compile),
``flat`` gives ``{name: leaf}`` for the conversion table and the parameter overview. No size is stated twice.

Repeated layers are declared once and ``stacked``: each array gains a leading ``layers`` dimension that
``jax.lax.scan`` walks. Files on disk never see it: ``unstacked_names`` spells every layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from unichar_jax.parallel import mesh as mesh_lib

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
M = TypeVar("M")

LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dimension names (None: never split), dtype and initialiser of one array."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    init: Initializer
    dtype: Any = np.dtype("float32")

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.dims):
            raise ValueError(f"{self.shape} has {len(self.shape)} dimensions, names are {self.dims}")


def declare(
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    init: Initializer,
    dtype: Any = np.dtype("float32"),
) -> nnx.Param:
    """Declares one array; its dimension names stay with the parameter as ``param.dims``."""
    return nnx.Param(ArraySpec(tuple(shape), tuple(dims), init, dtype), dims=tuple(dims))


# -- initialisers (PyTorch's and BAGEL's; only matter from scratch) ----------------------------------------


def normal(std: float) -> Initializer:
    return lambda rng, shape: std * rng.standard_normal(shape, np.float32)


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.zeros(shape, np.float32)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.ones(shape, np.float32)


def uniform_fan_in(fan_in: int) -> Initializer:
    """PyTorch's default for Linear and Conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: bound * (2 * rng.random(shape, np.float32) - 1)


# -- operations on trees of declarations -------------------------------------------------------------------


def stacked(module: M, num_layers: int) -> M:
    """The same module with a leading ``layers`` dimension on every declaration."""

    def stack(param: nnx.Param) -> nnx.Param:
        spec = param.get_value()
        return declare((num_layers, *spec.shape), (LAYERS, *spec.dims), spec.init, spec.dtype)

    return jax.tree.map(stack, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def named_leaves(module: Any) -> Iterator[tuple[str, Any]]:
    """``(dotted name, leaf)`` for every array of a module, e.g. ``decoder.layers.und.q.kernel``."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
        parts = [_part(p) for p in path]
        if parts and parts[-1] == "value":
            parts = parts[:-1]
        yield ".".join(parts), leaf


def _part(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def flat(module: Any) -> dict[str, Any]:
    return dict(named_leaves(module))


def map_named(f: Callable[..., Any], module: M, *rest: Any) -> M:
    """``jax.tree.map`` that also passes the dotted name: ``f(name, leaf, *rest leaves)``."""
    names = [name for name, _ in named_leaves(module)]
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(module)
    others = [treedef.flatten_up_to(r) for r in rest]
    return treedef.unflatten([f(n, *ls) for n, *ls in zip(names, leaves, *others, strict=True)])


def shardings(module: Any, mesh: Mesh) -> Any:
    """A tree of ``NamedSharding`` like ``module`` (a tree of declarations)."""
    return jax.tree.map(lambda s: mesh_lib.sharding_for(s.dims, s.shape, mesh), module)


def abstract(module: M, mesh: Mesh | None = None, dtype: Any = None) -> M:
    """Shape structs (with shardings if a mesh is given); ``dtype`` overrides the declared one."""

    def struct(s: ArraySpec) -> jax.ShapeDtypeStruct:
        sharding = mesh_lib.sharding_for(s.dims, s.shape, mesh) if mesh is not None else None
        return jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sharding)

    return jax.tree.map(struct, module)


def placed(
    spec: ArraySpec, block: Callable[[Any], np.ndarray], mesh: Mesh | None, dtype: Any = None
) -> jax.Array:
    """The array of a declaration on a mesh, or on the default device; ``block`` gives what stands at an index."""
    if mesh is None:
        return jnp.asarray(block((slice(None),) * len(spec.shape)))
    sharding = mesh_lib.sharding_for(spec.dims, spec.shape, mesh)
    return jax.make_array_from_callback(spec.shape, sharding, block, dtype=dtype)


def initialize(module: M, seed: int, mesh: Mesh | None = None) -> M:
    """Arrays for every declaration, each from its own generator.

    An array depends on the seed and its name only: adding another moves none, and backend, mesh and layer scan
    change nothing. Numbers are drawn on the host, one array at a time, so nothing is compiled for it.
    """

    def build(name: str, spec: ArraySpec) -> jax.Array:
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng((seed, *digest[:8]))
        value = spec.init(rng, spec.shape).astype(spec.dtype)
        if mesh is None:
            return jnp.asarray(value)
        return jax.device_put(value, mesh_lib.sharding_for(spec.dims, spec.shape, mesh))

    return map_named(build, module)


def gathered(module: M, dtype: Any) -> M:
    """Weights ready for use: cast to ``dtype`` first (but for integers), then gathered over ``fsdp``.

    Casting before the collective halves its bytes. The slice that a layer scan sees has lost its ``layers``
    dimension; the names lose it too.
    """

    def use(param: nnx.Param) -> nnx.Param:
        value = param.get_value()
        dims = param.dims[-value.ndim :] if value.ndim else ()
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        return param.replace(mesh_lib.gather(value.astype(dtype) if floating else value, dims))

    return jax.tree.map(use, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def count(module: Any) -> int:
    """Number of elements in all arrays (or declarations) of a module."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module))


# -- names on disk -----------------------------------------------------------------------------------------

_LAYER = re.compile(r"(^|\.)layers\.")
_LAYER_OF = re.compile(r"((?:.*?\.)?layers\.)(\d+)\.(.*)")


def is_stacked(spec: ArraySpec) -> bool:
    return bool(spec.dims) and spec.dims[0] == LAYERS


def one_layer(spec: ArraySpec) -> ArraySpec:
    """The declaration of what is on disk: of one layer, or ``spec`` itself."""
    return ArraySpec(spec.shape[1:], spec.dims[1:], spec.init, spec.dtype) if is_stacked(spec) else spec


def stored_names(name: str, spec: ArraySpec) -> list[str]:
    """The arrays on disk that make up one array of a module: its layers, or itself."""
    return unstacked_names(name, spec.shape[0]) if is_stacked(spec) else [name]


def stacked_name(stored: str) -> tuple[str, int | None]:
    """``decoder.layers.3.und.q.kernel`` -> ``decoder.layers.und.q.kernel``, 3; another name as it is, and None."""
    found = _LAYER_OF.match(stored)
    return (found[1] + found[3], int(found[2])) if found else (stored, None)


def unstacked_names(name: str, num_layers: int) -> list[str]:
    """``decoder.layers.und.q.kernel`` -> ``decoder.layers.0.und.q.kernel``, ..."""
    return [_LAYER.sub(lambda m, i=i: f"{m.group(0)}{i}.", name, count=1) for i in range(num_layers)]

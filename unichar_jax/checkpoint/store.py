"""Reading and writing models on disk: what everything above this floor uses.

``load_config``, ``load_model``, ``load_autoencoder`` and ``load_tokenizer`` take a directory of either kind, a BAGEL
directory (PyTorch safetensors) or a model directory (Orbax), and ``load_model`` also takes a training step, whose
weights are an item of the same layout. Files spell every layer out; modules hold layers stacked: ``flat_abstract``,
``stack_flat`` and ``unstack`` go between the two. With a mesh, arrays are built shard by shard in their place and never
whole on the host. Conversion of models that do not fit in memory is ``convert.py``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.weights import AUTOENCODER, MODEL, OrbaxWeights, TorchWeights
from unichar_jax.config.model import AutoencoderConfig, ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.decoder import Compute
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M")

CONFIG_FILE = "llm_config.json"


# -- directories --------------------------------------------------------------------------------------------


def config_folder(path: str | Path) -> Path:
    """The folder that holds a model's configs and tokenizer: ``path``, or for a training step a folder above it."""
    path = Path(path)
    for folder in (path, *list(path.absolute().parents)[:2]):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"{path}: no {CONFIG_FILE} here. Expected a BAGEL directory, or one written by 'unichar convert'."
    )


def load_config(path: str | Path) -> ModelConfig:
    """Sizes of the model in ``path`` (a directory of either kind, or a training step)."""
    return ModelConfig.from_bagel(config_folder(path))


# -- modules ------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    *,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    item: str = MODEL,
) -> UnifiedModel:
    """Loads the unified model with its layers stacked.

    Args:
      path: a BAGEL directory, a model directory, or a training step.
      compute: how the module computes; does not touch what is loaded.
      mesh: arrays go straight to their place on this mesh; without one, to the default device.
      dtype: of the loaded arrays; by default as stored.
      item: the Orbax item that holds the weights; ignored for safetensors.

    Raises:
      UserError: the weights do not fit the configs beside them; every problem is listed.
    """
    cfg = load_config(path)
    weights = weights_lib.open_weights(path, cfg, MODEL, item)
    return _fill(UnifiedModel(cfg, compute), weights, mesh, dtype)


def load_autoencoder(
    path: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Autoencoder:
    """Loads the autoencoder that is beside a model; ``dtype`` None keeps the stored one."""
    folder = config_folder(path)
    cfg = ModelConfig.from_bagel(folder)
    weights = weights_lib.open_weights(folder, cfg, AUTOENCODER)
    return _fill(Autoencoder(cfg.autoencoder), weights, mesh, dtype)


def _fill(module: M, weights: TorchWeights | OrbaxWeights, mesh: Mesh | None, dtype: Any) -> M:
    if isinstance(weights, TorchWeights):
        return params.map_named(
            lambda name, spec: _array_from_views(name, spec, weights, mesh, dtype), module
        )
    return params.map_named(
        lambda name, spec: _array_from_orbax(name, spec, weights, mesh, dtype), module
    )


def _stored_names(name: str, spec: params.ArraySpec) -> list[str]:
    """The on-disk arrays that make up one array of a module: its layers, or itself."""
    return params.unstacked_names(name, spec.shape[0]) if _is_stacked(spec.dims) else [name]


def _is_stacked(dims: Sequence[str | None]) -> bool:
    return bool(dims) and dims[0] == params.LAYERS


def _array_from_views(
    name: str, spec: params.ArraySpec, weights: TorchWeights, mesh: Mesh | None, dtype: Any
) -> jax.Array:
    """One array of a module, read as the slices that its shards need."""
    names = _stored_names(name, spec)
    dtype = np.dtype(dtype or weights.infos[names[0]].dtype)

    def block(index: tuple[slice, ...]) -> np.ndarray:
        if not _is_stacked(spec.dims):
            return np.ascontiguousarray(weights.view(name)[index], dtype)
        layers, rest = names[index[0]], index[1:]
        shape = np.broadcast_to(np.int8(0), spec.shape)[index].shape
        out = np.empty(shape, dtype)
        for i, layer in enumerate(layers):
            out[i] = weights.view(layer)[rest]
        return out

    if mesh is None:
        return jnp.asarray(block((slice(None),) * len(spec.shape)))
    sharding = mesh_lib.sharding_for(spec.dims, spec.shape, mesh)
    return jax.make_array_from_callback(spec.shape, sharding, block, dtype=dtype)


def _array_from_orbax(
    name: str, spec: params.ArraySpec, weights: OrbaxWeights, mesh: Mesh | None, dtype: Any
) -> jax.Array:
    """One array of a module: its layers are restored to their shards, then stacked there."""
    names = _stored_names(name, spec)
    stacked = _is_stacked(spec.dims)
    one = params.ArraySpec(spec.shape[1:], spec.dims[1:], spec.init) if stacked else spec
    targets = {n: _target(one, dtype or weights.infos[n].dtype, mesh) for n in names}
    arrays = weights.load(targets)
    if not stacked:
        return arrays[name]
    out = None if mesh is None else mesh_lib.sharding_for(spec.dims, spec.shape, mesh)
    return _stack([arrays.pop(n) for n in names], out)


def _target(spec: params.ArraySpec, dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        sharding = mesh_lib.sharding_for(spec.dims, spec.shape, mesh)
    return jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype), sharding=sharding)


def _stack(layers: Sequence[jax.Array], sharding: Any) -> jax.Array:
    return jax.jit(lambda *xs: jnp.stack(xs), out_shardings=sharding)(*layers)


# -- stacked modules <-> flat arrays by on-disk name ---------------------------------------------------------


def flat_abstract(
    module: Any, mesh: Mesh | None = None, dtype: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The flat Orbax target of a module of declarations: ``{on-disk name: shape, dtype, sharding}``."""
    out: dict[str, jax.ShapeDtypeStruct] = {}
    for name, spec in params.named_leaves(module):
        stacked = _is_stacked(spec.dims)
        one = params.ArraySpec(spec.shape[1:], spec.dims[1:], spec.init) if stacked else spec
        out.update(
            dict.fromkeys(_stored_names(name, spec), _target(one, dtype or spec.dtype, mesh))
        )
    return out


def stack_flat(module: M, arrays: Mapping[str, Any]) -> M:
    """Fills a module of declarations from flat arrays, stacking layers; traceable, so usable under ``jax.jit``."""

    def fill(name: str, spec: params.ArraySpec) -> Any:
        names = _stored_names(name, spec)
        return jnp.stack([arrays[n] for n in names]) if _is_stacked(spec.dims) else arrays[name]

    return params.map_named(fill, module)


def unstack(declared: Any, module: Any) -> dict[str, Any]:
    """Flat arrays by on-disk name from a filled ``module``; ``declared`` is the same module of declarations.

    Traceable, so usable under ``jax.jit``; shardings of the layers are those of the stack without its first dimension.
    """
    out: dict[str, Any] = {}
    values = params.flat(module)
    for name, spec in params.named_leaves(declared):
        if _is_stacked(spec.dims):
            out |= {n: values[name][i] for i, n in enumerate(_stored_names(name, spec))}
        else:
            out[name] = values[name]
    return out

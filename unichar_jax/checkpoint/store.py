"""Reading and writing models on disk: what everything above this floor uses.

``load_config``, ``load_model`` and ``load_autoencoder`` take a directory of either kind, a BAGEL
directory (PyTorch safetensors) or a model directory (Orbax), and ``load_model`` also takes a training
step, whose weights are an item of the same layout. Files spell every layer out; modules hold layers
stacked: ``flat_abstract``, ``stack_flat`` and ``unstack`` go between the two. With a mesh, arrays are
built shard by shard in their place and never whole on the host. Conversion of models that do not fit in
memory is ``convert.py``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint import table, writing
from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.arrays import copy_into, grouped
from unichar_jax.checkpoint.safetensors_io import write_tensors
from unichar_jax.checkpoint.weights import (
    AE_FILE,
    AUTOENCODER,
    MODEL,
    ArrayInfo,
    OrbaxWeights,
    TorchWeights,
    array_bytes,
)
from unichar_jax.checkpoint.writing import CONFIG_FILES
from unichar_jax.config.compute import Compute
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import int8, lora, params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib

M = TypeVar("M")

CONFIG_FILE = CONFIG_FILES[0]
_BATCH_BYTES = 2 << 30  # restored before it is stacked: the most that loading holds twice


# -- directories --------------------------------------------------------------------------------------------


def config_folder(path: str | Path) -> Path:
    """The folder of a model's configs and tokenizer: ``path``, or for a training step a folder above it."""
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
    item: str | None = None,
    weights: Literal["int8"] | None = None,
) -> UnifiedModel:
    """Loads the unified model with its layers stacked; adapters of a training step are merged.

    Args:
      path: a BAGEL directory, a model directory, or a training step.
      compute: how the module computes; does not touch what is loaded.
      mesh: arrays go straight to their place on this mesh; without one, to the default device.
      dtype: of the loaded arrays, one for all or ``{name in the module: dtype}``; by default as stored.
      item: for a training step, the item to load: ``weights`` (the default) or ``ema``.
      weights: "int8" makes the decoder's projections small as they come (``models/int8.py``), for inference.

    Raises:
      UserError: the weights do not fit the configs beside them; every problem is listed.
    """
    cfg = load_config(path)
    stored = weights_lib.open_weights(path, cfg, MODEL, item, adapters=True)
    declared = UnifiedModel(cfg, compute)
    places = lora.places_in({name: info.shape for name, info in stored.infos.items()})
    whole = lora.declare(UnifiedModel(cfg, compute), places)
    if weights == "int8":
        specs = params.flat(whole)
        adapters = {n: s for n, s in specs.items() if lora.is_adapter(n)}
        around = _filled(adapters, stored, mesh, dtype)
        small = functools.partial(int8.small_form, adapters=around)
        plain = {n: s for n, s in specs.items() if n not in adapters}
        arrays = _filled(plain, stored, mesh, dtype, small)
        return params.map_named(lambda name, _: arrays[name], int8.declare(declared))
    filled = _fill(whole, stored, mesh, dtype)
    return lora.merge(filled, declared) if places else filled


def load_autoencoder(path: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Autoencoder:
    """Loads the autoencoder that is beside a model; ``dtype`` None keeps the stored one."""
    folder = config_folder(path)
    cfg = ModelConfig.from_bagel(folder)
    weights = weights_lib.open_weights(folder, cfg, AUTOENCODER)
    return _fill(Autoencoder(cfg.autoencoder), weights, mesh, dtype)


def _fill(module: M, weights: TorchWeights | OrbaxWeights, mesh: Mesh | None, dtype: Any) -> M:
    """Arrays for a module of declarations."""
    filled = _filled(params.flat(module), weights, mesh, dtype)
    return params.map_named(lambda name, _: filled[name], module)


def _filled(
    specs: Mapping[str, params.ArraySpec],
    weights: TorchWeights | OrbaxWeights,
    mesh: Mesh | None,
    dtype: Any,
    made_of: Callable[[str, jax.Array], dict[str, jax.Array]] = lambda name, array: {name: array},
) -> dict[str, jax.Array]:
    """Arrays by name, a few gigabytes of stacked layers at a time; ``made_of`` tells what is kept of each."""
    filled: dict[str, jax.Array] = {}
    loads: Iterator[dict[str, jax.Array]]
    if isinstance(weights, TorchWeights):
        loads = ({n: _array_from_views(n, spec, weights, mesh, dtype)} for n, spec in specs.items())
    else:
        size = lambda leaf: sum(array_bytes(weights.infos[n]) for n in params.stored_names(*leaf))  # noqa: E731
        batches = grouped(specs.items(), size, _BATCH_BYTES)
        loads = (_arrays_from_orbax(dict(batch), weights, mesh, dtype) for batch in batches)
    for loaded in loads:
        for name in list(loaded):  # popping frees each once the caller has made its own of it
            filled |= made_of(name, loaded.pop(name))
    return filled


def _dtype_of(name: str, dtype: Any, stored: ArrayInfo) -> np.dtype:
    """What one array of a module is loaded in."""
    chosen = dtype.get(name) if isinstance(dtype, Mapping) else dtype
    return np.dtype(stored.dtype if chosen is None else chosen)


def _array_from_views(
    name: str, spec: params.ArraySpec, weights: TorchWeights, mesh: Mesh | None, dtype: Any
) -> jax.Array:
    """One array of a module, read as the slices that its shards need."""
    names = params.stored_names(name, spec)
    dtype = _dtype_of(name, dtype, weights.infos[names[0]])

    def block(index: Any) -> np.ndarray:
        # Always a copy: an array that aliased the file would change when the file does.
        out = np.empty(np.broadcast_to(np.int8(0), spec.shape)[index].shape, dtype)
        if not params.is_stacked(spec):
            copy_into(out, weights.view(name)[index])
            return out
        for target, layer in zip(out, names[index[0]], strict=True):
            copy_into(target, weights.view(layer)[index[1:]])
        return out

    return params.placed(spec, block, mesh, dtype)


def _arrays_from_orbax(
    specs: Mapping[str, params.ArraySpec], weights: OrbaxWeights, mesh: Mesh | None, dtype: Any
) -> dict[str, jax.Array]:
    """Some arrays of a module: layers are restored to their shards, then stacked there."""
    targets: dict[str, jax.ShapeDtypeStruct] = {}
    for name, spec in specs.items():
        for n in params.stored_names(name, spec):
            targets[n] = _target(params.one_layer(spec), _dtype_of(name, dtype, weights.infos[n]), mesh)
    stored = weights.load(targets)
    shardings = None
    if mesh is not None:
        shardings = {n: mesh_lib.sharding_for(s.dims, s.shape, mesh) for n, s in specs.items()}
    return jax.jit(lambda arrays: stack_flat(dict(specs), arrays), out_shardings=shardings)(stored)


def _target(spec: params.ArraySpec, dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    if mesh is None:
        sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        sharding = mesh_lib.sharding_for(spec.dims, spec.shape, mesh)
    return jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype), sharding=sharding)


# -- stacked modules <-> flat arrays by on-disk name ---------------------------------------------------------


def flat_abstract(
    module: Any, mesh: Mesh | None = None, dtype: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The flat Orbax target of a module of declarations: ``{on-disk name: shape, dtype, sharding}``."""
    out: dict[str, jax.ShapeDtypeStruct] = {}
    for name, spec in params.named_leaves(module):
        target = _target(params.one_layer(spec), dtype or spec.dtype, mesh)
        out |= dict.fromkeys(params.stored_names(name, spec), target)
    return out


def stack_flat(module: M, arrays: Mapping[str, Any]) -> M:
    """Fills a module of declarations from flat arrays, stacking layers; usable under ``jax.jit``."""
    return table.module_from_flat(module, arrays, jnp)


def unstack(declared: Any, module: Any) -> dict[str, Any]:
    """Flat arrays by on-disk name from a filled ``module``; ``declared`` is the same module of declarations.

    Usable under ``jax.jit``; a layer is sharded as the stack is without its first dimension.
    """
    out: dict[str, Any] = {}
    values = params.flat(module)
    for name, spec in params.named_leaves(declared):
        if params.is_stacked(spec):
            out |= {n: values[name][i] for i, n in enumerate(params.stored_names(name, spec))}
        else:
            out[name] = values[name]
    return out


# -- writing whole modules (small models; convert.py streams the big ones) ----------------------------------


def write_bagel(
    path: str | Path,
    model: Any,
    cfg: ModelConfig,
    autoencoder: Any | None = None,
    *,
    tokenizer_files_from: str | Path | None = None,
    dtype: Any = None,
) -> None:
    """Writes a BAGEL directory (safetensors) from filled modules.

    Args:
      path: a new directory; it appears when it is complete.
      model: a filled ``UnifiedModel``.
      cfg: its sizes.
      autoencoder: a filled ``Autoencoder``, kept in its own dtype.
      tokenizer_files_from: a directory with the tokenizer files.
      dtype: of the written model; by default its own.
    """
    tensors = table.module_to_torch(model, table.model_table(cfg), dtype)
    kind = next(iter(tensors.values())).dtype
    tensors |= {n: table.frozen_table(cfg, n).astype(kind) for n in table.frozen_tables(cfg)}
    specs = {n: ArrayInfo(x.shape, x.dtype, MODEL) for n, x in sorted(tensors.items())}
    with writing.staging(path) as folder:
        writing.write_torch(folder, specs, lambda names: ((n, tensors[n]) for n in names))
        if autoencoder is not None:
            entries = table.autoencoder_table(cfg.autoencoder)
            write_tensors(folder / AE_FILE, table.module_to_torch(autoencoder, entries))
        home = None if tokenizer_files_from is None else Path(tokenizer_files_from)
        writing.write_companions(folder, cfg, None, home)

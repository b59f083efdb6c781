"""Adapters as a small artefact of their own: a folder that PEFT reads, too.

``adapter_model.safetensors`` and ``adapter_config.json`` are PEFT's, with the module names of BAGEL, so that
``PeftModel.from_pretrained(bagel, folder)`` takes the folder as it is. Our adapters have their factor folded
in, which PEFT calls ``lora_alpha = r``. Arrays that changed and cannot be low-rank (norms, biases) may lie
beside as ``whole.safetensors`` under their PyTorch names: this package puts them in place of the base's, PEFT
does not know of them. ``character.json`` may say who the adapters play.

``save`` writes such a folder, ``export`` makes it from a training step, ``open_lora`` checks one against a
model, ``load`` gives arrays for ``models.lora.adapted``, and ``WithAdapters`` merges while weights stream.

Source: LoRA (arXiv 2106.09685); the file layout of the ``peft`` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint import footing as footing_lib
from unichar_jax.checkpoint import peft_names, runs, store, table, writing
from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.footing import Footing
from unichar_jax.checkpoint.peft_names import CONFIG_FILE, WEIGHTS_FILE
from unichar_jax.checkpoint.safetensors_io import TensorFile, open_file, write_file
from unichar_jax.checkpoint.weights import MODEL, ArrayInfo, OrbaxWeights, Weights
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError, listed
from unichar_jax.models import lora, params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.records import Findings, read_settings

WHOLE_FILE, CHARACTER_FILE = "whole.safetensors", "character.json"
FOLDER = "lora"  # in a run's directory


def character_of(folder: Path) -> dict[str, str] | None:
    """Who the adapters of a folder play (name, description, opening), if it says so."""
    if not (folder / CHARACTER_FILE).is_file():
        return None
    found = Findings()
    who = read_settings(found, folder / CHARACTER_FILE)
    texts = {key: who.text(key, required=key == "name") for key in ("name", "description", "opening")}
    found.refuse()
    return texts


# -- writing ------------------------------------------------------------------------------------------------


def save(
    dst: str | Path,
    adapters: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    base: str,
    dtype: Any = None,
    footing: Footing | None = None,
    whole: tuple[Mapping[str, ArrayInfo], Iterable[tuple[str, np.ndarray]]] | None = None,
    character: Mapping[str, str] | None = None,
) -> None:
    """Writes adapters as a new folder, which appears when it is complete.

    Args:
      dst: the folder; must not hold anything.
      adapters: arrays by on-disk name (``decoder.layers.0.und.q.lora_a`` ``[in, r]``, ``lora_b`` ``[r, out]``).
        Smaller ranks are padded with zeros to the largest; a layer without a pair that other layers have
        gets one of zeros.
      cfg: the model's sizes.
      base: what they belong to, for readers.
      dtype: of the adapters on disk (default: as given).
      footing: what they stand on, so that no other base is taken for it.
      whole: arrays to keep beside them: shapes and dtypes by on-disk name, and (name, array) in that order.
      character: who they play: name, description, opening.
    """
    modules = peft_names.projections(cfg)
    ranks = lora.places_in({n: np.shape(x) for n, x in adapters.items()})
    if not ranks:
        raise UserError(f"{dst}: there is no adapter to write.")
    rank = max(ranks.values())
    used = {m: e for m, e in modules.items() if peft_names.place_of(e.ours) in ranks}
    kind = np.dtype(dtype or np.asarray(next(iter(adapters.values()))).dtype)
    specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    ours: dict[str, str] = {}
    for module, entry in used.items():
        for leaf, shape in ((lora.A, (rank, entry.shape[0])), (lora.B, (entry.shape[1], rank))):
            name = f"{peft_names.PREFIX}{module}.{peft_names.LEAVES[leaf]}"
            specs[name], ours[name] = (shape, kind), entry.ours.replace(".kernel", f".{leaf}")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, (shape, _) in specs.items():
            out = np.zeros(shape, kind)
            if ours[name] in adapters:
                array = np.asarray(adapters[ours[name]]).T
                out[tuple(map(slice, array.shape))] = array
            yield name, out

    size = sum(math.prod(s) * d.itemsize for s, d in specs.values())
    with writing.staging(dst, size) as folder:
        metadata = {"format": "pt"} | (footing.to_metadata() if footing else {})
        write_file(folder / WEIGHTS_FILE, specs, tensors(), metadata)
        writing.write_json(folder / CONFIG_FILE, peft_names.config_of(rank, used, base_name(base)))
        if whole is not None and whole[0]:
            _write_whole(folder / WHOLE_FILE, cfg, *whole)
        if character is not None:
            writing.write_json(folder / CHARACTER_FILE, character)


def _write_whole(
    path: Path, cfg: ModelConfig, infos: Mapping[str, ArrayInfo], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    entries = {e.ours: e for e in table.model_table(cfg)}
    specs = {entries[n].torch: (entries[n].torch_shape, i.dtype) for n, i in infos.items()}
    write_file(path, specs, ((entries[n].torch, entries[n].to_torch(x)) for n, x in arrays))


def open_step(step: str | Path, item: str | None = None) -> OrbaxWeights:
    """The weights of a training step, its adapters beside them.

    Raises:
      UserError: not a training step, or one without adapters.
    """
    step = Path(step).absolute()
    found = weights_lib.orbax_item(step, MODEL, item)
    weights = None if found is None else OrbaxWeights(found)
    if weights is None or not any(map(lora.is_adapter, weights.infos)):
        raise UserError(
            f"{step}: holds no adapters. Only a run with trainable = 'lora' has some; to make them from a full"
            " fine-tune: unichar convert --lora RANK FINETUNE BASE DST"
        )
    return weights


def adapters_of(step: str | Path, item: str | None = None) -> dict[str, np.ndarray]:
    """Adapters of a training step by on-disk name; the rest of the step is not read. Errors as ``open_step``."""
    return adapters_in(open_step(step, item))


def adapters_in(weights: Weights) -> dict[str, np.ndarray]:
    return dict(weights.read([n for n in weights.infos if lora.is_adapter(n)]))


def export(
    run: str | Path,
    dst: str | Path,
    *,
    item: str | None = None,
    dtype: Any = None,
    character: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapters of a run (its latest step) or of a training step as a new folder.

    Args:
      run: a run, or one of its steps.
      dst: the folder.
      item: ``weights`` or ``ema`` (default: averaged weights where they are kept, as for inference).
      dtype: on disk; by default as trained.
      character: who they play.
    """
    step = runs.resolve(run)
    item = item or runs.weights_item(step)
    weights, home = open_step(step, item), store.config_folder(step)
    cfg = store.load_config(home)
    footing = footing_lib.of_weights(weights, cfg)
    save(
        dst, adapters_in(weights), cfg, base=base_of(home), dtype=dtype, footing=footing, character=character
    )


def save_trained(
    run: str | Path, arrays: Mapping[str, jax.Array], base: str, around: Mapping[str, jax.Array]
) -> Path:
    """Writes what a run trained as ``lora`` in its directory, in place of an older one; returns the folder.

    With several processes all must call this; the first one writes.

    Args:
      run: the run's directory, with the model's configs.
      arrays: adapters by module name, layers stacked, on any mesh.
      base: what they were trained around.
      around: its arrays.
    """
    cfg = store.load_config(run)
    footing = footing_lib.of_arrays(around, cfg)
    whole = {n: mesh_lib.host(x) for n, x in arrays.items() if lora.is_adapter(n)}
    folder = Path(run) / FOLDER
    if jax.process_index() == 0:
        spelled = {
            layer: x[i] for n, x in whole.items() for i, layer in enumerate(params.unstacked_names(n, len(x)))
        }
        for name in (CONFIG_FILE, WEIGHTS_FILE, WHOLE_FILE, CHARACTER_FILE):
            (folder / name).unlink(missing_ok=True)  # anything else stays, and then ``save`` says so
        save(folder, spelled, cfg, base=base, footing=footing)
    return folder


def base_name(base: str) -> str:
    """What a folder that may be published says of its base: a Hub's name as it is, of a local path its end."""
    given = Path(base)
    local = given.is_absolute() or given.exists() or base.startswith((".", "~")) or len(given.parts) > 2
    if not local:
        return base
    return given.parent.parent.name if given.parent.name == "checkpoints" else given.name


def base_of(run: Path) -> str:
    return str(runs.read_info(run).settings.get("base", ""))


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFile:
    """A checked folder: its arrays by on-disk name, in this package's layout, each pair's factor folded into B.

    Attributes:
      folder: where.
      cfg: the model it was checked against.
      places: where adapters are, with their ranks.
      shapes: of everything in it, adapters and whole arrays.
      base: what it says that it belongs to.
      footing: some of that base's values, if it has any.
    """

    folder: Path
    cfg: ModelConfig
    places: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    base: str
    footing: Footing | None
    _tensors: Mapping[str, tuple[TensorFile, str, table.Entry | None, float]] = field(repr=False)

    @property
    def whole(self) -> list[str]:
        """Names of the arrays that are kept whole."""
        return [n for n in self.shapes if not lora.is_adapter(n)]

    def read(self, name: str) -> np.ndarray:
        """One array as stored; B of a pair with another factor than 1 is float32."""
        file, stored, entry, factor = self._tensors[name]
        array = file.read(stored)
        if entry is not None:
            return entry.from_torch(array)
        return array.T if factor == 1 else array.T.astype(np.float32) * np.float32(factor)

    @property
    def character(self) -> dict[str, str] | None:
        """Who the adapters play, if the folder says so."""
        return character_of(self.folder)


def open_lora(folder: str | Path, cfg: ModelConfig) -> LoraFile:
    """Opens a folder of adapters and checks all of it against a model; arrays are not read.

    Raises:
      UserError: no such folder, options that are not understood, or tensors that are missing, unknown, or of
        another base's shape; every problem is listed.
    """
    folder = Path(folder)
    config = peft_names.read_config(folder)
    file = open_file(folder / WEIGHTS_FILE)
    modules = peft_names.projections(cfg)
    problems: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        module, leaf = peft_names.parse(name, modules)
        if module is None:
            problems.append(f"{name}: no projection of this model's experts")
        else:
            found.setdefault(module, {})[leaf] = name
    wanted = peft_names.wanted(config["target_modules"], modules)
    problems += [f"{m}: is among target_modules, but has no tensors" for m in sorted(wanted - found.keys())]
    problems += [f"{m}: has tensors, but is not among target_modules" for m in sorted(found.keys() - wanted)]
    tensors: dict[str, tuple[TensorFile, str, table.Entry | None, float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, pair in found.items():
        ours = modules[module].ours
        problems += [
            f"{module}: {peft_names.LEAVES[leaf]} is missing" for leaf in (lora.A, lora.B) if leaf not in pair
        ]
        if len(pair) < 2:
            continue
        a, b = (file.tensors[pair[leaf]].shape for leaf in (lora.A, lora.B))
        problem, rank = _pair_problem(config, modules[module].shape, a, b)
        if problem:
            problems.append(f"{module}: {problem}")
            continue
        factor = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        for leaf in (lora.A, lora.B):
            name = ours.replace(".kernel", f".{leaf}")
            tensors[name] = (file, pair[leaf], None, factor if leaf == lora.B else 1.0)
            shapes[name] = tuple(reversed(file.tensors[pair[leaf]].shape))
    if (folder / WHOLE_FILE).is_file():
        problems += _open_whole(open_file(folder / WHOLE_FILE), cfg, tensors, shapes)
    if problems:
        raise UserError(
            f"{folder}: the adapters do not fit this model:{listed(problems)}\n"
            f"They were made for '{config.get('base_model_name_or_path')}'; use them with that base."
        )
    base = str(config.get("base_model_name_or_path"))
    footing = Footing.from_metadata(file.metadata, file.path)
    return LoraFile(folder, cfg, lora.places_in(shapes), shapes, base, footing, tensors)


def require_base(source: LoraFile, base: Weights | Mapping[str, jax.Array]) -> None:
    """Refuses a base that is not the one that adapters were made around (if they say so).

    Args:
      source: the adapters.
      base: its weights, or its arrays by module name.
    """
    if source.footing is not None:
        found = footing_lib.of_arrays if isinstance(base, Mapping) else footing_lib.of_weights
        footing_lib.require(
            source.footing,
            found(base, source.cfg),
            f"{source.folder}: these adapters stand on '{source.base}'",
        )


def _pair_problem(
    config: Mapping[str, Any], kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[str, int]:
    """What is wrong with the shapes of a pair ("" if nothing), and its rank."""
    if len(a) != 2 or len(b) != 2:
        return f"expected matrices, got {list(a)} and {list(b)}", 0
    if (a[1], b[0]) != kernel:
        return f"made for a projection [{a[1]}, {b[0]}], this base's is {list(kernel)}", 0
    if a[0] != b[1]:
        return f"its two ranks differ: {a[0]} and {b[1]}", 0
    if not config.get("rank_pattern") and a[0] != config["r"]:
        return f"has rank {a[0]}, {CONFIG_FILE} says r = {config['r']}", 0
    return "", a[0]


def _open_whole(
    file: TensorFile, cfg: ModelConfig, tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """Adds the arrays that are kept whole; returns what is wrong with them."""
    by_torch = {e.torch: e for e in table.model_table(cfg)}
    problems = []
    for name, info in file.tensors.items():
        entry = by_torch.get(name)
        if entry is None:
            problems.append(f"{file.path.name}: {name}: not in this model")
        elif info.shape != entry.torch_shape:
            problems.append(
                f"{file.path.name}: {name}: expected {list(entry.torch_shape)}, got {list(info.shape)}"
            )
        else:
            tensors[entry.ours], shapes[entry.ours] = (file, name, entry, 1.0), entry.shape
    for name, spec in params.named_leaves(UnifiedModel(cfg)):
        layers = params.stored_names(name, spec)
        absent = [n for n in layers if n not in shapes]
        if len(absent) < len(layers):
            problems += [f"{file.path.name}: {n}: is missing beside its other layers" for n in absent]
    return problems


def load(
    source: LoraFile | str | Path,
    cfg: ModelConfig | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> dict[str, jax.Array]:
    """Arrays for ``models.lora.adapted``: layers stacked, ranks of a place made equal, on any mesh.

    Args:
      source: an opened folder, or a folder.
      cfg: the model's sizes, for a folder.
      mesh: arrays go to their place on it; without one, to the default device.
      dtype: of the arrays (default: as stored).
    """
    if not isinstance(source, LoraFile):
        if cfg is None:
            raise TypeError("load: a folder needs the model's cfg")
        source = open_lora(source, cfg)
    declared = lora.declare(UnifiedModel(source.cfg), source.places)
    out: dict[str, jax.Array] = {}
    for name, spec in params.named_leaves(declared):
        names = params.stored_names(name, spec)
        if any(n in source.shapes for n in names):
            layers = _stacked(source, names, (len(names), *params.one_layer(spec).shape), dtype)
            out[name] = params.placed(spec, layers.reshape(spec.shape).__getitem__, mesh)
    return out


def _stacked(source: LoraFile, names: Sequence[str], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Layers one after the other, in the first corner of zeros: a smaller rank, or a layer without adapter."""
    arrays = [source.read(n) if n in source.shapes else None for n in names]
    out = np.zeros(shape, dtype or next(x.dtype for x in arrays if x is not None))
    for layer, array in zip(out, arrays, strict=True):
        if array is not None:
            layer[tuple(map(slice, array.shape))] = array
    return out


# -- merging while weights stream ---------------------------------------------------------------------------


class WithAdapters:
    """``Weights`` of a base with adapters merged in: products in float32, results in the base's dtype.

    Args:
      base: the weights, which may hold adapters that are to be merged.
      source: adapters and whole arrays from elsewhere.
    """

    def __init__(self, base: Weights, source: LoraFile | None = None):
        self._base, self._source = base, source
        self._own = set(base.infos) if source is None else set(source.shapes)
        self.infos = {n: i for n, i in base.infos.items() if not lora.is_adapter(n)}

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in self._base.read(names):
            yield name, self._merged(name, array)

    def _merged(self, name: str, array: np.ndarray) -> np.ndarray:
        if self._source is not None and name in self._own:
            return self._source.read(name).astype(array.dtype)
        stem, _, leaf = name.rpartition(".")
        if leaf != "kernel" or f"{stem}.{lora.A}" not in self._own:
            return array
        a, b = (x.astype(np.float32) for x in self._pair(stem))
        return (array.astype(np.float32) + a @ b).astype(array.dtype)

    def _pair(self, stem: str) -> list[np.ndarray]:
        names = [f"{stem}.{lora.A}", f"{stem}.{lora.B}"]
        if self._source is not None:
            return [self._source.read(n) for n in names]
        return [x for _, x in self._base.read(names)]


def merged(weights: Weights) -> Weights:
    """Weights whose own adapters, if there are any, are merged as they are read."""
    return WithAdapters(weights) if any(map(lora.is_adapter, weights.infos)) else weights

"""What both stages start from: the base and its adapters, and the run's folder.

``find_base`` decides, for training as for ``unichar plan`` and ``doctor``, what a base is: a directory with
configs and weights, or the name of a preset, which asks for random weights of that size (and the run says so
first). The run's folder is itself a model directory: configs, tokenizer and autoencoder of the base lie beside
``checkpoints/``, and what the run says of itself in ``run.json``, so inference needs nothing else. It is written
(``write_run_folder``) when everything that a start can check has been: a start that is refused changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from unichar_jax.checkpoint import lora as lora_files
from unichar_jax.checkpoint import runs, store, table, writing
from unichar_jax.checkpoint.fingerprint import fingerprint
from unichar_jax.checkpoint.remote import RunFolder, fetched
from unichar_jax.checkpoint.runs import RunInfo
from unichar_jax.checkpoint.safetensors_io import write_tensors
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import MODEL_PRESETS, ModelConfig, model_preset
from unichar_jax.config.train import RunOptions, SFTConfig
from unichar_jax.data import portraits
from unichar_jax.data.portraits import Portrait
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, write_debug_tokenizer
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.kernels import choice
from unichar_jax.models.lora import add_lora, attach
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import distributed
from unichar_jax.training import state as state_lib
from unichar_jax.training.loop import ProfileWindow
from unichar_jax.training.state import TrainState


@dataclass(frozen=True)
class Source:
    """What a base is, before its weights are read.

    Attributes:
      cfg: sizes.
      home: folder of configs, tokenizer and autoencoder; None for a preset.
      weights: the directory or step to load; None: random weights.
    """

    cfg: ModelConfig
    home: Path | None = None
    weights: Path | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights, whatever folder they are in; "" for random ones."""
        return "" if self.weights is None else fingerprint(self.weights, self.cfg)

    @property
    def info(self) -> RunInfo:
        """What the base says of itself, if it is a run."""
        return RunInfo() if self.home is None else runs.read_info(self.home)

    @property
    def characters(self) -> list[Portrait]:
        """Whom the base plays, if it is a run."""
        return [] if self.home is None else portraits.kept(self.home)

    @property
    def transforms(self) -> Transforms:
        return Transforms.usual(self.cfg) if self.home is None else Transforms.of_folder(self.home)


def find_base(name: str) -> Source:
    """What a configuration's ``base`` names. Nothing is loaded.

    Raises:
      UserError: neither a directory with configs nor a preset; or a directory that lacks weights, autoencoder or
        tokenizer.
    """
    shipped = presets.resource_dir("checkpoints") / name
    given = fetched(name)
    home = next((p for p in (given, shipped) if (p / store.CONFIG_FILE).is_file()), None)
    if home is None and given.is_dir() and given.parent.name == "checkpoints":
        home = given  # a step of a run
    if home is None and name in MODEL_PRESETS:
        return Source(model_preset(name))
    if home is None:
        raise UserError(
            f"base '{name}': not a directory with {store.CONFIG_FILE}, and no preset of that name; expected a"
            f" model directory, a BAGEL directory, or one of {', '.join(MODEL_PRESETS)}."
        )
    step = runs.resolve(home)
    home = store.config_folder(step)
    lacking = _lacking(home, step)
    if lacking:
        raise UserError(
            f"base '{name}': {home} has configs but no {', no '.join(lacking)}. Download the whole model"
            f" (hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir {name}), or name another base; random weights"
            f" are what the name of a preset asks for: --base {' or --base '.join(MODEL_PRESETS)}."
        )
    return Source(store.load_config(home), home, step)


def _lacking(home: Path, step: Path) -> list[str]:
    """What a base cannot do without."""
    weights = ("ema.safetensors", "model", "weights", *(p.name for p in step.glob("model*.safetensors")))
    found = {
        "weights (ema.safetensors or model-*.safetensors)": any((step / n).exists() for n in weights),
        "ae.safetensors": any((home / n).exists() for n in ("ae.safetensors", "autoencoder")),
        "tokenizer (tokenizer.json or vocab.json)": writing.has_tokenizer(home),
    }
    return [what for what, there in found.items() if not there]


@dataclass(frozen=True)
class Base:
    """What a run starts from. ``model`` is on the mesh, float32 where it is to be trained and else in the compute
    dtype; ``origin`` says where it came from."""

    cfg: ModelConfig
    model: UnifiedModel
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    origin: str
    source: Source


def load_base(cfg: SFTConfig | GRPOConfig, mesh: Mesh) -> Base:
    """Loads ``cfg.base``; writes nothing.

    Raises:
      UserError: as ``find_base``, or the base's files do not fit together.
    """
    source = find_base(cfg.base)
    declared = _declare_base(cfg, source.cfg)
    size = f"{params.count(declared):,} parameters"
    tokenizer = base_tokenizer(cfg.base, source)
    if source.home is None or source.weights is None:
        model = params.initialize(declared, cfg.seed, mesh)
        origin = f"random weights of preset '{cfg.base}', {size}"
        return Base(source.cfg, model, _random_autoencoder(cfg, source.cfg), tokenizer, origin, source)
    autoencoder = store.load_autoencoder(source.home)
    item = runs.weights_item(source.weights)
    dtypes = {name: spec.dtype for name, spec in params.named_leaves(declared)}
    model = store.load_model(source.weights, compute=cfg.compute, mesh=mesh, dtype=dtypes, item=item)
    origin = f"{source.weights}: {len(params.flat(declared))} arrays, {size}"
    return Base(source.cfg, model, autoencoder, tokenizer, origin, source)


def base_tokenizer(name: str, source: Source) -> Tokenizer:
    """The base's; for a preset that is as small as ``debug``, one that is made here."""
    if source.home is not None:
        return load_tokenizer(source.home, source.cfg)
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(_random_tokenizer(Path(folder), name), source.cfg)


def _random_tokenizer(folder: Path, base: str) -> Path:
    if model_preset(base).decoder.vocab_size > 4096:
        raise UserError(
            f"base '{base}': random weights need a tokenizer, and none ships for this size; give a BAGEL directory."
        )
    write_debug_tokenizer(folder)
    return folder


def _random_autoencoder(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> Autoencoder:
    return params.initialize(Autoencoder(model.autoencoder), cfg.seed)


def declare(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> UnifiedModel:
    """The model of a run as a tree of declarations, with adapters where they are what learns."""
    declared = _declare_base(cfg, model)
    if cfg.trainable != "lora":
        return declared
    lora = cfg.lora
    return add_lora(declared, lora.rank, lora.alpha, lora.experts, lora.targets)


def with_adapters(
    base: Base, cfg: SFTConfig | GRPOConfig, mesh: Mesh | None
) -> tuple[UnifiedModel, UnifiedModel]:
    """Declarations and arrays of the model that is trained: the base, and adapters around it if any."""
    declared = declare(cfg, base.cfg)
    return declared, attach(base.model, declared, cfg.seed, mesh)


def settle_attention(run: RunFolder, cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> None:
    """Decides what ``compute.attention = auto`` stands for, and keeps it with the run."""
    if isinstance(cfg, SFTConfig):
        length = sum(cfg.data.capacities or (cfg.data.tokens_per_row,))
    else:  # a picture and its prompt
        length = cfg.rollout.height * cfg.rollout.width // model.pixels_per_latent**2 + 128
    choice.settle(cfg.compute, model.decoder, length, run.local / "attention.json")


def save_adapters(cfg: SFTConfig | GRPOConfig, run: RunFolder, state: TrainState) -> Path:
    """What a run trained, as a small folder of its own; averaged where the run keeps an average."""
    trained = state.params if state.ema is None else state.ema
    folder = lora_files.save_trained(run.local, trained, cfg.base, state.frozen)
    if distributed.is_leader():
        run.push()
    return folder


def profile_window(options: RunOptions, run_dir: Path) -> ProfileWindow | None:
    return None if options.profile is None else ProfileWindow(run_dir / "profile", *options.profile)


FREE = (
    "run_dir",
    "steps",
    "rounds",
    "log_every",
    "sample_every",
    "validate_every",
    "pictures_every",
    "save",
    "run",
    "eval.every",
    "data.path",  # what is in it is compared when the data is read
    "data.workers",
    "data.cache_dir",
)
"""Settings (or whole tables of them) that may change when a run goes on: they do not change what it computes."""

SPREAD = ("mesh", "data.rows_per_device", "accumulate")
"""Settings that may change together, as long as the global batch is the same."""


def open_run(
    run: RunFolder,
    stage: str,
    cfg: SFTConfig | GRPOConfig,
    global_batch: int = 0,
    *,
    allow_changes: bool = False,
) -> None:
    """Makes ``run.local`` what the run has, and refuses to go on with it under other settings.

    Args:
      run: its folder; nothing may be there yet.
      stage: "sft" or "grpo".
      cfg: of this start.
      global_batch: as in ``RunInfo``.
      allow_changes: go on all the same.

    Raises:
      UserError: with every setting that differs, beyond ``FREE`` and ``SPREAD``.
    """
    if distributed.is_leader():
        run.pull()
    distributed.barrier("run opened")
    if not distributed.is_leader() and not run.is_shared:
        run.pull()
    info = runs.read_info(run.local)
    steps = runs.complete_steps(epath.Path(run.checkpoints)) if info.stage else []
    if not steps:
        return  # nothing to go on with
    if info.stage != stage:
        raise UserError(
            f"{cfg.run_dir}: a run of {info.stage} is there; give --run-dir another folder for {stage}."
        )
    free = FREE
    if cfg.base != info.settings.get("base") and info.base_weights == find_base(cfg.base).fingerprint != "":
        free = (*FREE, "base")  # the same weights, from another folder
    spread = SPREAD if global_batch == info.global_batch or not info.global_batch else ()
    default = _as_json(type(cfg)())
    then, now = (_fields(tree, default) for tree in (default | info.settings, _as_json(cfg)))
    changed = [
        f"  {name}: {then[name]!r} then, {value!r} now"
        for name, value in now.items()
        if value != then.get(name, value)
        and not any(f"{name}.".startswith(f"{group}.") for group in (*free, *spread))
    ]
    if changed and not allow_changes:
        shown = "\n".join(changed)
        raise UserError(
            f"{cfg.run_dir}: the run there is at step {steps[-1]} and was made with other settings:\n{shown}\nGive"
            " it what it had, or --run-dir another folder; --allow-changes goes on with the new settings."
        )


def _as_json(config: SFTConfig | GRPOConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _fields(tree: dict[str, Any], like: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name; ``like`` says what is a table of settings."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        table_of = like.get(name)
        if isinstance(value, dict) and isinstance(table_of, dict) and table_of:
            out |= _fields(table_of | value, table_of, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def run_info(
    stage: str, cfg: SFTConfig | GRPOConfig, base: Base, transforms: Transforms, global_batch: int = 0
) -> RunInfo:
    """What the run will say of itself, but for its characters."""
    return RunInfo(
        stage,
        dataclasses.asdict(cfg),
        global_batch=global_batch,
        before=base.source.info.lineage,
        transforms=transforms.to_json(),
        base_weights=base.source.fingerprint,
        directory=os.getcwd(),
    )


def write_run_folder(
    run: RunFolder, cfg: SFTConfig | GRPOConfig, base: Base, info: RunInfo, who: Sequence[Portrait]
) -> None:
    """Configs, tokenizer and autoencoder into the run, complete or not at all; where they are, they stay.
    And what this start says of itself: ``info``, with the characters ``who``."""
    folder = run.local
    if distributed.is_leader():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / store.CONFIG_FILE).is_file():
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
                _write_model_files(Path(made), cfg, base.source)
                # The first config comes last: its presence says that the rest is there.
                for path in sorted(Path(made).iterdir(), key=lambda p: p.name == store.CONFIG_FILE):
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    path.replace(folder / path.name)
        runs.write_info(folder, dataclasses.replace(info, characters=portraits.keep(folder, who)))
        run.push()
    distributed.barrier("run folder")
    if not distributed.is_leader() and not run.is_shared:
        run.pull()
    if not (folder / store.CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: what process 0 wrote there is not seen by process {jax.process_index()}. All hosts need the"
            " same run_dir: put it on a file system that they share, or in a bucket (gs://)."
        )


def _write_model_files(folder: Path, cfg: SFTConfig | GRPOConfig, source: Source) -> None:
    """What a model directory has beside its weights."""
    if source.home is None:
        _random_tokenizer(folder, cfg.base)
        tensors = table.module_to_torch(
            _random_autoencoder(cfg, source.cfg), table.autoencoder_table(source.cfg.autoencoder)
        )
        write_tensors(folder / "ae.safetensors", tensors)
    elif (source.home / "autoencoder").is_dir():
        shutil.copytree(source.home / "autoencoder", folder / "autoencoder")
    else:
        shutil.copy(source.home / "ae.safetensors", folder)
    writing.write_companions(folder, source.cfg, source.home, source.home)


def _declare_base(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> UnifiedModel:
    return state_lib.frozen_in(cfg.compute.jax_dtype, UnifiedModel(model, cfg.compute), cfg.trainable)

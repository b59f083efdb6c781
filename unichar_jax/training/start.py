"""What both stages start from: the base and its adapters, and the run's folder.

Weights come from ``base``; if that is a preset's name, they are random weights of that size (and the run says so
first). The run's folder is itself a model directory: configs, tokenizer and autoencoder lie beside
``checkpoints/``, so inference needs nothing else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from unichar_jax.checkpoint import lora as lora_files
from unichar_jax.checkpoint import runs, store, table, writing
from unichar_jax.checkpoint.remote import RunFolder, fetched
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import MODEL_PRESETS, ModelConfig, model_preset
from unichar_jax.config.train import RunOptions, SFTConfig
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.lora import add_lora, attach
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import distributed
from unichar_jax.training import state as state_lib
from unichar_jax.training.loop import ProfileWindow
from unichar_jax.training.state import TrainState


@dataclass(frozen=True)
class Base:
    """What a run starts from. ``model`` is on the mesh, float32 where it is to be trained and else in the compute
    dtype; ``origin`` says where it came from."""

    cfg: ModelConfig
    model: UnifiedModel
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    origin: str


def load_base(cfg: SFTConfig | GRPOConfig, run: RunFolder, mesh: Mesh) -> Base:
    """Loads ``cfg.base``, and writes what inference needs and the configuration into the run's directory.

    Raises:
      UserError: the base is neither a directory nor a preset, or its files do not fit together.
    """
    shipped = presets.resource_dir("checkpoints") / cfg.base
    given = fetched(cfg.base)
    source = next((p for p in (given, shipped) if (p / store.CONFIG_FILE).is_file()), None)
    if source is None and cfg.base not in MODEL_PRESETS:
        raise UserError(
            f"base '{cfg.base}': not a directory with {store.CONFIG_FILE}, and no preset of that name; expected a"
            f" model directory, a BAGEL directory, or one of {', '.join(MODEL_PRESETS)}."
        )
    run_dir = run.local
    _write_run_folder(run, source, cfg)
    model_cfg = store.load_config(run_dir)
    tokenizer = load_tokenizer(run_dir, model_cfg)
    declared = _declare_base(cfg, model_cfg)
    weights = None if source is None else _weights_of(source)
    if weights is not None:
        item = runs.weights_item(weights)
        dtypes = {name: spec.dtype for name, spec in params.named_leaves(declared)}
        model = store.load_model(weights, compute=cfg.compute, mesh=mesh, dtype=dtypes, item=item)
        origin = f"{weights}: {len(params.flat(declared))} arrays, {params.count(declared):,} parameters"
    else:
        model = params.initialize(declared, cfg.seed, mesh)
        origin = f"random weights of preset '{cfg.base}', {params.count(declared):,} parameters"
    autoencoder = store.load_autoencoder(run_dir)
    return Base(model_cfg, model, autoencoder, tokenizer, origin)


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


def save_adapters(cfg: SFTConfig | GRPOConfig, run: RunFolder, state: TrainState) -> Path:
    """What a run trained, as a small folder of its own; averaged where the run keeps an average."""
    folder = lora_files.save_trained(run.local, state.params if state.ema is None else state.ema, cfg.base)
    if distributed.is_leader():
        run.push()
    return folder


def profile_window(options: RunOptions, run_dir: Path) -> ProfileWindow | None:
    return None if options.profile is None else ProfileWindow(run_dir / "profile", *options.profile)


def _weights_of(folder: Path) -> Path | None:
    """Where a directory keeps its weights: a run in its latest complete step, a model directory in itself."""
    if runs.is_run(folder):
        return runs.resolve(folder)
    names = ("ema.safetensors", "model", *(p.name for p in folder.glob("model*.safetensors")))
    return folder if any((folder / name).exists() for name in names) else None


def _write_run_folder(run: RunFolder, source: Path | None, cfg: SFTConfig | GRPOConfig) -> None:
    """Configs, tokenizer and autoencoder into the run, complete or not at all; where they are, they stay.
    And the configuration of this start."""
    folder = run.local
    if distributed.is_leader():
        run.pull()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / store.CONFIG_FILE).is_file():
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
                _write_model_files(Path(made), source, cfg)
                # The first config comes last: its presence says that the rest is there.
                for path in sorted(Path(made).iterdir(), key=lambda p: p.name == store.CONFIG_FILE):
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    path.replace(folder / path.name)
        temporary = folder / ".config.json"
        temporary.write_text(presets.to_json(cfg))
        temporary.replace(folder / "config.json")
        run.push()
    distributed.barrier("run folder")
    if not distributed.is_leader() and not run.is_shared:
        run.pull()
    if not (folder / store.CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: what process 0 wrote there is not seen by process {jax.process_index()}. All hosts need the"
            " same run_dir: put it on a file system that they share, or in a bucket (gs://)."
        )


def _write_model_files(folder: Path, source: Path | None, cfg: SFTConfig | GRPOConfig) -> None:
    if source is not None:
        model_cfg = store.load_config(source)
        home = store.config_folder(source)
        for path in home.iterdir():
            if path.name in writing.TOKENIZER_FILES or path.name == "ae.safetensors":
                shutil.copy(path, folder)
        if (home / "autoencoder").is_dir():
            shutil.copytree(home / "autoencoder", folder / "autoencoder")
    else:
        model_cfg = model_preset(cfg.base)
        if model_cfg.decoder.vocab_size > 4096:
            raise UserError(
                f"base '{cfg.base}': random weights need a tokenizer, and none ships for this size; give a directory"
                " with the tokenizer's files (a BAGEL download without its weights is enough)."
            )
        write_debug_tokenizer(folder)
    if not (folder / "ae.safetensors").exists() and not (folder / "autoencoder").exists():
        random = params.initialize(Autoencoder(model_cfg.autoencoder), cfg.seed)
        tensors = table.module_to_torch(random, table.autoencoder_table(model_cfg.autoencoder))
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        write_file(folder / "ae.safetensors", shapes, tensors.items())
    for name, content in model_cfg.to_bagel().items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _declare_base(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> UnifiedModel:
    return state_lib.frozen_in(cfg.compute.jax_dtype, UnifiedModel(model, cfg.compute), cfg.trainable)

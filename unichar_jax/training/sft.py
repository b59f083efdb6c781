"""Stage 1, Unified-SFT: from a configuration to a finished run.

Initialisation, in order of priority: the latest complete checkpoint in ``run_dir``; else the weights of
``base``; else, if ``base`` is a preset's name, random weights of that size (and then the run says so first).
The run's directory is itself a model directory: configs, tokenizer and autoencoder lie beside
``checkpoints/``, so inference needs nothing else.

Source: UniCharacter (arXiv 2605.08129), Unified-SFT; BAGEL (arXiv 2505.14683) for the objective.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint import runs, store, table, writing
from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import MODEL_PRESETS, ModelConfig, model_preset
from unichar_jax.config.train import SFTConfig
from unichar_jax.data.loader import Prefetch, make_loader
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder, patchify
from unichar_jax.models.lora import add_lora, attach
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.training import state as state_lib
from unichar_jax.training.loop import Hook, Loop
from unichar_jax.training.metrics import MetricsLog
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.step import make_sft_step


@dataclass(frozen=True)
class Base:
    """What a run starts from. ``model`` is on the mesh, in float32; ``origin`` says where it came from."""

    cfg: ModelConfig
    model: UnifiedModel
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    origin: str


def load_base(cfg: SFTConfig | GRPOConfig, run_dir: Path, mesh: Mesh) -> Base:
    """Loads ``cfg.base``, and copies what inference needs into the run's directory.

    Raises:
      UserError: the base is neither a directory nor a preset, or its files do not fit together.
    """
    shipped = presets.resource_dir("checkpoints") / cfg.base
    source = next((p for p in (Path(cfg.base), shipped) if (p / store.CONFIG_FILE).is_file()), None)
    if source is None and cfg.base not in MODEL_PRESETS:
        raise UserError(
            f"base '{cfg.base}': not a directory with {store.CONFIG_FILE}, and no preset of that name; expected a"
            f" model directory, a BAGEL directory, or one of {', '.join(MODEL_PRESETS)}."
        )
    _furnish(run_dir, source, cfg)
    model_cfg = store.load_config(run_dir)
    tokenizer = load_tokenizer(run_dir, model_cfg)
    declared = UnifiedModel(model_cfg, cfg.compute)
    weights = None if source is None else _weights_of(source)
    if weights is not None:
        item = runs.weights_item(weights)
        model = store.load_model(weights, compute=cfg.compute, mesh=mesh, dtype=jnp.float32, item=item)
        origin = f"{weights}: {len(params.flat(declared))} arrays, {params.count(declared):,} parameters"
    else:
        model = params.initialize(declared, cfg.seed, mesh)
        origin = f"random weights of preset '{cfg.base}', {params.count(declared):,} parameters"
    autoencoder = store.load_autoencoder(run_dir)
    return Base(model_cfg, model, autoencoder, tokenizer, origin)


def _weights_of(folder: Path) -> Path | None:
    """Where a directory keeps its weights: a run in its latest complete step, a model directory in itself."""
    if runs.is_run(folder):
        return runs.resolve(folder)
    names = ("ema.safetensors", "model", *(p.name for p in folder.glob("model*.safetensors")))
    return folder if any((folder / name).exists() for name in names) else None


def _furnish(run_dir: Path, source: Path | None, cfg: SFTConfig | GRPOConfig) -> None:
    """Configs, tokenizer and autoencoder into the run, complete or not at all; a furnished run is left alone."""
    if (run_dir / store.CONFIG_FILE).is_file():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    if source is not None:
        model_cfg = store.load_config(source)
        home = store.config_folder(source)
        for path in home.iterdir():
            if path.name in writing.TOKENIZER_FILES or path.name == "ae.safetensors":
                shutil.copy(path, run_dir)
        if (home / "autoencoder").is_dir():
            shutil.copytree(home / "autoencoder", run_dir / "autoencoder", dirs_exist_ok=True)
    else:
        model_cfg = model_preset(cfg.base)
        if model_cfg.decoder.vocab_size > 4096:
            raise UserError(
                f"base '{cfg.base}': random weights need a tokenizer, and none ships for this size; give a directory"
                " with the tokenizer's files (a BAGEL download without its weights is enough)."
            )
        write_debug_tokenizer(run_dir)
    if not (run_dir / "ae.safetensors").exists() and not (run_dir / "autoencoder").exists():
        random = params.initialize(Autoencoder(model_cfg.autoencoder), cfg.seed)
        tensors = table.module_to_torch(random, table.autoencoder_table(model_cfg.autoencoder))
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        write_file(run_dir / "ae.safetensors", shapes, tensors.items())
    # The configs come last: their presence says that the rest is there.
    for name, content in model_cfg.to_bagel().items():
        (run_dir / name).write_text(json.dumps(content, indent=1) + "\n")


def with_adapters(
    base: Base, cfg: SFTConfig | GRPOConfig, mesh: Mesh | None
) -> tuple[UnifiedModel, UnifiedModel]:
    """Declarations and arrays of the model that is trained: the base, with adapters where they are what learns."""
    declared = UnifiedModel(base.cfg, cfg.compute)
    if cfg.trainable != "lora":
        return declared, base.model
    lora = cfg.lora
    declared = add_lora(declared, lora.rank, lora.alpha, lora.experts, lora.targets)
    return declared, attach(base.model, declared, cfg.seed, mesh)


def moments_function(autoencoder: Autoencoder, patch: int) -> Any:
    """Pictures float32 ``[n, h, w, 3]`` in [-1, 1] to posterior mean and log-variance tokens ``[n, N, d]``."""
    compiled = jax.jit(lambda pixels: tuple(patchify(m, patch) for m in autoencoder.moments(pixels)))

    def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, logvar = compiled(pixels)
        return np.asarray(mean), np.asarray(logvar)

    return moments


def train(cfg: SFTConfig, *, hooks: Sequence[tuple[int, Hook]] = (), quiet: bool = False) -> Path:
    """Runs Unified-SFT to its last step, resuming if ``run_dir`` holds a checkpoint; returns the run's directory.

    Raises:
      UserError: a mistake in the configuration, the data or the base; or a loss that is not finite.
      Preempted: SIGTERM arrived and everything was saved.
    """
    run_dir = Path(cfg.run_dir)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    base = load_base(cfg, run_dir, mesh)
    (run_dir / "config.json").write_text(presets.to_json(cfg))
    say(f"starting from {base.origin}")
    say(f"mesh: {dict(mesh.shape)}")

    loader = make_loader(
        cfg.data,
        base.cfg,
        base.tokenizer,
        moments_function(base.autoencoder, base.cfg.latent_patch_size),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        global_batch=mesh_lib.global_batch_size(mesh, cfg.data.rows_per_device) * cfg.accumulate,
    )
    say(loader.describe())

    declared, model = with_adapters(base, cfg, mesh)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    with jax.set_mesh(mesh):
        layout, state = state_lib.create(
            model,
            declared,
            optimizer,
            trainable=cfg.trainable,
            ema=cfg.optimizer.ema_decay > 0,
            mesh=mesh,
        )
        tasks = list(loader.tasks)
        step = make_sft_step(layout, optimizer, cfg, base.cfg.autoencoder, len(tasks))
        loop = Loop(
            jax.jit(step, donate_argnums=0),
            layout,
            Prefetch(loader, functools.partial(mesh_lib.put_batch, mesh=mesh)),
            CheckpointManager(run_dir, declared, keep=cfg.save.keep, mesh=mesh),
            MetricsLog(
                run_dir / "metrics.jsonl",
                cfg.steps,
                names={"task_ce": tasks, "task_mse": tasks},
                quiet=quiet,
            ),
            steps=cfg.steps,
            save_every=cfg.save.every,
            log_every=cfg.log_every,
            hooks=hooks,
        )
        state = loop.resume(state)
        if int(state.step):
            say(f"resuming at step {int(state.step)}")
        loop.run(state)
    return run_dir


def with_overrides(cfg: SFTConfig, **fields: Any) -> SFTConfig:
    return dataclasses.replace(cfg, **fields)

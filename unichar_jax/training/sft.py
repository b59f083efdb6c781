"""Stage 1, Unified-SFT: from a configuration to a finished run.

Initialisation, in order of priority: the latest complete checkpoint in ``run_dir``; else the weights of
``base``; else, if ``base`` is a preset's name, random weights of that size (and then the run says so first).
The run's directory is itself a model directory: configs, tokenizer and autoencoder lie beside
``checkpoints/``, so inference needs nothing else.

Source: UniCharacter (arXiv 2605.08129), Unified-SFT; BAGEL (arXiv 2505.14683) for the objective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from unichar_jax.checkpoint import lora as lora_files
from unichar_jax.checkpoint import runs, store, table, writing
from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.checkpoint.remote import RunFolder, fetched
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.config import presets
from unichar_jax.config.data import DataConfig
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import MODEL_PRESETS, ModelConfig, model_preset
from unichar_jax.config.train import RunOptions, SFTConfig
from unichar_jax.data.loader import make_loader
from unichar_jax.data.prefetch import Prefetch
from unichar_jax.data.tokenizer import Tokenizer, load_tokenizer, write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder, patchify
from unichar_jax.models.lora import add_lora, attach
from unichar_jax.models.streams import Batch
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import distributed
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.training import state as state_lib
from unichar_jax.training import validation
from unichar_jax.training.loop import Hook, Loop, ProfileWindow, struct
from unichar_jax.training.metrics import USEFUL, MetricsLog
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.state import Layout, TrainState
from unichar_jax.training.step import make_sft_step
from unichar_jax.training.throughput import useful_flops
from unichar_jax.training.writers import make_writers


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
    _furnish(run, source, cfg)
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


def _weights_of(folder: Path) -> Path | None:
    """Where a directory keeps its weights: a run in its latest complete step, a model directory in itself."""
    if runs.is_run(folder):
        return runs.resolve(folder)
    names = ("ema.safetensors", "model", *(p.name for p in folder.glob("model*.safetensors")))
    return folder if any((folder / name).exists() for name in names) else None


def _furnish(run: RunFolder, source: Path | None, cfg: SFTConfig | GRPOConfig) -> None:
    """Configs, tokenizer and autoencoder into the run, complete or not at all; a furnished run is left alone.
    And the configuration of this start."""
    folder = run.local
    if distributed.is_leader():
        run.pull()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / store.CONFIG_FILE).is_file():
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
                _write_furniture(Path(made), source, cfg)
                # The first config comes last: its presence says that the rest is there.
                for path in sorted(Path(made).iterdir(), key=lambda p: p.name == store.CONFIG_FILE):
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    path.replace(folder / path.name)
        temporary = folder / ".config.json"
        temporary.write_text(presets.to_json(cfg))
        temporary.replace(folder / "config.json")
        run.push()
    distributed.barrier("furnished")
    if not distributed.is_leader() and not run.is_shared:
        run.pull()
    if not (folder / store.CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: what process 0 wrote there is not seen by process {jax.process_index()}. All hosts need the"
            " same run_dir: put it on a file system that they share, or in a bucket (gs://)."
        )


def _write_furniture(folder: Path, source: Path | None, cfg: SFTConfig | GRPOConfig) -> None:
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


def declare(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> UnifiedModel:
    """The model of a run as a tree of declarations, with adapters where they are what learns."""
    declared = _declare_base(cfg, model)
    if cfg.trainable != "lora":
        return declared
    lora = cfg.lora
    return add_lora(declared, lora.rank, lora.alpha, lora.experts, lora.targets)


def _declare_base(cfg: SFTConfig | GRPOConfig, model: ModelConfig) -> UnifiedModel:
    return state_lib.frozen_in(cfg.compute.jax_dtype, UnifiedModel(model, cfg.compute), cfg.trainable)


def with_adapters(
    base: Base, cfg: SFTConfig | GRPOConfig, mesh: Mesh | None
) -> tuple[UnifiedModel, UnifiedModel]:
    """Declarations and arrays of the model that is trained: the base, and adapters around it if any."""
    declared = declare(cfg, base.cfg)
    return declared, attach(base.model, declared, cfg.seed, mesh)


def moments_function(autoencoder: Autoencoder, patch: int) -> Any:
    """Pictures float32 ``[n, h, w, 3]`` in [-1, 1] to posterior mean and log-variance tokens ``[n, N, d]``."""
    compiled = jax.jit(lambda pixels: tuple(patchify(m, patch) for m in autoencoder.moments(pixels)))

    def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, logvar = compiled(pixels)
        return np.asarray(mean), np.asarray(logvar)

    return moments


def train(
    cfg: SFTConfig,
    *,
    hooks: Sequence[tuple[int, Hook]] = (),
    quiet: bool = False,
    rehearse: bool = False,
) -> Path:
    """Runs Unified-SFT to its last step, resuming if ``run_dir`` holds a checkpoint; returns the run's directory
    (of one in a bucket, the local mirror).

    Args:
      cfg: the experiment.
      hooks: called after steps that their interval divides.
      quiet: say nothing on the terminal.
      rehearse: at the end, read the checkpoint back and compare it bit by bit.

    Raises:
      UserError: a mistake in the configuration, the data or the base; or a loss that is not finite.
      Preempted: SIGTERM arrived and everything was saved.
    """
    run = RunFolder(cfg.run_dir)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    tell = not quiet and distributed.is_leader()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if tell else (lambda text: None)
    base = load_base(cfg, run, mesh)
    data = dataclasses.replace(cfg.data, path=str(fetched(cfg.data.path)))
    say(f"starting from {base.origin}")
    say(f"mesh: {dict(mesh.shape)}")

    rows = mesh_lib.global_batch_size(mesh, cfg.data.rows_per_device) * cfg.accumulate
    loader = make_loader(
        data,
        base.cfg,
        base.tokenizer,
        moments_function(base.autoencoder, base.cfg.latent_patch_size),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        global_batch=rows,
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
        log = MetricsLog(
            run.local / "metrics.jsonl",
            cfg.steps,
            names={"task_ce": tasks, "task_mse": tasks},
            quiet=quiet,
            writers=make_writers(cfg.run.writers, run.local, cfg),
            publish=run.push,
        )
        watched = [
            (cfg.validate_every, validation_hook(cfg, data, base, layout, log, mesh, loader.capacities.text)),
            (cfg.sample_every, sampling_hook(cfg, data, base, layout, log, mesh)),
        ]
        batches = Prefetch(loader, functools.partial(mesh_lib.put_batch, mesh=mesh))
        loop = Loop(
            jit_step(cfg, base.cfg, layout, optimizer, len(tasks), state, mesh),
            layout,
            batches,
            CheckpointManager(run.checkpoints, declared, keep=cfg.save.keep, mesh=mesh),
            log,
            steps=cfg.steps,
            save_every=cfg.save.every,
            log_every=cfg.log_every,
            hooks=[*((every, hook) for every, hook in watched if hook is not None), *hooks],
            profile=profile_window(cfg.run, run.local),
        )
        del base, model
        if loop.manager.latest is not None:
            state = jax.tree.map(struct, state)  # a resumed run has other arrays: no room for two models
        state = loop.resume(state)
        if int(state.step):
            say(f"resuming at step {int(state.step)}")
        with contextlib.closing(batches):  # ends the workers
            state = loop.run(state)
        if cfg.trainable == "lora":
            say(f"the adapters alone: {save_adapters(cfg, run, state)}")
        if rehearse:
            loop.rehearse(state)
            say(f"step {cfg.steps} was saved and read back bit by bit")
    return run.local


def save_adapters(cfg: SFTConfig | GRPOConfig, run: RunFolder, state: TrainState) -> Path:
    """What a run trained, as a small folder of its own; averaged where the run keeps an average."""
    folder = lora_files.save_trained(run.local, state.params if state.ema is None else state.ema, cfg.base)
    if distributed.is_leader():
        run.push()
    return folder


def jit_step(
    cfg: SFTConfig,
    model: ModelConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """The compiled step of a run: ``make_sft_step`` plus the useful work of its batch, shardings pinned."""
    bare = make_sft_step(layout, optimizer, cfg, model.autoencoder, num_tasks)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = bare(state, batch)
        useful = useful_flops(model, batch, cfg.trainable)
        return state, metrics if useful is None else metrics | {USEFUL: useful}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh_lib.replicated(mesh)))


def validation_hook(
    cfg: SFTConfig, data: DataConfig, base: Base, layout: Layout, log: MetricsLog, mesh: Mesh, room: int
) -> Hook | None:
    """Measures the loss on held-out dialogue, of the weights and of their average; None if it is not asked for."""
    if not cfg.validate_every:
        return None
    samples = validation.held_out_dialogue(validation.characters_of(data))
    if not samples:
        log.say("note: validate_every: the characters have no held-out dialogue, so nothing is validated")
        return None
    rows = mesh_lib.global_batch_size(mesh)
    batches = validation.pack(samples, base.tokenizer, base.cfg, rows, room)
    loss = validation.DialogueLoss(batches, mesh, cfg.ce_chunk)

    def validate(done: int, state: TrainState) -> None:
        values = {"ce": loss(layout.assemble(state.params, state.frozen))}
        if state.ema is not None:
            values["ce_ema"] = loss(layout.assemble(state.ema, state.frozen))
        log.side("validation", done, values)

    return validate


def sampling_hook(
    cfg: SFTConfig, data: DataConfig, base: Base, layout: Layout, log: MetricsLog, mesh: Mesh
) -> Hook | None:
    """Draws captions into ``pictures/``, with the average of the weights if there is one."""
    prompts = validation.captions(data) if cfg.sample_every else []
    if not prompts:
        return None
    sheet = validation.Sheet(prompts, base.tokenizer, base.autoencoder, base.cfg, data.draw_max, mesh)

    def draw(done: int, state: TrainState) -> None:
        picture = sheet(layout.assemble(state.params if state.ema is None else state.ema, state.frozen))
        if distributed.is_leader():
            validation.save_picture(log.path.parent / "pictures", f"step-{done:06d}.png", picture)
            log.picture("samples", done, picture)

    return draw


def profile_window(options: RunOptions, run_dir: Path) -> ProfileWindow | None:
    return None if options.profile is None else ProfileWindow(run_dir / "profile", *options.profile)


def with_overrides(cfg: SFTConfig, **fields: Any) -> SFTConfig:
    return dataclasses.replace(cfg, **fields)

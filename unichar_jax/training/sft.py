"""Stage 1, Unified-SFT: from a configuration to a finished run.

A run goes on from the latest complete checkpoint in ``run_dir``; else it starts from ``base`` (``start.py``).

Source: UniCharacter (arXiv 2605.08129), Unified-SFT; BAGEL (arXiv 2505.14683) for the objective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.checkpoint.remote import RunFolder, fetched
from unichar_jax.config.data import DataConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.data import portraits
from unichar_jax.data.loader import make_loader
from unichar_jax.data.prefetch import Prefetch
from unichar_jax.models.autoencoder import Autoencoder, patchify
from unichar_jax.parallel import distributed
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.training import state as state_lib
from unichar_jax.training import validation
from unichar_jax.training.loop import Hook, Loop, struct
from unichar_jax.training.metrics import MetricsLog
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.start import (
    Base,
    load_base,
    open_run,
    profile_window,
    run_info,
    save_adapters,
    settle_attention,
    with_adapters,
    write_run_folder,
)
from unichar_jax.training.state import Layout, TrainState
from unichar_jax.training.step import jit_step
from unichar_jax.training.writers import make_writers


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
    verify: bool = False,
    allow_changes: bool = False,
) -> Path:
    """Runs Unified-SFT to its last step, resuming if ``run_dir`` holds a checkpoint; returns the run's directory
    (of one in a bucket, the local mirror).

    Args:
      cfg: the experiment.
      hooks: called after steps that their interval divides.
      quiet: say nothing on the terminal.
      verify: at the end, read the checkpoint back and compare it bit by bit.
      allow_changes: go on with a run under other settings than it had (``start.open_run``).

    Raises:
      UserError: a mistake in the configuration, the data or the base; or a loss that is not finite.
      Preempted: SIGTERM arrived and everything was saved.
    """
    run = RunFolder(cfg.run_dir)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    tell = not quiet and distributed.is_leader()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if tell else (lambda text: None)
    rows = mesh_lib.global_batch_size(mesh, cfg.data.rows_per_device) * cfg.accumulate
    open_run(run, "sft", cfg, rows, allow_changes=allow_changes)
    base = load_base(cfg, mesh)
    data = dataclasses.replace(cfg.data, path=str(fetched(cfg.data.path)))
    say(f"starting from {base.origin}")
    say(f"mesh: {dict(mesh.shape)}")

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
    write_run_folder(
        run, cfg, base, run_info("sft", cfg, base, loader.transforms, rows), portraits.chosen(data)
    )
    settle_attention(run, cfg, base.cfg)

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
            allow_changes=allow_changes,
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
        if verify:
            loop.verify_checkpoint(state)
            say(f"step {cfg.steps} was saved and read back bit by bit")
    return run.local


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

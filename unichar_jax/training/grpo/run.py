"""Stage 2, Character-GRPO: from a configuration to a finished run.

The base is read as in stage 1 (``training.start``), the loop, the checkpoints and the mesh are the same; what
is new is the ``Trainer`` as the loop's step and rounds of prompts as its data. ``run_dir`` gets
``metrics.jsonl`` (one line a round), ``held_out.jsonl`` (one line an evaluation), ``pictures/`` and
``checkpoints/``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.checkpoint.remote import RunFolder, fetched
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.data.images import READ_NAMES, ImageError, open_image
from unichar_jax.data.rl_prompts import RLPrompt, read_rl_prompts
from unichar_jax.errors import UserError
from unichar_jax.files import digest
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import distributed
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.scoring.base import References
from unichar_jax.scoring.registry import Sources, build
from unichar_jax.training import metrics as metrics_lib
from unichar_jax.training import state as state_lib
from unichar_jax.training.grpo.rewards import RewardError, Rewards, Scores
from unichar_jax.training.grpo.rollouts import Rounds, read_prompts
from unichar_jax.training.grpo.trainer import Trainer, make_algorithm, reference_weights
from unichar_jax.training.grpo.watch import HackingWatch
from unichar_jax.training.loop import Hook, Loop
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
from unichar_jax.training.validation import save_picture
from unichar_jax.training.writers import make_writers

Observer = Callable[[int, Sequence[RLPrompt], np.ndarray, Scores], None]
"""``(rounds done, prompt of each picture, pictures uint8 [B, H, W, 3], scores)``."""


def split_prompts(prompts: Sequence[RLPrompt], held_out: int) -> tuple[list[RLPrompt], list[RLPrompt]]:
    """Training and held-out prompts; which are held out depends on their texts alone, not on their order."""
    if len(prompts) - held_out < 1:
        raise UserError(
            f"held_out {held_out}: the file has {len(prompts)} prompts, so none is left to"
            " train on; lower it."
        )
    chosen = set(sorted(digest(p.text) for p in prompts)[:held_out])
    return (
        [p for p in prompts if digest(p.text) not in chosen],
        [p for p in prompts if digest(p.text) in chosen],
    )


def read_references(folder: Path) -> References:
    """The character's pictures in a folder, in order of their names; what is no picture is an error."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in READ_NAMES)
    try:
        return References.of(open_image(name, folder) for name in names)
    except ImageError as error:
        raise UserError(f"references: {error}") from None


def prepare(
    cfg: GRPOConfig, base: Base, mesh: Mesh | None
) -> tuple[Trainer, Layout, TrainState, UnifiedModel]:
    """Everything of a run but its loop: the trainer, and a fresh state for it.

    Raises:
      UserError: prompts, references or weights of a scorer are absent or faulty.
    """
    source = fetched(cfg.prompts)
    if not cfg.prompts or not source.exists():
        raise UserError(
            f"prompts '{cfg.prompts}': expected a file *_pure_t2i_with_vqa.jsonl or a folder with one; give"
            " --prompts PATH."
        )
    training, held_out = split_prompts(read_rl_prompts(source), cfg.held_out)
    folder = fetched(cfg.references) if cfg.references else (source if source.is_dir() else source.parent)
    declared, model = with_adapters(base, cfg, mesh)
    optimizer = make_optimizer(cfg.optimizer, cfg.rounds * cfg.updates)
    follows = cfg.algorithm == "nft"
    layout, state = state_lib.create(
        model,
        declared,
        optimizer,
        trainable=cfg.trainable,
        ema=follows or cfg.optimizer.ema_decay > 0,
        mesh=mesh,
    )
    sources = Sources(
        presets.folder_or_shipped(cfg.encoders),
        base.tokenizer,
        base.source.transforms.look,
        cfg.reward_timeout,
    )
    rewards = Rewards(
        cfg.reward,
        [build(t.name, t.options, sources) for t in cfg.reward],
        read_references(folder),
    )
    prompts = [*training, *held_out]
    algorithm = make_algorithm(cfg, base.cfg)
    ids = [base.tokenizer.encode(p.text) for p in prompts]
    trainer = Trainer(
        cfg,
        model_cfg=base.cfg,
        algorithm=algorithm,
        layout=layout,
        optimizer=optimizer,
        autoencoder=base.autoencoder,
        rewards=rewards,
        prompts=prompts,
        cache=read_prompts(layout.assemble(state.params, state.frozen), ids),
        reference=reference_weights(cfg, algorithm, state),
        held_out=len(held_out),
        mesh=mesh,
    )
    return trainer, layout, state, declared


def train(
    cfg: GRPOConfig,
    *,
    hooks: Sequence[tuple[int, Hook]] = (),
    observe: Observer | None = None,
    quiet: bool = False,
    verify: bool = False,
    allow_changes: bool = False,
) -> Path:
    """Runs Character-GRPO to its last round, resuming if ``run_dir`` holds a checkpoint; returns the run's
    directory.

    Args:
      cfg: the experiment.
      hooks: called after rounds that their interval divides.
      observe: called after each evaluation of held-out prompts.
      quiet: say nothing on the terminal.
      verify: at the end, read the checkpoint back and compare it bit by bit.
      allow_changes: go on with a run under other settings than it had (``start.open_run``).

    Raises:
      UserError: a mistake in the configuration or the data, a reward that failed (what was learned before is
        saved first), or a loss that is not finite.
      Preempted: SIGTERM arrived and everything was saved.
    """
    run = RunFolder(cfg.run_dir)
    run_dir = run.local
    mesh = mesh_lib.make_mesh(cfg.mesh)
    tell = not quiet and distributed.is_leader()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if tell else (lambda text: None)
    open_run(run, "grpo", cfg, allow_changes=allow_changes)
    base = load_base(cfg, mesh)
    say(f"starting from {base.origin}\nmesh: {dict(mesh.shape)}")
    with jax.set_mesh(mesh):
        trainer, layout, state, declared = prepare(cfg, base, mesh)
        info = run_info("grpo", cfg, base, base.source.transforms)
        write_run_folder(run, cfg, base, info, base.source.characters)
        settle_attention(run, cfg, base.cfg)
        del base  # a resumed run has other arrays; do not hold two models
        count = len(trainer.prompts) - trainer.held_out
        say(
            f"{count} prompts to learn from, {trainer.held_out} held out; a round draws {cfg.pictures}"
            f" pictures ({cfg.prompts_per_round} prompts x {cfg.group}) and takes {cfg.updates} steps with"
            f" {cfg.algorithm}"
        )
        writers = make_writers(cfg.run.writers, run_dir, cfg)
        log = MetricsLog(
            run_dir / "metrics.jsonl", cfg.rounds, quiet=quiet, writers=writers, publish=run.push
        )
        loop = Loop(
            trainer,
            layout,
            Rounds(count, cfg.prompts_per_round, cfg.seed),
            CheckpointManager(run.checkpoints, declared, keep=cfg.save.keep, mesh=mesh),
            log,
            steps=cfg.rounds,
            save_every=cfg.save.every,
            log_every=cfg.log_every,
            hooks=[*_hooks(cfg, trainer, run_dir, log, observe), *hooks],
            profile=profile_window(cfg.run, run_dir),
            allow_changes=allow_changes,
        )
        state = trainer.state = loop.resume(state)
        done = int(state.step)
        if done:
            say(f"resuming after round {done}")
            trainer.watch = HackingWatch.resumed(metrics_lib.read(log.path))
        elif cfg.eval.every and trainer.held_out:
            _evaluation(trainer, run_dir, log, observe)(0, state)
        try:
            state = loop.run(state)
        except RewardError as error:
            done = int(trainer.state.step)
            loop.data.restore({"round": done})
            if loop.manager.latest != done:
                loop.save(done, trainer.state)
                loop.manager.wait()
            raise UserError(
                f"{error}\nNothing is lost: the {done} rounds before are saved in {loop.manager.directory}."
                " Mend the reward and start the same command again."
            ) from error
        if cfg.trainable == "lora":
            say(f"the adapters alone: {save_adapters(cfg, run, state)}")
        if verify:
            loop.verify_checkpoint(state)
            say(f"round {cfg.rounds} was saved and read back bit by bit")
    return run_dir


def _hooks(
    cfg: GRPOConfig,
    trainer: Trainer,
    run_dir: Path,
    log: MetricsLog,
    observe: Observer | None,
) -> list[tuple[int, Hook]]:
    def pictures(done: int, state: TrainState) -> None:
        del state
        if distributed.is_leader():
            sheet = np.asarray(trainer.sheet())
            save_picture(run_dir / "pictures", f"round-{done:06d}.png", sheet)
            log.picture("best and worst", done, sheet)

    every = cfg.eval.every if trainer.held_out else 0
    return [(cfg.pictures_every, pictures), (every, _evaluation(trainer, run_dir, log, observe))]


def _evaluation(trainer: Trainer, run_dir: Path, log: MetricsLog, observe: Observer | None) -> Hook:
    """Scores held-out prompts, into ``held_out.jsonl`` and a sheet of what was drawn."""

    def evaluate(done: int, state: TrainState) -> None:
        values, images, scores = trainer.evaluate(state)
        if not distributed.is_leader():
            return
        if observe is not None:
            held_out = trainer.prompts[len(trainer.prompts) - trainer.held_out :]
            observe(done, [p for p in held_out for _ in range(trainer.cfg.eval.pictures)], images, scores)
        log.side("held_out", done, values)
        columns = trainer.cfg.eval.pictures
        rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
        sheet = np.concatenate(rows)
        save_picture(run_dir / "pictures", f"held-out-{done:06d}.png", sheet)
        log.picture("held out", done, sheet)

    return evaluate

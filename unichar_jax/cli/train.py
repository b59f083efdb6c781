"""``unichar sft`` and ``unichar grpo``: a preset or file first, then any field of it as an option.

What belongs to a start and not to the experiment are options too: ``--hosts.*`` (how the processes of a pod
find each other) and ``--smoke`` (three steps, save, restore, exit).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from unichar_jax.app.command import called
from unichar_jax.checkpoint.remote import RunFolder
from unichar_jax.cli.main import parses_itself
from unichar_jax.config import presets
from unichar_jax.config.train import RunOptions, SaveConfig
from unichar_jax.errors import UserError
from unichar_jax.parallel import distributed
from unichar_jax.parallel.distributed import HostsConfig
from unichar_jax.training.loop import PREEMPTED_EXIT_CODE, Preempted

C = TypeVar("C")

SMOKE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Start(Generic[C]):
    """One start of an experiment.

    Attributes:
      experiment: what to run.
      hosts: how to find the other processes.
      smoke: run three steps in a folder of its own, save, read back, compare, and remove it.
      allow_changes: go on with a run under other settings than it had, beyond those that change nothing (steps,
        intervals, devices at an equal global batch).
    """

    experiment: Annotated[C, tyro.conf.arg(name="")]
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    smoke: bool = False
    allow_changes: bool = False


def parse(cls: type[C], args: list[str], prog: str, stage: str) -> C:
    """``CONFIG [--field value ...]`` to a configuration; without CONFIG the dataclass's defaults."""
    default, args = _preset(cls, args, stage)
    return tyro.cli(cls, default=default, args=args, prog=prog)


def parse_start(cls: type[C], args: list[str], stage: str) -> Start[C]:
    """The same, with the options of a start."""
    default, args = _preset(cls, args, stage)
    return tyro.cli(
        Start[cls],  # type: ignore[valid-type]
        default=Start(default),
        args=args,
        prog=f"unichar {stage} CONFIG",
    )


def _preset(cls: type[C], args: list[str], stage: str) -> tuple[Any, list[str]]:
    if args and not args[0].startswith("-"):
        return presets.load(cls, args[0]), args[1:]
    if not args:
        names = [n for n in presets.available() if n.startswith(stage)]
        raise UserError(
            f"which experiment? usage: unichar {stage} CONFIG [--field value ...], where CONFIG is a .toml file or"
            f" one of {', '.join(names)}."
        )
    return cls(), args


# -- what a process is told before it computes --------------------------------------------------------------


def use_compilation_cache(folder: str = "auto") -> None:
    """Keeps compiled programs between starts, where the user's JAX settings do not say otherwise."""
    import jax

    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if folder == "auto":
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        folder = os.path.join(home, "unichar-jax", "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def dump_hlo(folder: Path) -> None:
    """Has the compiler write the large programs of this process into ``folder``; nothing comes from the cache
    then. To be called before anything touches a device."""
    import jax

    programs = "step|learn|draw|sums"
    flags = (
        f"--xla_dump_to={folder.absolute()} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*({programs}).*"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    jax.config.update("jax_enable_compilation_cache", False)


def apply(options: RunOptions, run_dir: Path) -> None:
    """What must be said before anything touches a device."""
    if options.dump_hlo:
        dump_hlo(run_dir / "hlo")
    else:
        use_compilation_cache(options.compilation_cache)


# -- commands -----------------------------------------------------------------------------------------------


def run(
    start: Start[C], train: Callable[..., Path], short: Callable[[C], C], then: Sequence[Sequence[str]]
) -> int:
    """Joins the other hosts and trains; prints what to do next on one of them."""
    experiment: Any = short(start.experiment) if start.smoke else start.experiment
    folder = RunFolder(experiment.run_dir)
    apply(experiment.run, folder.local)
    place = distributed.start(start.hosts, experiment, lambda text: print(text, file=sys.stderr, flush=True))
    leader = place.index == 0
    if start.smoke:
        if leader:
            folder.remove()  # of a smoke run that was interrupted
        distributed.barrier("smoke")
    try:
        train(experiment, verify=start.smoke, allow_changes=start.allow_changes)
    except Preempted as stopped:
        if leader:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    if start.smoke:
        distributed.barrier("smoke done")
        if leader:
            print(f"smoke: {SMOKE_STEPS} steps, saved, read back bit by bit: this start works")
            if experiment.run.dump_hlo or experiment.run.profile:
                print(f"what the compiler or the profiler wrote is in {folder.local}")
            else:
                folder.remove()
    elif leader:
        print(f"done: {experiment.run_dir}")
        for command, *more in then:
            print(f"  {called(command, experiment.run_dir, *more)}")
    return 0


def _shortened(cfg: C, **fields: Any) -> C:
    """An experiment of ``SMOKE_STEPS`` steps in a folder of its own."""
    folder = f"{cfg.run_dir.rstrip('/')}-smoke"  # type: ignore[attr-defined]
    save = SaveConfig(every=SMOKE_STEPS, keep=1)
    return dataclasses.replace(cfg, run_dir=folder, save=save, log_every=1, **fields)  # type: ignore[type-var]


@parses_itself
def sft(args: list[str]) -> int:
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.training.sft import train

    def short(cfg: SFTConfig) -> SFTConfig:
        every = {
            name: SMOKE_STEPS if getattr(cfg, name) else 0 for name in ("sample_every", "validate_every")
        }
        schedule = cfg.optimizer
        if schedule.schedule == "trapezoid":
            schedule = dataclasses.replace(schedule, decay_steps=1)
        return _shortened(cfg, steps=SMOKE_STEPS, optimizer=schedule, **every)

    start = parse_start(SFTConfig, args, "sft")
    return run(start, train, short, [("chat",), ("draw", "a portrait", "-n", "8"), ("evaluate",)])


@parses_itself
def grpo(args: list[str]) -> int:
    from unichar_jax.config.grpo import GRPOConfig
    from unichar_jax.training.grpo import train

    def short(cfg: GRPOConfig) -> GRPOConfig:
        return _shortened(cfg, rounds=SMOKE_STEPS)

    start = parse_start(GRPOConfig, args, "grpo")
    return run(start, train, short, [("chat",), ("evaluate",)])

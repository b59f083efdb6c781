"""``unichar sft`` and ``unichar grpo``: a preset or file first, then any field of it as an option."""

from __future__ import annotations

import os
import sys
from typing import Any, TypeVar

import tyro

from unichar_jax.cli.main import parses_itself
from unichar_jax.config import presets
from unichar_jax.errors import UserError
from unichar_jax.training.loop import PREEMPTED_EXIT_CODE, Preempted

C = TypeVar("C")


def parse(cls: type[C], args: list[str], prog: str, stage: str) -> C:
    """``CONFIG [--field value ...]`` to a configuration; without CONFIG the dataclass's defaults."""
    default: Any = cls()
    if args and not args[0].startswith("-"):
        default = presets.load(cls, args[0])
        args = args[1:]
    elif not args:
        names = [n for n in presets.available() if n.startswith(stage)]
        raise UserError(
            f"which experiment? usage: unichar {stage} CONFIG [--field value ...], where CONFIG is a .toml file or"
            f" one of {', '.join(names)}."
        )
    return tyro.cli(cls, default=default, args=args, prog=prog)


def use_compilation_cache() -> None:
    """Keeps compiled programs between starts, where the user's JAX settings do not say otherwise."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "unichar-jax", "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


@parses_itself
def sft(args: list[str]) -> int:
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.training.sft import train

    cfg = parse(SFTConfig, args, "unichar sft CONFIG", "sft")
    use_compilation_cache()
    try:
        run = train(cfg)
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    print(f'done: {run}\n  unichar chat {run}\n  unichar draw {run} "..." -n 8\n  unichar evaluate {run}')
    return 0


@parses_itself
def grpo(args: list[str]) -> int:
    from unichar_jax.config.grpo import GRPOConfig
    from unichar_jax.training.grpo import train

    cfg = parse(GRPOConfig, args, "unichar grpo CONFIG", "grpo")
    use_compilation_cache()
    try:
        run = train(cfg)
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    print(f"done: {run}\n  unichar chat {run}\n  unichar evaluate {run}")
    return 0

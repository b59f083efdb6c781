"""The ``unichar`` command: parse, call, print. A ``UserError`` is printed without a stack trace.

Commands are imported when they run, so ``unichar --help`` needs no JAX. Experiment commands (``sft``,
``grpo``, ``plan``) take a preset name or a TOML file first, then any field of it as an option.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from unichar_jax.errors import UserError, did_you_mean

# name -> (module of unichar_jax.cli, function, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("quickstart", "main", "customise a character on this machine, now"),
    "convert": ("convert", "convert", "PyTorch safetensors <-> Orbax, both ways, with accounting"),
    "inspect": ("convert", "inspect", "tensors, shapes, dtypes and parameter counts of a model"),
    "diff": ("convert", "diff", "which tensors of two models differ, and by how much"),
    "data": ("data", "main", "check | new | annotate | build: character folders and the TFDS dataset"),
    "sft": ("train", "sft", "stage 1, Unified-SFT: unichar sft CONFIG [--field value ...]"),
    "grpo": ("train", "grpo", "stage 2, Character-GRPO: unichar grpo CONFIG [--field value ...]"),
    "chat": ("talk", "chat", "role-play with picture replies"),
    "draw": ("talk", "draw", "text to image, a contact sheet"),
    "ask": ("talk", "ask", "a question, about a picture or about the character"),
    "serve": ("serve", "serve", "meet the characters of finished runs in a browser"),
    "evaluate": ("evaluate", "evaluate", "RoleScape-20 metrics: a table and a picture sheet"),
    "plan": ("plan", "plan", "compile for a pod without the pod: memory, FLOPs, collectives"),
    "bench": (
        "bench",
        "bench",
        "time the training step here; or, with --topology, what is known without hardware",
    ),
    "doctor": ("doctor", "doctor", "what would go wrong on this machine, and the fix"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "usage: unichar COMMAND ...\n\n" + "\n".join(lines) + "\n\nunichar COMMAND --help says more."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from unichar_jax import __version__

        print(f"unichar-jax {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(
            f"unichar: command '{name}' is unknown{did_you_mean(name, COMMANDS)}.\n\n{usage()}",
            file=sys.stderr,
        )
        return 2
    module, function, _ = COMMANDS[name]
    try:
        command = getattr(importlib.import_module(f"unichar_jax.cli.{module}"), function)
        return int(run(command, name, rest) or 0)
    except UserError as error:
        print(f"unichar {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"unichar {name}: interrupted", file=sys.stderr)
        return 130


def run(command: Callable[..., int | None], name: str, args: list[str]) -> int | None:
    """Calls a command: one that takes ``args`` parses for itself, a typed function is parsed by tyro."""
    if getattr(command, "parses_itself", False):
        return command(args)
    import tyro

    return tyro.cli(command, args=args, prog=f"unichar {name}")


def parses_itself(command: Callable[[list[str]], int | None]) -> Callable[[list[str]], int | None]:
    """Marks a command that takes its raw arguments."""
    command.parses_itself = True  # type: ignore[attr-defined]
    return command


if __name__ == "__main__":
    sys.exit(main())

"""Judges what a document shows (commands, settings, links) without doing what it says.

A command line is split as a shell splits it and judged by its program. ``unichar`` and Python programs of this
repository parse their arguments with their own parsers and are stopped where the work would begin (``Parsed``);
launchers run with ``--dry-run``; other programs have only to be known. A fenced block ``toml NAME.toml`` or ``python
NAME.py`` is a file of that name beside the commands, so a command may take it; TOML is read as an experiment.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from markdown_it import MarkdownIt
from markdown_it.token import Token

from unichar_jax.cli import main as cli
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.plan.topology import Topology

REPOSITORY = Path(__file__).resolve().parents[2]

SHELL = ("bash", "sh", "shell", "console")
OTHER_PROGRAMS = frozenset(
    (
        *("cat", "cd", "cp", "export", "ls", "mkdir", "open", "rm", "source", "tail", "xdg-open"),
        *("docker", "gcloud", "git", "hf", "kubectl", "mypy", "pdoc", "ruff", "sbatch", "scancel", "squeue"),
    )
)
"""Programs of others that documents may use; their options are theirs to judge."""
OTHER_MODULES = frozenset(("venv", "build"))


class Parsed(BaseException):
    """Raised in the place of a command's work; ``value`` is what its parser made of the arguments."""

    def __init__(self, value: Any):
        super().__init__("parsed")
        self.value = value


class Wrong(Exception):
    """What is wrong with a command, for whoever wrote it."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a document, at a line of it."""

    document: Path
    line: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}\n    {self.why}"


# -- what a document holds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file name that may follow it, the text, and its first line."""

    language: str
    name: str
    text: str
    line: int


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    found = []
    for token in tokens(text):
        if token.type == "fence":
            language, _, name = token.info.strip().partition(" ")
            found.append(Block(language, name.strip(), token.content, token.map[0] + 2 if token.map else 0))
    return found


def inline(text: str) -> Iterator[tuple[int, Token]]:
    """The parts of a document's running text (code spans, links, images), with their block's line."""
    for token in tokens(text):
        for child in token.children or ():
            yield (token.map[0] + 1 if token.map else 0), child


def command_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The lines of a shell block, continued ones joined; of a console block, those after ``$``."""
    lines, start, joined = block.text.splitlines(), 0, ""
    for number, line in enumerate(lines):
        if block.language == "console" and not joined:
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        start = start or block.line + number
        joined += line.removesuffix("\\") + " " if line.endswith("\\") else line
        if not line.endswith("\\"):
            if joined.strip():
                yield start, joined.strip()
            start, joined = 0, ""


def commands(line: str) -> list[list[str]]:
    """The commands of a line: split at operators, without comments, assignments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if set(word) <= set("<>"):
            skip = True
        elif set(word) <= set(";&|"):
            found.append([])
        elif skip:
            skip = False
        elif found[-1] or not re.fullmatch(r"[A-Za-z_]\w*=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


# -- commands -----------------------------------------------------------------------------------------------


def check_command(words: Sequence[str]) -> None:
    """Judges one command, in the working directory.

    Raises:
      Wrong: it would not run as written, and why.
    """
    program, args = words[0], list(words[1:])
    if program == "unichar":
        check_unichar(args)
    elif program.startswith("./launch/"):
        check_launcher(program, args)
    elif program in ("python", "python3"):
        check_python(args)
    elif program == "pip":
        check_pip(args)
    elif program not in OTHER_PROGRAMS:
        raise Wrong(f"'{program}' is no program that documents use")


def check_unichar(args: Sequence[str]) -> None:
    """Parses a ``unichar`` command with its own parser."""
    value = _parsed(lambda: cli.main(args))
    if args and args[0] in ("plan", "bench") and "--topology" in args:
        try:
            Topology.parse(args[args.index("--topology") + 1])
        except UserError as error:
            raise Wrong(str(error)) from None
    if args and args[0] == "convert" and value is not None:
        (paths,), options = value
        expected = 3 if options.get("lora") is not None else 2
        if len(paths) != expected:
            raise Wrong(f"expected {expected} paths, got {len(paths)}")


def check_launcher(program: str, args: Sequence[str]) -> None:
    """Runs a launcher with ``--dry-run`` where it has one, and parses the command that it starts."""
    script = REPOSITORY / program
    if not script.is_file() or not os.access(script, os.X_OK):
        raise Wrong(f"{program} is not there, or not executable")
    text = script.read_text("utf-8")
    if passes_on := re.search(r'^exec unichar (\w+) "\$@"', text, re.MULTILINE):
        check_unichar([passes_on[1], *args])
    elif "--dry-run" in text:
        asked = subprocess.run(["bash", script, "--dry-run", *args], capture_output=True, text=True)
        if asked.returncode:
            raise Wrong(asked.stderr.strip())
        stage = next((i for i, word in enumerate(args) if word in ("sft", "grpo")), None)
        if stage is not None:
            check_unichar(args[stage:])
    elif unknown := [word for word in args if word != "--all" and not (REPOSITORY / word).exists()]:
        raise Wrong(f"{program} does not take {' '.join(unknown)}")


def check_python(args: list[str]) -> None:
    """Parses the arguments of a module or script of this repository with its own parser."""
    if args[:1] == ["-m"] and len(args) > 1:
        module, rest = args[1], args[2:]
        if module == "pip":
            check_pip(rest)
        elif module == "pytest":
            absent = [a for a in rest if a.startswith("tests") and not (REPOSITORY / a).exists()]
            if absent:
                raise Wrong(f"{', '.join(absent)}: not there")
        elif module.startswith(("unichar_jax.", "workshop.")):
            with mock.patch.object(sys, "argv", [module, *rest]):
                if _parsed(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)) is None:
                    raise Wrong(f"{module} parses nothing")
        elif module not in OTHER_MODULES:
            raise Wrong(f"'{module}' is no module that documents use")
    elif args and args[0].endswith(".py"):
        script = REPOSITORY / args[0]
        if not script.is_file():
            raise Wrong(f"{args[0]}: not there")
        with mock.patch.object(sys, "argv", [str(script), *args[1:]]):
            if _parsed(lambda: runpy.run_path(str(script), run_name="__main__")) is None:
                raise Wrong(f"{args[0]} parses nothing")
    else:
        raise Wrong("expected a script, or -m and a module")


def check_pip(args: Sequence[str]) -> None:
    """Looks whether the extras of this package that ``pip`` is asked for exist."""
    if args[:1] != ["install"]:
        raise Wrong("expected pip install")
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for word in args[1:]:
        if asked := re.fullmatch(r"(?:unichar-jax|\.|.*\.whl)\[([\w,-]+)\].*", word):
            for extra in asked[1].split(","):
                if extra not in known:
                    raise Wrong(f"extra '{extra}' is unknown; expected some of {', '.join(known)}")


def _parsed(start: Callable[[], Any]) -> Any:
    """What the parser of a program made of its arguments; None if it printed help or a version."""

    def stub(function: Any) -> Any:
        """A function's parser without the function; other things as they are."""
        if not inspect.isfunction(function):
            return function
        return functools.wraps(function)(lambda *args, **kwargs: (args, kwargs))

    def cli_stub(f: Any, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(tyro_cli(stub(f), *args, **kwargs))

    def subcommand_stub(subcommands: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        raise Parsed(subcommand_cli({name: stub(f) for name, f in subcommands.items()}, *args, **kwargs))

    def parse_args_stub(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(parse_args(self, *args, **kwargs))

    tyro_cli, subcommand_cli = tyro.cli, tyro.extras.subcommand_cli_from_dict
    parse_args = argparse.ArgumentParser.parse_args
    said = io.StringIO()
    try:
        with (
            mock.patch.object(tyro, "cli", cli_stub),
            mock.patch.object(tyro.extras, "subcommand_cli_from_dict", subcommand_stub),
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args_stub),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            code = start()
    except Parsed as parsed:
        return parsed.value
    except SystemExit as end:
        code = end.code
    except UserError as error:
        raise Wrong(str(error)) from None
    if code not in (0, None):
        raise Wrong(said.getvalue().strip() or f"it ends with {code}")
    return None


# -- settings, links, words ---------------------------------------------------------------------------------


def check_experiment(text: str) -> None:
    """Reads TOML as an experiment of either stage.

    Raises:
      Wrong: it is neither.
    """
    reasons = []
    for kind in (SFTConfig, GRPOConfig):
        try:
            presets.from_dict(kind, tomllib.loads(text))
            return
        except (UserError, tomllib.TOMLDecodeError) as error:
            reasons.append(str(error))
    raise Wrong(" / ".join(reasons))


def check_code_span(code: str) -> None:
    """Looks whether the command that running text speaks of exists."""
    words = code.split()
    if words[0] == "unichar" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        if words[1] not in cli.COMMANDS:
            raise Wrong(f"there is no command '{words[1]}'")
    elif words[0].startswith("./launch/") and not (REPOSITORY / words[0]).is_file():
        raise Wrong(f"{words[0]}: not there")


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a document have on GitHub."""
    found = tokens(text)
    titles = [found[i + 1].content.lower() for i, token in enumerate(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def check_link(document: Path, target: str) -> None:
    """Looks whether a relative link or picture is there.

    Raises:
      Wrong: it is not.
    """
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.exists():
        raise Wrong(f"{target}: not there")
    if path and not file.is_relative_to(REPOSITORY):
        raise Wrong(f"{target}: outside of the repository")
    if anchor and anchor not in anchors(file.read_text("utf-8")):
        raise Wrong(f"{target}: no such heading")


MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:work|home|root|tmp|Users|private|mnt|scratch)(?:/|\b)")


# -- a document ---------------------------------------------------------------------------------------------


def problems(document: Path) -> list[Problem]:
    """Everything wrong with a document; its commands are judged in the working directory, which receives the
    files that the document shows."""
    text = document.read_text("utf-8")
    name = document.relative_to(REPOSITORY) if document.is_relative_to(REPOSITORY) else document
    found: list[Problem] = []

    def judge(line: int, shown: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Wrong as wrong:
            found.append(Problem(name, line, shown, str(wrong)))

    shown_blocks = blocks(text)
    for block in shown_blocks:
        if block.language == "toml":
            judge(block.line, block.name or "settings", functools.partial(check_experiment, block.text))
        if block.language in ("toml", "python", "text") and block.name:
            Path(block.name).parent.mkdir(parents=True, exist_ok=True)
            Path(block.name).write_text(block.text, "utf-8")
    for block in shown_blocks:
        if block.language in SHELL:
            for line, shown in command_lines(block):
                for words in commands(shown):
                    judge(line, shown, functools.partial(check_command, words))
        else:
            for number, shown in enumerate(block.text.splitlines()):
                if shown.startswith(("unichar ", "./launch/")):
                    judge(block.line + number, shown, functools.partial(check_code_span, shown))
    for line, token in inline(text):
        if token.type == "code_inline" and token.content.strip():
            judge(line, token.content, functools.partial(check_code_span, token.content))
        elif token.type == "link_open":
            target = str(token.attrs["href"])
            judge(line, target, functools.partial(check_link, document, target))
        elif token.type == "image":
            target = str(token.attrs["src"])
            judge(line, target, functools.partial(check_link, document, target))
    for number, shown in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(shown):
            found.append(Problem(name, number, shown.strip(), "names a path of one machine"))
    return found

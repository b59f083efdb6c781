"""The command: what it prints for the wrong words, and that a user's mistake shows no stack trace."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from unichar_jax.cli import main as cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name):
    module, function, _ = cli.COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), function))


def test_usage_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_unknown_command(capsys):
    assert cli.main(["cnvert"]) == 2
    assert "did you mean 'convert'" in capsys.readouterr().err


def test_a_users_mistake_shows_no_stack_trace(capsys, tmp_path):
    assert cli.main(["sft", "sft-mni"]) == 1
    assert "did you mean 'sft-mini'" in capsys.readouterr().err
    assert cli.main(["draw", str(tmp_path / "absent"), "a cat"]) == 1
    assert "not a directory" in capsys.readouterr().err


def test_help_needs_no_jax():
    code = (
        "import sys; from unichar_jax.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_doctor(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "attention" in printed and "free disk" in printed

"""The command: what it prints for the wrong words, and that a user's mistake shows no stack trace."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys

import pytest

from unichar_jax.cli import doctor
from unichar_jax.cli import main as cli
from unichar_jax.config.train import SFTConfig


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name):
    module, function, _ = cli.COMMANDS[name]
    assert callable(getattr(importlib.import_module(f"unichar_jax.cli.{module}"), function))


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


def test_doctor_looks_at_an_experiment(tiny_root, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text(
        f'base = "debug"\nrun_dir = "{tmp_path}/run"\n[data]\npath = "{tiny_root}"\ntokens_per_row = 1024\n'
        "draw_min = 64\ndraw_max = 64\nlook_min = 56\nlook_max = 56\nsquare = true\n"
    )
    found = {f.what: f for f in doctor.experiment(str(config))}
    assert all(f.fix is None for f in found.values()), found
    assert "labelled" in found["first batch"].found
    assert "on each of 8 devices" in found["state"].found
    assert not (tmp_path / "run").exists()
    config.write_text(config.read_text().replace("draw_min = 64", "draw_min = 60"))
    found = {f.what: f for f in doctor.experiment(str(config))}
    assert "expected a multiple of" in found["first batch"].found and found["first batch"].fix


def test_doctor_says_when_checkpoints_have_no_room(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    cfg = SFTConfig(base="debug", run_dir=str(tmp_path / "a" / "run"))
    found = {f.what: f for f in doctor.room(cfg)}
    assert "smaller save.keep" in found["room for checkpoints"].fix

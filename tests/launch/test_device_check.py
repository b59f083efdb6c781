"""The device check: its parent keeps limits and lines, its stages run at a toy's size, and import little."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "device_check.py"
ABSENT = (
    "transformers",
    "tokenizers",
    "tensorflow_datasets",
    "grain",
    "array_record",
    "safetensors",
    "torch",
)

FAKE = """
import os, subprocess, sys, time
from device_stages.measure import say, say_device

def quick(small):
    print("not a line")
    say_device("a card", "1.2.3")
    say("quick", 1.0, "s", tflops=2.0, pid=os.getpid())

def slow(small):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    say("before", child.pid, "pid")
    time.sleep(600)

def raises(small):
    raise ValueError("as it must")

def dies(small):
    os._exit(7)
"""


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("device_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["device_check"]


@pytest.fixture
def fake(check, tmp_path, monkeypatch):
    """``run(*stages, total)`` with stages of a module written for the test; the lines."""
    (tmp_path / "fake_stages.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*stages, total=60.0):
        out = io.StringIO()
        made = [check.Stage(n, f"fake_stages:{f}", seconds, "", p) for n, f, seconds, p in stages]
        check.run(made, check.Report(out, "abc"), False, total)
        return [json.loads(line) for line in out.getvalue().splitlines()]

    return run


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_a_stage_is_killed_at_its_limit_with_what_it_started_and_the_next_goes_on(fake):
    began = time.monotonic()
    lines = fake(
        ("ceilings", "quick", 20, "shared"),
        ("slow", "slow", 2, "shared"),
        ("after", "quick", 20, "shared"),
    )
    assert time.monotonic() - began < 30
    first, before, cut, after = (line for line in lines if "value" not in line or line["what"] != "stage")
    assert (first["stage"], first["card"], first["jax"], first["commit"]) == (
        "ceilings",
        "a card",
        "1.2.3",
        "abc",
    )
    assert "share_of_best_tflops" not in first and after["share_of_best_tflops"] == 1
    assert before["what"] == "before" and not alive(before["value"])  # its line is kept, its child is gone
    assert cut["stage"] == "slow" and "limit of 2 s" in cut["error"]
    assert after["stage"] == "after" and after["pid"] != first["pid"]


def test_stages_of_one_process_share_it_and_others_do_not(fake):
    lines = fake(("a", "quick", 20, "shared"), ("b", "quick", 20, "shared"), ("c", "quick", 20, ""))
    one, same, other = (line["pid"] for line in lines if "pid" in line)
    assert one == same != other


def test_failures_are_lines(fake):
    lines = fake(("a", "raises", 20, "x"), ("b", "dies", 20, "x"), ("c", "quick", 20, "x"))
    told = [line for line in lines if "error" in line]
    assert [line["stage"] for line in told] == ["a", "b"]
    assert "ValueError: as it must" in told[0]["error"] and "ended with 7" in told[1]["error"]
    assert [line["stage"] for line in lines if line["what"] == "quick"] == ["c"]


def test_nothing_runs_beyond_the_total(fake):
    lines = fake(("a", "slow", 60, ""), ("b", "quick", 60, ""), total=2.5)
    assert [("error" in x, "skipped" in x) for x in lines if x["what"] == "stage"] == [
        (True, False),
        (False, True),
    ]
    assert lines[-1]["stage"] == "b" and lines[-1]["at_s"] < 20


def test_the_first_five_stages_fit_eight_minutes(check):
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == ["ceilings", "attention", "lora", "decode", "draw", "nft", "full", "commands"]
    assert sum(stage.seconds for stage in check.STAGES[:5]) <= 8 * 60
    assert sum(stage.seconds for stage in check.STAGES) <= 15 * 60


def run_small(folder: Path, *stages: str, without: tuple[str, ...] = ()) -> list[dict]:
    """The script at a toy's size, in an environment that lacks some packages; the lines of its file."""
    lacking, out = folder / "lacking", folder / "lines.jsonl"
    lacking.mkdir()
    for name in without:
        (lacking / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    path = os.pathsep.join([str(lacking), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, SCRIPT, "--small", "--out", out, "--only", *stages]
    ran = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert ran.stdout.splitlines() == out.read_text().splitlines()
    assert not [line for line in lines if "error" in line], ran.stderr
    return lines


def test_ceilings_run_here(tmp_path):
    lines = run_small(tmp_path, "ceilings", without=ABSENT)
    assert {line["card"] for line in lines} == {"cpu"}
    product, copy, one, eight, _ = lines
    assert product["tflops"] > 0 and copy["gb_per_s"] > 0 and one["value"] > 0 and eight["unit"] == "ms"


def test_stages_with_random_weights_import_little():
    code = "import sys, device_stages.kernels, device_stages.programs; print(*sys.modules)"
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])
    words = [sys.executable, "-c", code]
    ran = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert not set(ran.stdout.split()) & set(ABSENT)


@pytest.mark.slow
def test_all_stages_with_random_weights_run_here(tmp_path):
    names = ("ceilings", "attention", "lora", "decode", "draw", "nft", "full")
    lines = run_small(tmp_path, *names, without=ABSENT)
    for name in names:
        assert len([line for line in lines if line["stage"] == name and "value" in line]) > 1, name
    (lora,) = (line for line in lines if line["stage"] == "lora" and "tflops" in line)
    assert lora["share_of_best_tflops"] > 0
    timed = {line["what"] for line in lines if line["stage"] == "attention" and "value" in line}
    for row in ("one document", "tower, 5 images", "12 documents"):
        for kernel in ("reference", "chunked", "xla, no mask", "xla, our mask"):
            assert {f"{row}: {kernel}, forward", f"{row}: {kernel}, forward and backward"} <= timed


@pytest.mark.slow
def test_the_real_commands_run_here(tmp_path):
    lines = {line["what"]: line for line in run_small(tmp_path, "commands")}
    assert lines["packages that are absent"]["value"] == 0
    assert lines["loss of steps before and after the kill: largest difference"]["value"] == 0
    assert {"data new", "grpo, one round", "draw", "convert --verify"} <= lines.keys()
    assert lines["draw: what the sheet holds"]["value"] > 0

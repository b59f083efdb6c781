"""The loop around the step: what it writes, that a kill at any moment loses nothing, and what it measures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.checkpoint import remote, runs
from unichar_jax.checkpoint.remote import RunFolder
from unichar_jax.config import presets
from unichar_jax.config.compute import MeshConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import RunOptions, SaveConfig, SFTConfig
from unichar_jax.data.tokenizer import load_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import flops
from unichar_jax.training import loop as loop_lib
from unichar_jax.training import metrics, sft, validation
from unichar_jax.training.metrics import MetricsLog, read
from unichar_jax.training.writers import make_writers

TEXT_ONLY = {"vlm_extension": 1.0}


def _config(root: Path, folder: Path, **fields) -> SFTConfig:
    """Dialogue only, so that the step compiles quickly."""
    cfg = presets.load(SFTConfig, "sft-debug")
    data = dataclasses.replace(
        cfg.data, path=str(root), rows_per_device=1, tasks=TEXT_ONLY, tokens_per_row=256
    )
    return dataclasses.replace(cfg, **{"data": data, "run_dir": str(folder), "log_every": 2} | fields)


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        whole = sft.mesh_lib.make_mesh
        patch.setattr(sft.mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def finished(one_device, _tiny_template, tmp_path_factory) -> Path:
    """A run that validated, drew, traced and was read back."""
    run = tmp_path_factory.mktemp("loop") / "run"
    sft.train(
        _config(
            _tiny_template,
            run,
            steps=6,
            save=SaveConfig(every=3),
            validate_every=3,
            sample_every=6,
            run=RunOptions(profile=(4, 5)),
        ),
        quiet=True,
        verify=True,
    )
    return run


# -- what a run writes --------------------------------------------------------------------------------------


def test_the_curve_and_the_speed_are_apart(finished):
    records = read(finished / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert not {"seconds_per_step", "mfu", "host_gib"} & set(records[0])
    speed = read(finished / "speed.jsonl")
    assert [r["step"] for r in speed] == [4, 6]  # the first line waited for compilation
    assert all(r["tokens_per_s"] > 0 and r["seconds_per_step"] > 0 and r["host_gib"] > 0 for r in speed)


def test_useful_work_is_in_the_curve(finished):
    """Text alone: the formula has no more terms than these."""
    cfg = model_preset("debug")
    for record in read(finished / "metrics.jsonl"):
        least = 3 * flops.forward(cfg, flops.Work(record["tokens"], 0, 0, record["ce_tokens"], 0, 0))
        most = 3 * flops.forward(cfg, flops.Work(record["tokens"], 0, 0, record["ce_tokens"], 256**2, 0))
        assert least < record["useful_flops"] < most


def test_held_out_dialogue_is_measured_and_learned(finished):
    lines = read(finished / "validation.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    assert 0 < lines[1]["ce"] < lines[0]["ce"]
    assert lines[1]["ce"] != lines[1]["ce_ema"]


def test_pictures_and_a_trace_are_there(finished):
    from PIL import Image

    # Two captions of test pictures, 64 pixels each.
    assert Image.open(finished / "pictures" / "step-000006.png").size == (128, 64)
    assert list(finished.glob("profile/**/*.xplane.pb"))


def test_a_start_again_repeats_nothing(finished, _tiny_template, one_device):
    before = (finished / "metrics.jsonl").read_text()
    cfg = _config(_tiny_template, finished, steps=6, save=SaveConfig(every=3))
    sft.train(cfg, quiet=True)
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_checkpoint_that_reads_back_otherwise_is_reported(
    finished, _tiny_template, one_device, monkeypatch
):
    restored, calls = loop_lib.Loop.resume, []

    def spoiled(self, state):
        state = restored(self, state)
        calls.append(state)
        if len(calls) == 1:
            return state  # the start; the second is the check
        name = next(iter(state.params))
        return dataclasses.replace(state, params=state.params | {name: state.params[name] + 1})

    monkeypatch.setattr(loop_lib.Loop, "resume", spoiled)
    cfg = _config(_tiny_template, finished, steps=6, save=SaveConfig(every=3))
    with pytest.raises(UserError, match=r"does not read back .*: 1 of \d+ arrays differ"):
        sft.train(cfg, quiet=True, verify=True)


def test_tensorboard_is_told_the_same(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    writers = make_writers(["tensorboard"], tmp_path, None)
    log = MetricsLog(tmp_path / "metrics.jsonl", 2, quiet=True, writers=writers)
    log.add(1, {"loss": np.float32(2.5)}, show=True)
    log.picture("samples", 1, np.zeros((4, 6, 3), np.uint8))
    log.side("validation", 1, {"ce": 1.5})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"loss", b"samples", b"validation/ce", b"PNG"))


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """With a stand-in for the library: what it is told, not that it understands."""
    told: list[tuple] = []

    class Library:
        Image = staticmethod(lambda picture: ("image", picture.shape))

        def init(self, **settings):
            told.append(("init", settings["id"], settings["resume"], settings["config"]["every"]))
            return self

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append(("finish",))

    monkeypatch.setitem(sys.modules, "wandb", Library())
    for _ in range(2):
        (writer,) = make_writers(["wandb"], tmp_path, SaveConfig(every=3))
        writer.scalars(4, {"loss": 2.5})
        writer.picture(4, "samples", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    name = (tmp_path / "wandb-id").read_text()
    once = [
        ("init", name, "allow", 3),
        (4, {"loss": 2.5}),
        (4, {"samples": ("image", (4, 6, 3))}),
        ("finish",),
    ]
    assert told == 2 * once


def test_unknown_writers_and_windows_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        make_writers(["wanb"], tmp_path, None)
    with pytest.raises(UserError, match=r"run\.profile"):
        RunOptions(profile=(3, 2))


# -- the log alone ------------------------------------------------------------------------------------------


def _log(path: Path, steps: range) -> MetricsLog:
    log = MetricsLog(path, 10, quiet=True)
    for step in steps:
        log.add(step, {"loss": np.float32(step)}, show=True)
    log.close()
    return log


def test_rewinding_drops_what_comes_after(tmp_path):
    log = _log(tmp_path / "metrics.jsonl", range(1, 6))
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    log.rewind(3)
    assert [r["step"] for r in read(log.path)] == [1, 2, 3]
    assert [r["step"] for r in read(tmp_path / "speed.jsonl")] == [2, 3]
    log.rewind(0)
    assert read(log.path) == []


def test_a_side_line_replaces_that_of_an_interrupted_run(tmp_path):
    log = _log(tmp_path / "metrics.jsonl", range(1, 2))
    for step, value in ((2, 1.0), (4, 2.0), (2, 3.0)):
        log.side("validation", step, {"ce": value})
    assert read(tmp_path / "validation.jsonl") == [{"step": 2, "ce": 3.0}]


def test_the_speed_leaves_out_what_is_no_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
    log = MetricsLog(tmp_path / "metrics.jsonl", 10, quiet=True)
    values = {"tokens": np.float32(100), "useful_flops": np.float32(1e9)}
    log.add(1, values, show=True)
    now[0] += 50
    log.restart_clock(1)
    for step in (2, 3):
        now[0] += 2
        log.add(step, values, show=step == 3)
    log.close()
    (line,) = read(tmp_path / "speed.jsonl")
    assert (line["seconds_per_step"], line["tokens_per_s"], line["mfu"]) == (2, 50, 0.5)


def test_every_line_has_the_time_of_its_own_step(tmp_path, monkeypatch):
    """A step that is waited for is recorded at its end; hooks and saves are no part of it."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def step(state, batch):
        now[0] += 3
        return state, {"loss": np.float32(batch)}

    def hook(done, state):
        now[0] += 50

    log = MetricsLog(tmp_path / "metrics.jsonl", 7, quiet=True)
    manager: Any = SimpleNamespace(wait=lambda: None)
    data: Any = itertools.count()
    monkeypatch.setattr(loop_lib.Loop, "save", lambda self, done, state: hook(done, state))
    loop = loop_lib.Loop(step, None, data, manager, log, 7, 5, 1, [(3, hook)])  # type: ignore[arg-type]
    loop.run(SimpleNamespace(step=0))  # type: ignore[arg-type]
    assert [r["loss"] for r in read(log.path)] == list(range(7))
    lines = read(tmp_path / "speed.jsonl")
    assert [(r["step"], r["seconds_per_step"]) for r in lines] == [(n, 3) for n in range(2, 8)]


def test_every_held_out_reply_is_packed_once(finished, tiny_root):
    cfg, tokenizer = model_preset("debug"), load_tokenizer(finished, model_preset("debug"))
    data = dataclasses.replace(presets.load(SFTConfig, "sft-debug").data, path=str(tiny_root))
    samples = validation.held_out_dialogue(validation.characters_of(data))
    assert len(samples) == 2  # the tiny character's test dialogues; it trains on others
    replies = [len(tokenizer.encode(s.parts[-1].text)) + 1 for s in samples]
    for rows in (1, 4):
        batches = validation.pack(samples, tokenizer, cfg, rows=rows, room=16)
        assert sum(float(b.text.weight.sum()) for b in batches) == sum(replies)
        assert all(b.text.ids.shape[0] == rows and b.latent.grid.shape[1] == 0 for b in batches)


# -- killed at any moment -----------------------------------------------------------------------------------

STEPS, KILLS = 24, 20


def _train_once(root: str, run: str) -> None:
    """The body of a process that is going to be killed."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_compilation_cache_dir", str(Path(run).parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    cfg = _config(Path(root), Path(run), steps=STEPS, save=SaveConfig(every=2))
    sft.train(cfg, quiet=True)


def _process(*args: str) -> multiprocessing.context.ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, for all processes
    process = context.Process(target=_train_once, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_curve_is_that_of_an_unbroken_run(tiny_root, tmp_path):
    """SIGKILL at moments drawn over all that a process does after its start, saves included (every second step)."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _join(_process(str(tiny_root), str(whole))) == 0
    expected = read(whole / "metrics.jsonl")
    rng, kills, saved = random.Random(0), 0, 0
    while kills < KILLS:
        process = _process(str(tiny_root), str(broken))
        # Some events further on, such as a line of the log or the beginning or end of a save, at any time after it.
        for _ in range(rng.randint(1, 6)):
            before = _stamp(broken)
            while process.is_alive() and _stamp(broken) == before:
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            complete = runs.complete_steps(broken) if (broken / "checkpoints").is_dir() else []
            assert max(complete, default=0) >= saved  # what was whole stays
            saved = max(complete, default=0)
        else:  # it came to its end: once more from the beginning
            assert process.exitcode == 0
            assert read(broken / "metrics.jsonl") == expected
            broken.rename(tmp_path / f"after-{kills}-kills")
            saved = 0
    assert _join(_process(str(tiny_root), str(broken))) == 0
    assert read(broken / "metrics.jsonl") == expected


def _join(process: multiprocessing.context.ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode


def _stamp(run: Path) -> list[tuple[str, int]]:
    """Changes when a run writes a line of its log, or begins or ends a checkpoint."""
    paths = [run / "metrics.jsonl", *run.glob("checkpoints/*")]
    return [(p.name, p.stat().st_size) for p in paths if p.exists()]


# -- a run in a bucket --------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> str:
    """A folder that is taken for a bucket: everything goes through the code for remote paths."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    monkeypatch.setattr(remote, "is_remote", lambda path: os.fspath(path).startswith(str(folder)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(folder)


def test_a_run_folder_in_a_bucket(bucket):
    run = RunFolder(f"{bucket}/run")
    assert str(run.local) != f"{bucket}/run" and run.checkpoints == f"{bucket}/run" and not run.is_shared
    run.pull()
    (run.local / "pictures").mkdir()
    for name, text in (("metrics.jsonl", "1\n"), ("pictures/a.png", "p"), (".config.json", "half")):
        (run.local / name).write_text(text)
    run.push()
    there = {str(p.relative_to(bucket)) for p in Path(bucket).rglob("*") if p.is_file()}
    assert there == {"run/metrics.jsonl", "run/pictures/a.png"}
    with (run.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    run.push()
    Path(bucket, "run/checkpoints/3").mkdir(parents=True)
    Path(bucket, "run/checkpoints/3/big").write_text("not pulled")
    other = RunFolder(f"{bucket}/run")
    other.pull()
    assert (other.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert not (other.local / "checkpoints").exists()
    other.remove()
    assert not Path(bucket, "run").exists() and not other.local.exists()


def test_of_a_run_in_a_bucket_the_latest_weights_are_fetched(bucket):
    for name in (
        "config.json",
        "checkpoints/2/weights/x",
        "checkpoints/10/weights/x",
        "checkpoints/10/optimizer/x",
    ):
        path = Path(bucket, "run", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for step in ("2", "10"):
        Path(bucket, "run/checkpoints", step, "_CHECKPOINT_METADATA").write_text(json.dumps({}))
    Path(bucket, "run/checkpoints/12.tmp").mkdir()
    local = remote.fetched(f"{bucket}/run")
    files = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    assert files == {"config.json", "checkpoints/10/weights/x", "checkpoints/10/_CHECKPOINT_METADATA"}
    assert remote.fetched(f"{bucket}/run") == local
    with pytest.raises(UserError, match="nothing is there"):
        remote.fetched(f"{bucket}/absent")
    assert remote.fetched("elsewhere") == Path("elsewhere")


@pytest.mark.slow
def test_training_in_a_bucket_resumes_on_another_host(
    bucket, one_device, _tiny_template, tmp_path, monkeypatch
):
    from unichar_jax.checkpoint import manager

    monkeypatch.setattr(manager, "is_remote", remote.is_remote)
    cfg = _config(_tiny_template, Path(bucket) / "run", steps=4, save=SaveConfig(every=2))
    sft.train(dataclasses.replace(cfg, steps=2), quiet=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another host"))
    sft.train(cfg, quiet=True)
    sft.train(dataclasses.replace(cfg, run_dir=str(tmp_path / "whole")), quiet=True)
    assert read(Path(bucket) / "run" / "metrics.jsonl") == read(tmp_path / "whole" / "metrics.jsonl")


def test_jax_arrays_with_any_dtype_have_sums_of_bits():
    tree = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.arange(5), "c": jnp.float32(-0.0)}
    sums = jax.device_get(loop_lib._sums_of_bits(tree))
    assert sums == {"a": 3 * 0x3F80, "b": 10, "c": 0x80000000}

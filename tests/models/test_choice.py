"""``auto`` on a GPU: candidates are compared, timed, remembered; here with candidates and a clock made for it."""

from __future__ import annotations

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.checkpoint.remote import RunFolder
from unichar_jax.config.compute import Compute
from unichar_jax.config.data import DataConfig
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import SFTConfig
from unichar_jax.models import kernels
from unichar_jax.models.kernels import choice
from unichar_jax.models.kernels.choice import Case
from unichar_jax.models.kernels.reference import Reference
from unichar_jax.models.streams import visible
from unichar_jax.parallel.mesh import make_mesh
from unichar_jax.training import start

CASE = Case(4, 2, 24, 96, "float32")


class Timed(Reference):
    """Dense attention that takes as long as it is told to, on a clock that it moves."""

    now = 0.0

    def __init__(self, seconds: float = 0, factor: float = 1, error: str = ""):
        self.seconds, self.factor, self.error = seconds, factor, error

    def run(self, data, q, k, v):
        if self.error:
            raise RuntimeError(self.error)
        return super().run(data, q, k, v) * self.factor


class Program:
    """A compiled program whose run moves the clock."""

    def __init__(self, compiled, seconds: float):
        self.compiled, self.seconds = compiled, seconds
        self.memory_analysis = compiled.memory_analysis

    def __call__(self, *args):
        Timed.now += self.seconds
        return self.compiled(*args)


@pytest.fixture
def find(monkeypatch):
    """``choice.find`` with times of their own for ``Timed`` kernels."""
    compiled = choice.compiled_at_size
    monkeypatch.setattr(
        choice,
        "compiled_at_size",
        lambda kernel, case: (lambda program, *rest: (Program(program, kernel.seconds), *rest))(
            *compiled(kernel, case)
        ),
    )
    monkeypatch.setattr(Timed, "now", 0.0)
    return lambda candidates, **how: choice.find(CASE, candidates, clock=lambda: Timed.now, **how)


def test_the_fastest_that_is_right_is_taken_and_the_others_are_told(find, caplog):
    candidates = {
        "slow": Timed(0.2),
        "fast": Timed(0.1),
        "wrong": Timed(0.01, factor=1.001),
        "no number": Timed(0.01, factor=np.nan),
        "broken": Timed(error="no room in shared memory\nand a long trace"),
        "splash": kernels.KERNELS["splash"],
    }
    with caplog.at_level(logging.WARNING):
        found = find(candidates)
    assert found.kernel == "fast"
    times = {t.kernel: t.milliseconds for t in found.trials if not t.out}
    assert times == {"slow": pytest.approx(200), "fast": pytest.approx(100)}
    told = "\n".join(caplog.messages)
    assert len(caplog.messages) == 4
    for text in (
        "wrong left out: its error is 100",
        "no number left out: its error is inf",
        "broken left out: RuntimeError: no room in shared memory",
        "splash left out: it is a TPU kernel",
    ):
        assert text in told


def test_what_does_not_fit_is_left_out_and_the_last_resort_always_fits(find):
    found = find({"a": Timed(0.1), "b": Timed(0.2)}, room=1000)
    assert found.kernel == "chunked"
    assert all("GiB" in t.out and t.memory > 1000 for t in found.trials)


def test_after_half_a_minute_nothing_more_is_tried(find):
    found = find({"a": Timed(9), "b": Timed(0.1)})
    assert found.kernel == "a"
    assert found.trials[1].out == "30 s had passed"


@pytest.mark.parametrize("name", ["flash_interpret", "cudnn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_kernels_are_found_right(name, dtype):
    kernel = kernels.KERNELS[name] if name != "cudnn" else kernels.Cudnn("xla")
    assert 0 < choice.deviation(kernel, Case(4, 2, 24, 0, dtype)) <= 2


def test_rows_are_documents_of_spans():
    meta = choice.row([[("text", 2), ("clean", 1), ("noised", 2)], [("noised", 1)]], 8)
    np.testing.assert_array_equal(meta.segment[0], [1, 1, 1, 1, 1, 2, 0, 0])
    np.testing.assert_array_equal(meta.order[0], [0, 1, 2, 3, 4, 0, 0, 0])
    np.testing.assert_array_equal(meta.block[0], [0, 0, 2, 3, 3, 1, 0, 0])
    np.testing.assert_array_equal(meta.noisy[0], [0, 0, 0, 1, 1, 1, 0, 0])
    assert visible(*(choice.row([[("text", 3)]]),) * 2).sum() == 6


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path, find):
    """This process believes that it has a card, with kernels that run here; counts the trials."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "platform", lambda: "gpu")
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(choice, "device_kind", lambda: "NVIDIA H100")
    monkeypatch.setattr(kernels, "_settled", {})
    monkeypatch.setattr(choice, "CANDIDATES", ("reference", "chunked"))
    monkeypatch.setitem(kernels.KERNELS, "reference", Timed(0.3))
    tried = []
    find = functools.partial(choice.find, clock=lambda: Timed.now)
    monkeypatch.setattr(choice, "find", lambda case, **how: (tried.append(case), find(case, **how))[1])
    monkeypatch.setitem(kernels.KERNELS, "chunked", Timed(0.2))
    kernels._announce.cache_clear()
    yield tried
    kernels._announce.cache_clear()


def test_a_choice_is_settled_once_logged_and_remembered(on_a_gpu, caplog):
    compute, model = Compute(attention="auto"), model_preset("debug").decoder
    assert kernels.choose("gpu")[0] == "flash"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            choice.settle(compute, model, 96)
        assert kernels.resolve("auto") == "chunked"
    assert len(on_a_gpu) == 1
    assert "chunked on NVIDIA H100, rows of 96 tokens (reference 300.00 ms; chunked 200.00 ms)" in caplog.text
    choice.settle(compute, model, 128)
    assert [case.length for case in on_a_gpu] == [96, 128], "another size is another choice"
    assert len(choice.remembered()) == 2


def test_a_run_keeps_its_choice_on_its_kind_of_device(on_a_gpu, tmp_path, monkeypatch):
    compute, model, record = (
        Compute(attention="auto"),
        model_preset("debug").decoder,
        tmp_path / "attention.json",
    )
    choice.settle(compute, model, 96, record)
    assert choice.remembered(record)["run"].kernel == "chunked"
    written = json.loads(record.read_text())
    written["run"]["kernel"] = "reference"
    record.write_text(json.dumps(written))
    choice.settle(compute, model, 96, record)
    assert kernels.resolve("auto") == "reference"
    monkeypatch.setattr(choice, "device_kind", lambda: "NVIDIA L4")
    choice.settle(compute, model, 96, record)
    assert kernels.resolve("auto") == "chunked"
    record.write_text("{}")
    choice.settle(compute, model, 96, record)
    assert choice.remembered(record)["run"].device == "NVIDIA L4"


def test_nothing_is_tried_for_a_named_kernel_or_without_a_gpu(on_a_gpu, monkeypatch):
    model = model_preset("debug").decoder
    choice.settle(Compute(attention="reference"), model, 96)
    monkeypatch.setattr(choice, "platform", lambda: "cpu")
    choice.settle(Compute(attention="auto"), model, 96)
    assert not on_a_gpu
    assert jnp.zeros(()).devices()  # and this process is on a CPU after all


def test_a_run_settles_it_for_its_own_rows_also_under_its_mesh(on_a_gpu, tmp_path):
    run = RunFolder(str(tmp_path / "run"))
    data, compute = DataConfig(capacities=(48, 40, 32)), Compute(attention="auto")
    with jax.set_mesh(make_mesh()):
        start.settle_attention(run, SFTConfig(data=data, compute=compute), model_preset("debug"))
        assert (
            kernels.resolve("auto")
            == choice.remembered(run.local / "attention.json")["run"].kernel
            == "chunked"
        )
        start.settle_attention(run, GRPOConfig(compute=compute), model_preset("debug"))
    assert [case.length for case in on_a_gpu] == [120], "the run's choice is kept"

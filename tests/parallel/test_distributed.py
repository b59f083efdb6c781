"""Start-up on several hosts: finding one's place, the meeting before the start, and real processes on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unichar_jax.errors import UserError
from unichar_jax.parallel import distributed
from unichar_jax.parallel.distributed import HostsConfig, Place
from unichar_jax.training.loop import PREEMPTED_EXIT_CODE
from unichar_jax.training.metrics import read

# -- finding one's place ------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[01-02,7],big3",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node-a", ["node-a"]),
        ("gpu[01-02,7],big3", ["gpu01", "gpu02", "gpu7", "big3"]),
        ("a[9-11]x,b", ["a9x", "a10x", "a11x", "b"]),
    ],
)
def test_short_node_lists(text, names):
    assert distributed.expand_nodes(text) == names


def test_alone_is_alone():
    assert distributed.find(HostsConfig(), {}) == Place()
    assert distributed.find(HostsConfig(cluster="none"), SLURM) == Place()
    assert distributed.find(HostsConfig(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).count == 1


def test_slurm():
    place = distributed.find(HostsConfig(), SLURM)
    assert (place.index, place.count, place.device) == (2, 4, None)
    assert place.coordinator == "gpu01:20246"
    assert place.names == ("gpu01", "gpu02", "gpu7", "big3")
    assert "gpu7" in place.who(2)


@pytest.mark.parametrize(("visible", "device"), [("", 3), ("0,1,2,3", 3), ("2", None)])
def test_several_slurm_tasks_on_a_node_take_a_device_each(visible, device):
    tasks = {"SLURM_NTASKS": "8", "SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "n[1-2]"}
    place = distributed.find(HostsConfig(), SLURM | tasks | {"CUDA_VISIBLE_DEVICES": visible})
    assert (place.index, place.count, place.device, place.names) == (7, 8, device, ())


def test_flags_come_before_the_cluster_and_the_environment():
    environ = SLURM | {
        "UNICHAR_COORDINATOR": "pod-0.set:8476",
        "UNICHAR_NUM_PROCESSES": "3",
        "UNICHAR_PROCESS_INDEX": "1",
    }
    assert distributed.find(HostsConfig(), environ) == Place(1, 3, "pod-0.set:8476", "flags")
    flags = HostsConfig(coordinator="other:1234", index=2)
    assert distributed.find(flags, environ) == Place(2, 3, "other:1234", "flags")


def test_tpu_from_its_variables_or_its_metadata():
    environ = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}
    place = distributed.find(HostsConfig(), environ)
    assert (place.index, place.coordinator, place.names) == (1, "t-0:8476", ("t-0", "t-1"))
    told = {"worker-network-endpoints": "u:u:10.0.0.1,u:u:10.0.0.2", "agent-worker-number": "0"}
    place = distributed.find(HostsConfig(cluster="tpu"), {}, told.__getitem__)
    assert (place.index, place.count, place.coordinator) == (0, 2, "10.0.0.1:8476")


def _no_answer(name: str) -> str:
    raise OSError("no route to host")


@pytest.mark.parametrize(
    ("cfg", "environ", "message"),
    [
        (HostsConfig(cluster="slurm"), {}, "slurm: nothing of it was found; start it with srun"),
        (HostsConfig(cluster="flags"), {}, "UNICHAR_COORDINATOR"),
        (HostsConfig(cluster="tpu"), {}, "metadata server gave no answer to use: no route to host"),
        (HostsConfig(coordinator="a:1"), {}, "--hosts.count and --hosts.index"),
        (HostsConfig(coordinator="a:1", count=2, index=2), {}, "process 2 of 2: expected 0 to 1"),
        (HostsConfig(coordinator="a", count=2, index=0), {}, "expected host:port"),
        (
            HostsConfig(),
            {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": "c"},
            "one slice of several",
        ),
    ],
)
def test_what_is_missing_is_named(cfg, environ, message):
    with pytest.raises(UserError, match=message):
        distributed.find(cfg, environ, _no_answer)


# -- the meeting --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Config:
    steps: int = 3
    path: str = "data"


def _free_port() -> int:
    """A port that is free, as is the one above it (of the meeting).

    Below the range that systems give to outgoing connections: what is free there stays free.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000, 2), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for wanted in (port, port + 1):
                stack.enter_context(distributed._listen(wanted))
            return port
    raise OSError("a hundred ports are taken")


def _meet(configs: dict[int, _Config], count: int, timeout: float = 20.0) -> dict[int, str]:
    """What each process hears, empty for a start; processes are threads here."""
    address, heard = f"127.0.0.1:{_free_port()}", {}
    names = tuple(f"node-{'abcdef'[i]}" for i in range(count))

    def come(key: int, index: int, config: _Config) -> None:
        place = Place(index, count, address, "test", names)
        report = distributed.facts(place, config) | {"host": names[index]}
        try:
            distributed.preflight(place, report, timeout, lambda text: None)
            heard[key] = ""
        except UserError as error:
            heard[key] = str(error)

    threads = [threading.Thread(target=come, args=(i, i % 10, c)) for i, c in configs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_all_are_here_and_alike():
    assert _meet({0: _Config(), 1: _Config(), 2: _Config()}, 3) == {0: "", 1: "", 2: ""}


def test_a_different_configuration_is_named_on_every_host():
    heard = _meet({0: _Config(), 1: _Config(), 2: _Config(steps=5)}, 3)
    assert len(set(heard.values())) == 1
    assert "steps: 5 on node-c (process 2), 3 on node-a (process 0)" in heard[1]
    assert "config" in heard[1] and "path" not in heard[1]


def test_a_late_host_is_named_on_every_host_that_came():
    heard = _meet({0: _Config(), 2: _Config()}, 3, timeout=2.0)
    assert heard[0] == heard[2]
    assert "1 of 3 processes did not come within 2 s: process 1 (node-b)" in heard[0]


def test_an_absent_coordinator_is_named():
    heard = _meet({1: _Config()}, 2, timeout=1.0)
    assert "node-b found no process 0 (node-a) at 127.0.0.1" in heard[1]


def test_two_hosts_with_one_number():
    heard = _meet({0: _Config(), 1: _Config(), 11: _Config()}, 3, timeout=5.0)
    assert "two hosts are process 1" in heard[0]


def test_a_stranger_on_the_port_changes_nothing():
    port = _free_port()
    place = Place(0, 2, f"127.0.0.1:{port}", "test")
    heard: list[str] = []

    def serve() -> None:
        try:
            distributed.preflight(place, distributed.facts(place, _Config()), 20.0, heard.append)
            heard.append("started")
        except UserError as error:
            heard.append(str(error))

    server = threading.Thread(target=serve)
    server.start()
    for words in (b"GET / HTTP/1.1\n", b'"hello"\n', b""):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port + 1), timeout=5) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    other = dataclasses.replace(place, index=1)
    distributed.preflight(other, distributed.facts(other, _Config()), 20.0, heard.append)
    server.join()
    assert heard == ["started"]


@pytest.mark.parametrize("above", [0, 1])
def test_a_port_that_is_taken_is_explained(above):
    port = _free_port()
    with distributed._listen(port + above):
        place = Place(0, 2, f"127.0.0.1:{port}", "test")
        with pytest.raises(UserError, match=rf"port {port + above} .*cannot be had .*--hosts\.coordinator"):
            distributed.preflight(place, distributed.facts(place, None), 1.0, print)


def test_the_digest_is_of_the_source():
    assert distributed.facts(Place(), None)["same"]["unichar-jax"] == distributed.source_digest()
    assert len(distributed.source_digest()) == 12


# -- real processes -----------------------------------------------------------------------------------------

DEVICES = 4
TEXT_ONLY = ["--data.tasks", "vlm_extension", "1", "--data.tokens-per-row", "256"]


class Run:
    """A training command on loopback, in one process or several with the same number of devices in all."""

    def __init__(self, root: Path, run: Path, cache: Path, *fields: str):
        self.root, self.run, self.cache, self.fields = root, run, cache, fields

    def start(self, processes: int, steps: int, *more: str) -> list[subprocess.Popen[str]]:
        words = [sys.executable, "-m", "unichar_jax.cli.main", "sft", "sft-debug", "--steps", str(steps)]
        words += ["--data.path", str(self.root), "--run-dir", str(self.run), "--data.rows-per-device", "1"]
        words += ["--run.compilation-cache", str(self.cache), "--optimizer.ema-decay", "0"]
        words += [*self.fields, *more, "--hosts.timeout", "600"]
        environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes), "JAX_PLATFORMS": "cpu"}
        environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        if processes > 1:
            words += ["--hosts.coordinator", f"127.0.0.1:{_free_port()}", "--hosts.count", str(processes)]
        return [
            subprocess.Popen(
                [*words, *(["--hosts.index", str(i)] if processes > 1 else [])],
                env=environ,
                cwd=self.run.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(processes)
        ]

    def __call__(self, processes: int, steps: int, *more: str, code: int = 0) -> list[str]:
        """Runs to its end; the output of each process."""
        started = self.start(processes, steps, *more)
        said = [p.communicate()[0] for p in started]
        assert [p.returncode for p in started] == [code] * processes, "\n".join(said)
        return said

    @property
    def losses(self) -> list[float]:
        records = read(self.run / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        return [r["loss"] for r in records]


def _close(a: list[float], b: list[float]) -> None:
    assert len(a) == len(b) == 5
    assert a == pytest.approx(b, rel=1e-6)


def test_two_processes_start_and_meet(tmp_path):
    # Answers go into files: Gloo writes to standard output whenever it likes.
    code = (
        "import pathlib, sys, jax\n"
        "from unichar_jax.parallel import distributed as d\n"
        "said = []\n"
        "hosts = d.HostsConfig(coordinator=sys.argv[1], count=2, index=int(sys.argv[2]))\n"
        "place = d.start(hosts, say=said.append)\n"
        "d.barrier('here')\n"
        "said.append(f'{place.index} {d.is_leader()} {jax.process_count()} {jax.device_count()}')\n"
        "pathlib.Path(sys.argv[3], sys.argv[2]).write_text('\\n'.join(said))\n"
    )
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", code, f"127.0.0.1:{_free_port()}"]
    started = [subprocess.Popen([*words, str(i), tmp_path], env=environ) for i in range(2)]
    assert [p.wait() for p in started] == [0, 0]
    first, second = ((tmp_path / str(i)).read_text().splitlines() for i in range(2))
    assert any(line.startswith("2 processes by flags") for line in first)
    assert "0 True 2 4" in first and "1 False 2 4" in second


@pytest.mark.slow
def test_two_processes_do_what_one_does(tiny_root, tmp_path):
    one, two = (Run(tiny_root, tmp_path / name, tmp_path / "cache", *TEXT_ONLY) for name in ("one", "two"))
    one(1, 5, "--save.every", "5")
    first, second = two(2, 3, "--save.every", "3")
    assert "2 processes by flags" in first and "4 devices, 2 on each" in first
    assert "step 3/3" in first and "step 3/3" not in second
    two(1, 5, "--save.every", "5")  # one process goes on from what two saved
    _close(two.losses, one.losses)


@pytest.mark.slow
def test_all_streams_on_one_two_and_four_processes(tiny_root, tmp_path):
    runs = {n: Run(tiny_root, tmp_path / f"run-{n}", tmp_path / "cache") for n in (1, 2, 4)}
    for n, run in runs.items():
        run(n, 5, "--save.every", "2")
    _close(runs[2].losses, runs[1].losses)
    _close(runs[4].losses, runs[1].losses)


@pytest.mark.slow
def test_resume_across_numbers_of_processes(tiny_root, tmp_path):
    whole, parts = (Run(tiny_root, tmp_path / n, tmp_path / "cache", *TEXT_ONLY) for n in ("whole", "parts"))
    whole(1, 5, "--save.every", "5")
    for processes, steps in ((4, 2), (1, 3), (2, 4), (4, 5)):
        parts(processes, steps, "--save.every", "1")
    _close(parts.losses, whole.losses)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step(tiny_root, tmp_path):
    run = Run(tiny_root, tmp_path / "run", tmp_path / "cache", *TEXT_ONLY)
    started = run.start(2, 100_000, "--save.every", "100000")
    metrics = run.run / "metrics.jsonl"
    while not (metrics.exists() and len(read(metrics)) > 2):
        assert all(p.poll() is None for p in started)
        time.sleep(0.2)
    started[1].send_signal(signal.SIGTERM)
    said = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [PREEMPTED_EXIT_CODE] * 2, "\n".join(said)
    saved = [int(p.name) for p in (run.run / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] >= 3
    assert [r["step"] for r in read(metrics)] == list(range(1, saved[0] + 1))


@pytest.mark.slow
def test_smoke_on_two_processes_leaves_nothing(tiny_root, tmp_path):
    first, _ = Run(tiny_root, tmp_path / "run", tmp_path / "cache", *TEXT_ONLY)(2, 50, "--smoke")
    assert "read back bit by bit" in first
    assert not list(tmp_path.glob("run*"))


@pytest.mark.slow
def test_hosts_with_different_commands_do_not_start(tiny_root, tmp_path):
    run = Run(tiny_root, tmp_path / "run", tmp_path / "cache", *TEXT_ONLY)
    # The second process is given the place of another command's second process.
    mine, other = run.start(2, 5), run.start(2, 7)
    mine[1].kill()
    other[0].kill()
    place = [w for w in mine[0].args if str(w).startswith("127.0.0.1:")][0]
    other[1].kill()
    words = [place if str(w).startswith("127.0.0.1:") else w for w in other[1].args]
    late = subprocess.Popen(
        words, cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True
    )
    assert "steps: 7 on" in mine[0].communicate()[0]
    assert "steps: 7 on" in late.communicate()[1]
    assert (mine[0].returncode, late.returncode) == (1, 1)
    assert not run.run.exists()
    for process in (mine[1], *other):
        process.communicate()

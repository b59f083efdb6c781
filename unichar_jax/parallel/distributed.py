"""Start-up on several hosts: who is in the run, do all of them start the same one, and is anybody late.

``find`` reads this process's place from flags, SLURM, a GKE JobSet or a TPU VM's metadata. ``start`` lets all
processes meet on a plain socket first and only then starts ``jax.distributed``, because JAX's own start-up
aborts the process when a host is late, and names neither the host nor the reason. Process 0 listens one port
above JAX's, compares what the others report (versions, this package's source, every field of the
configuration) and gives all of them the same verdict; so a run that cannot work ends in a sentence on every
host before the first collective.

One process a host drives all of its devices, except under SLURM with several tasks on a node: then each
drives the one device of its local number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unichar_jax.errors import UserError, listed
from unichar_jax.files import digest

COORDINATOR, COUNT, INDEX = "UNICHAR_COORDINATOR", "UNICHAR_NUM_PROCESSES", "UNICHAR_PROCESS_INDEX"
PORT = 8476
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LATE_IS_SAID_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class HostsConfig:
    """How this process finds the others of its run.

    Attributes:
      cluster: "auto" takes flags, else SLURM, else the TPU host names that GKE sets, else this process alone;
        "flags", "slurm" and "tpu" (which also asks a TPU VM's metadata) are errors where they find nothing;
        "none" is this process alone.
      coordinator: ``host:port`` of process 0; also the variable UNICHAR_COORDINATOR. The port after it must
        be free too.
      count, index: processes in all, and which one this is; also UNICHAR_NUM_PROCESSES and
        UNICHAR_PROCESS_INDEX.
      timeout: seconds to wait for the last of them.
    """

    cluster: Literal["auto", "none", "flags", "slurm", "tpu"] = "auto"
    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise UserError(f"hosts.timeout: expected seconds above 0, got {self.timeout}.")


@dataclass(frozen=True)
class Place:
    """A process among those of its run.

    Attributes:
      index, count: which one of how many.
      coordinator: ``host:port`` of process 0; empty for a run of one process.
      found: what said so, in words.
      names: the hosts of all processes in order, where that is known beforehand; else empty.
      device: the only local device to use; None for all.
    """

    index: int = 0
    count: int = 1
    coordinator: str = ""
    found: str = "one process"
    names: tuple[str, ...] = ()
    device: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(
                f"{self.found}: process {self.index} of {self.count}: expected 0 to {self.count - 1}."
            )
        host, _, port = self.coordinator.rpartition(":")
        if self.count > 1 and not (host and port.isdigit() and int(port) < 65535):
            raise UserError(
                f"{self.found}: coordinator '{self.coordinator}': expected host:port of process 0, such as"
                f" node-a:{PORT}."
            )

    def who(self, index: int) -> str:
        """A process in words, with its host where that is known."""
        return f"process {index}" + (f" ({self.names[index]})" if self.names else "")


# -- where am I ---------------------------------------------------------------------------------------------


def metadata(name: str) -> str:
    """An attribute of this TPU VM, asked of the metadata server."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def find(
    cfg: HostsConfig, environ: Mapping[str, str] = os.environ, ask: Callable[[str], str] = metadata
) -> Place:
    """This process's place.

    Args:
      cfg: what the user said.
      environ: variables of this process.
      ask: gives an attribute of a TPU VM.

    Raises:
      UserError: the cluster that was named is not there, or what it says is incomplete.
    """
    ways = {"flags": _from_flags, "slurm": _from_slurm, "tpu": _from_tpu}
    if cfg.cluster == "none":
        return Place()
    if cfg.cluster != "auto":
        place = ways[cfg.cluster](cfg, environ, ask)
        if place is None:
            needs = {
                "flags": f"give --hosts.coordinator, --hosts.count and --hosts.index, or set {COORDINATOR}, {COUNT}"
                f" and {INDEX}",
                "slurm": "start it with srun (launch/slurm.sh does)",
                "tpu": "expected TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, or a TPU VM's metadata server",
            }
            raise UserError(f"hosts.cluster {cfg.cluster}: nothing of it was found; {needs[cfg.cluster]}.")
        return place
    found = (way(cfg, environ, None) for way in ways.values())
    return next((place for place in found if place is not None), Place())


Ask = Callable[[str], str] | None


def _from_flags(cfg: HostsConfig, environ: Mapping[str, str], _: Ask) -> Place | None:
    coordinator = cfg.coordinator or environ.get(COORDINATOR, "")
    if not coordinator:
        return None
    try:
        count = cfg.count or int(environ.get(COUNT, ""))
        index = cfg.index if cfg.index >= 0 else int(environ.get(INDEX, ""))
    except ValueError:
        raise UserError(
            f"hosts: there is a coordinator ({coordinator}), but not how many processes there are or which one"
            f" this is; give --hosts.count and --hosts.index, or set {COUNT} and {INDEX}."
        ) from None
    return Place(index, count, coordinator, "flags")


def _from_slurm(cfg: HostsConfig, environ: Mapping[str, str], _: Ask) -> Place | None:
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST")
    if any(name not in environ for name in needed):
        return None  # not a task of srun
    job, index, count = (int(environ[name]) for name in needed[:3])
    if count == 1:
        return Place(found=f"SLURM job {job}, one task")
    nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
    # Jobs of one node must not meet each other, so the port follows from the job's number.
    coordinator = cfg.coordinator or f"{nodes[0]}:{20_000 + 2 * (job % 10_000)}"
    several = count > len(nodes)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = visible != "" and "," not in visible  # SLURM gave this task its device already
    device = int(environ.get("SLURM_LOCALID", 0)) if several and not bound else None
    return Place(
        index, count, coordinator, f"SLURM job {job}", () if several else tuple(nodes[:count]), device
    )


def _from_tpu(cfg: HostsConfig, environ: Mapping[str, str], ask: Ask) -> Place | None:
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    try:
        if hosts and "TPU_WORKER_ID" in environ:
            names, index = hosts.split(","), int(environ["TPU_WORKER_ID"])
        elif ask is not None:
            names = [end.split(":")[-1] for end in ask("worker-network-endpoints").split(",")]
            index = int(ask("agent-worker-number"))
        else:
            return None
    except (OSError, ValueError) as error:
        raise UserError(f"hosts.cluster tpu: the metadata server gave no answer to use: {error}.") from None
    if environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        raise UserError(
            "this is one slice of several (MEGASCALE_COORDINATOR_ADDRESS is set): number the hosts of all slices"
            " through and give --hosts.coordinator, --hosts.count and --hosts.index on each."
        )
    if len(names) == 1:
        return Place(found="TPU, one host")
    return Place(index, len(names), cfg.coordinator or f"{names[0]}:{PORT}", "TPU", tuple(names))


def expand_nodes(text: str) -> list[str]:
    """Host names from SLURM's short form: ``gpu[01-02,7],big3`` is gpu01, gpu02, gpu7 and big3."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)?", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            names.append(part)
            continue
        before, ranges, after = match.groups()
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            names += [f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last or first) + 1)]
    return names


# -- preflight ----------------------------------------------------------------------------------------------


@functools.cache
def source_digest() -> str:
    """Changes with any line of this package's Python."""
    package = Path(__file__).parents[1]
    sources = sorted(package.rglob("*.py"))
    return digest(*(p.relative_to(package).as_posix().encode() + p.read_bytes() for p in sources))[:12]


def facts(place: Place, config: Any) -> dict[str, Any]:
    """What a process reports of itself; ``config`` is a dataclass, or None."""
    fields = {} if config is None else dict(_flat("", dataclasses.asdict(config)))
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "index": place.index,
        "host": socket.gethostname(),
        "same": {
            "number of processes": place.count,
            "config": digest(json.dumps(fields, sort_keys=True))[:12],
            "unichar-jax": source_digest(),
            "python": platform.python_version(),
            **versions,
            **fields,
        },
    }


def _flat(prefix: str, tree: Any):
    """``(a.b, value)`` pairs of a tree; lists and tuples are values."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, json.loads(json.dumps(tree))


def differences(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where processes differ from process 0, a line each; empty if they are alike."""
    first, lines = reports[0], []
    for other in reports[1:]:
        for name in dict.fromkeys([*first["same"], *other["same"]]):
            mine, theirs = first["same"].get(name), other["same"].get(name)
            if mine != theirs:
                lines.append(
                    f"{name}: {theirs!r} on {other['host']} (process {other['index']}), {mine!r} on"
                    f" {first['host']} (process 0)"
                )
    return lines


def preflight(place: Place, report: Mapping[str, Any], timeout: float, say: Callable[[str], None]) -> None:
    """Meets the other processes; returns once all are here and alike.

    Raises:
      UserError: the same sentence on every process that is here: who is late, or what differs.
    """
    host, _, port = place.coordinator.rpartition(":")
    if place.index == 0:
        error = _receive(place, report, int(port) + 1, timeout, say)
    else:
        error = _report(place, report, (host.strip("[]"), int(port) + 1), timeout)
    if error:
        raise UserError(error)


def _receive(
    place: Place, report: Mapping[str, Any], port: int, timeout: float, say: Callable[[str], None]
) -> str:
    """Process 0: collects the reports, and sends everybody the verdict."""
    reports: dict[int, Mapping[str, Any]] = {0: report}
    waiting: list[socket.socket] = []
    late = set(range(1, place.count))
    said = time.monotonic()
    deadline = said + timeout
    with contextlib.ExitStack() as stack:
        try:
            wanted = port - 1  # JAX's own: its service would end with the others still waiting for it
            _listen(wanted).close()
            wanted = port
            server = stack.enter_context(_listen(wanted))
        except OSError as error:
            raise UserError(
                f"port {wanted} of {report['host']} cannot be had ({error}): another run may use it; give another"
                " --hosts.coordinator host:port."
            ) from None
        server.settimeout(1.0)
        error = ""
        while late and not error and time.monotonic() < deadline:
            if time.monotonic() - said > _LATE_IS_SAID_EVERY:
                said = time.monotonic()
                say(f"waiting for {_list(place, late)}")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger on the port
                connection, _ = server.accept()
                stack.callback(connection.close)
                connection.settimeout(10.0)
                other = json.loads(_read_line(connection))
                index = int(other["index"])
                if index in late:
                    late.discard(index)
                    reports[index] = other
                else:
                    known = reports.get(index, {"host": "nobody"})
                    error = (
                        f"two hosts are process {index}: {known['host']} and {other['host']}. Each process needs a"
                        f" number of its own, 0 to {place.count - 1}."
                    )
                waiting.append(connection)
        if late and not error:
            here = ", ".join(str(r["host"]) for _, r in sorted(reports.items()))
            error = (
                f"{len(late)} of {place.count} processes did not come within {timeout:.0f} s:"
                f" {_list(place, late)}. Here are {here}. Look at the logs of those that are late, and whether they"
                f" can reach {place.coordinator} and the port after it."
            )
        if not error and (lines := differences([r for _, r in sorted(reports.items())])):
            error = (
                f"the hosts would not run the same thing:{listed(lines)}\nInstall the same version on every host and"
                " start the same command on each."
            )
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"error": error}).encode() + b"\n")
    return error


def _report(place: Place, report: Mapping[str, Any], address: tuple[str, int], timeout: float) -> str:
    """Another process: reports, and waits for the verdict."""
    last: Exception | None = None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(json.dumps(report).encode() + b"\n")
                # Process 0 began to wait at another time; its verdict comes within its own timeout.
                connection.settimeout(timeout + 30)
                return str(json.loads(_read_line(connection))["error"])
        except (OSError, ValueError) as error:
            last = error
            time.sleep(0.5)
    return (
        f"{place.who(place.index)} on {report['host']} found no {place.who(0)} at {address[0]}:{address[1]} within"
        f" {timeout:.0f} s ({last}). Is it running, and may this host reach that port?"
    )


def _listen(port: int) -> socket.socket:
    """A socket for both kinds of addresses, where the system has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _read_line(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as stream:
        line = stream.readline(1 << 20)
    if not line.endswith(b"\n"):
        raise ValueError("the connection ended in the middle of a message")
    return line


def _list(place: Place, indices: set[int]) -> str:
    return ", ".join(place.who(i) for i in sorted(indices))


# -- start --------------------------------------------------------------------------------------------------


def start(cfg: HostsConfig, config: Any = None, say: Callable[[str], None] = lambda _: None) -> Place:
    """Joins the run's processes; to be called before anything touches a device. Alone, it does nothing.

    Args:
      cfg: how to find the others.
      config: the experiment (a dataclass), which must be the same everywhere.
      say: prints a line.

    Raises:
      UserError: a host is late, or is about to run something else.
    """
    import jax

    place = find(cfg)
    if place.count == 1:
        return place
    began = time.monotonic()
    report = facts(place, config)
    preflight(place, report, cfg.timeout, say)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.device,
        cluster_detection_method="deactivate",
        initialization_timeout=int(cfg.timeout) + 1,
        shutdown_timeout_seconds=60,  # a process that failed does not wait long for those it left behind
    )
    if place.index == 0:
        say(
            f"{place.count} processes by {place.found}, all with configuration {report['same']['config']}, here after"
            f" {time.monotonic() - began:.1f} s; {jax.device_count()} devices, {jax.local_device_count()} on each"
        )
    return place


def is_leader() -> bool:
    """Whether this process writes what is written once."""
    import jax

    return jax.process_index() == 0


def barrier(name: str, timeout: float = 3600.0) -> None:
    """Returns when every process has come here; alone, at once.

    Waits through the coordination service: collectives give up much sooner, and process 0 may have a model to
    copy before it comes. Then all devices are made to meet, while their hosts are together.

    Raises:
      UserError: some do not come within ``timeout`` seconds.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    from jax._src import distributed as service  # its client has no public name

    client = service.global_state.client
    assert client is not None  # several processes have one
    try:
        client.wait_at_barrier(f"unichar/{name}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"some processes did not come to '{name}' within {timeout:.0f} s: {error}") from None
    multihost_utils.sync_global_devices(name)


def from_leader(name: str, value: int) -> int:
    """Process 0's ``value``, in every process; it may take its time to find it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    barrier(name)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

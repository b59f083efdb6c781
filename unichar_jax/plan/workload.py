"""A job of several programs on described devices: what stays in memory beside them, and each one compiled.

Training's step is one program; drawing, answering and stage 2 are several that take turns on the same devices. What
they all need (weights, optimiser state, scorers) stays, whichever of them runs, so the memory of a job is that, and
the temporaries and results of its largest program. A ``Workload`` says it for one device, with each program's work
and the least time it can take: its FLOPs at the device's peak, or the bytes it must read at the memory's bandwidth,
whichever is more. Nothing is timed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from unichar_jax.parallel.chips import GIB, Chip
from unichar_jax.plan import program as program_lib
from unichar_jax.plan.program import Collective, Flops, Memory
from unichar_jax.plan.topology import Topology


@dataclass(frozen=True)
class Compiled:
    """What compiling one program told.

    Attributes:
      name: of the program.
      memory: of one device; None if the compiler found no room, and then ``needed`` is what it asked for, if it
        said.
      executed: FLOPs of the traced program, all devices.
      seconds: that tracing and compiling took.
    """

    name: str
    memory: Memory | None
    needed: float | None
    executed: Flops
    collectives: list[Collective]
    seconds: float


def compile_program(name: str, function: Any, *args: Any, **static: Any) -> Compiled:
    """Compiles a jitted function for shapes with shardings, under the mesh that is set."""
    start = time.monotonic()
    traced = function.trace(*args, **static)
    executed = program_lib.count_flops(traced.jaxpr.jaxpr)
    memory, needed, sent = None, None, []
    try:
        compiled = _compile(traced.lower())
        memory, sent = Memory.of(compiled), program_lib.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _bytes_asked(str(error))
    return Compiled(name, memory, needed, executed, sent, time.monotonic() - start)


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Without a card there is no search for tiles, and some products of float32 have none by default.
        if "output tile sizes" not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _bytes_asked(message: str) -> float | None:
    """What the TPU compiler asked for, of all or (if those alone are too much) of temporaries; None if not said."""
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])", message)
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[found[2]] if found else None


def with_sharding(tree: Any, sharding: Any) -> Any:
    """Shapes of arrays (or of shapes), with one sharding for all of them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bytes_of(tree: Any) -> int:
    """Bytes of one device that arrays (or their shapes, with shardings) take."""

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


@dataclass(frozen=True)
class Task:
    """A program as a job uses it.

    Attributes:
      compiled: the program.
      times: how often it runs in one unit of the job (a sheet of pictures, an answer, a round).
      useful: FLOPs that one run is for, all devices.
      reads: bytes of weights and caches that a device has to read in one run.
    """

    compiled: Compiled
    times: float
    useful: float
    reads: float = 0.0

    def floor(self, chip: Chip, devices: int) -> float:
        """The least seconds of one run."""
        return max(self.useful / devices / chip.flops, self.reads / chip.bandwidth)

    @property
    def beside(self) -> float | None:
        """Bytes that a run takes beyond what stays: results, temporaries, the program itself; None if unknown."""
        m = self.compiled.memory
        return None if m is None else m.outputs - m.reused + m.temporaries + m.code


@dataclass(frozen=True)
class Workload:
    """A job on a topology.

    Attributes:
      what: the job in words, with the unit that times are of.
      stays: what is in a device's memory throughout, bytes by name.
      tasks: its programs, in order.
      kernel: the attention kernel that was compiled.
      remedies: what would make it fit, the cheapest first.
      notes: further lines of the report.
    """

    what: str
    topology: Topology
    mesh: Mapping[str, int]
    kernel: str
    stays: Mapping[str, float]
    tasks: Sequence[Task]
    remedies: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def devices(self) -> int:
        """That run it, of those that the topology has."""
        return math.prod(self.mesh.values())

    @property
    def peak(self) -> float | None:
        """Bytes of one device at the most; None if the compiler found no room for a program."""
        beside = [t.beside for t in self.tasks]
        if any(b is None for b in beside):
            return None
        return sum(self.stays.values()) + max((b for b in beside if b is not None), default=0.0)

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.topology.chip.memory

    @property
    def floor_seconds(self) -> float:
        """The least seconds of one unit of the job."""
        chip, devices = self.topology.chip, self.devices
        return sum(t.times * t.floor(chip, devices) for t in self.tasks)

    @property
    def useful(self) -> float:
        """FLOPs of one unit of the job, all devices."""
        return sum(t.times * t.useful for t in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        chip, devices = self.topology.chip, self.devices
        return {
            "what": self.what,
            "topology": self.topology.text,
            "chip": chip.name,
            "chip_memory": chip.memory,
            "devices": devices,
            "mesh": dict(self.mesh),
            "kernel": self.kernel,
            "stays": dict(self.stays),
            "peak": self.peak,
            "fits": self.fits,
            "useful": self.useful,
            "floor_seconds": self.floor_seconds,
            "programs": [
                {
                    "name": t.compiled.name,
                    "times": t.times,
                    "beside": t.beside,
                    "useful": t.useful,
                    "floor_seconds": t.floor(chip, devices),
                    "sent": sum(c.traffic for c in t.compiled.collectives),
                    "collectives": {c.kind: c.count for c in t.compiled.collectives},
                }
                for t in self.tasks
            ],
        }


def report(job: Workload) -> str:
    """The job in words and numbers."""
    chip, devices = job.topology.chip, job.devices
    gib = lambda n: f"{n / GIB:8.2f} GiB"  # noqa: E731
    part = "" if devices == job.topology.size else f"{devices} of "
    lines = [
        f"{job.what}, on {part}{job.topology.text} ({devices} x {chip.name}), mesh {dict(job.mesh)}",
        f"attention kernel: {job.kernel}",
        "",
        "memory of one device",
        *(f"  {name:<28}{gib(n)}" for name, n in job.stays.items()),
    ]
    for t in job.tasks:
        asked = t.compiled.needed
        room = f"no room found{f': {asked / GIB:.2f} GiB asked for' if asked else ''}"
        lines.append(f"  while it runs: {t.compiled.name:<13}{room if t.beside is None else gib(t.beside)}")
    if job.peak is not None:
        lines.append(f"  {'at most':<28}{gib(job.peak)}")
    lines.append(f"  {f'of {chip.name}' + chr(39) + 's':<28}{gib(chip.memory)}")
    lines.append("it fits" if job.fits else "it does NOT fit; what would help, the cheapest first:")
    lines += [] if job.fits else [f"  {remedy}" for remedy in job.remedies]
    lines += ["", f"{'work':<18}{'runs':>10}{'TFLOP a run':>14}{'least s a run':>15}{'least s in all':>16}"]
    for t in job.tasks:
        floor = t.floor(chip, devices)
        work = f"{t.useful / 1e12:14.3f}{floor:15.4f}{t.times * floor:16.3f}"
        lines.append(f"  {t.compiled.name:<16}{t.times:10,.0f}{work}")
    lines.append(f"  {'in all':<16}{'':>10}{job.useful / 1e12:14.3f}{'':>15}{job.floor_seconds:16.3f}")
    sent = [(t, c) for t in job.tasks for c in t.compiled.collectives]
    lines += [f"  {t.compiled.name}: {c.kind} x {c.count}, {c.traffic / 1e9:.3f} GB sent" for t, c in sent]
    lines += job.notes
    seconds = sum(t.compiled.seconds for t in job.tasks)
    lines.append(f"compiled in {seconds:.0f} s; nothing here was timed on the hardware")
    return "\n".join(lines)

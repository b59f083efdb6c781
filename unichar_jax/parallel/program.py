"""What a compiled program does, read from the compiler's own output: memory by kind, collectives, FLOPs.

The compiler's FLOP count takes the body of a loop once, and does not see into kernels. Here FLOPs are counted
in the traced program (``count_flops``), where loops know their length, and collectives in the compiled one,
each as often as its loop runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core

# -- memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and in its host's memory for it."""

    arguments: int
    outputs: int
    reused: int  # outputs that take the place of arguments
    temporaries: int
    code: int
    host: int

    @property
    def device(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries + self.code

    @classmethod
    def of(cls, program: jax.stages.Compiled) -> Memory:
        m: Any = program.memory_analysis()
        host = (
            m.host_argument_size_in_bytes
            + m.host_output_size_in_bytes
            - m.host_alias_size_in_bytes
            + m.host_temp_size_in_bytes
        )
        return cls(
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
            m.generated_code_size_in_bytes,
            host,
        )


# -- FLOPs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Matrix products of a traced program, over all devices.

    Attributes:
      dense: outside of kernels.
      kernels: inside Pallas kernels if no block were skipped: an upper bound.

    Loops of unknown length (attention over the chunks that a mask leaves) are not counted.
    """

    dense: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.dense + other.dense, self.kernels + other.kernels)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.dense * times, self.kernels * times)


def count_flops(jaxpr: Any) -> Flops:
    """Counts a jaxpr: loops as often as they run, of branches the dearest, each device of a ``shard_map``."""
    total = Flops()
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += Flops(_dot_flops(eqn))
        elif name == "conv_general_dilated":
            total += Flops(_convolution_flops(eqn))
        elif name == "pallas_call":
            body = count_flops(p["jaxpr"])
            total += Flops(0.0, (body.dense + body.kernels) * math.prod(p["grid_mapping"].grid))
        elif name == "cond":
            branches = [count_flops(b.jaxpr) for b in p["branches"]]
            total += max(branches, key=lambda f: f.dense + f.kernels)
        elif name != "while":
            times = p["length"] if name == "scan" else 1
            if name == "shard_map":
                times = math.prod(p["mesh"].shape[a] for a in p["newly_manual_axes"])
            for inner in _inner_jaxprs(p):
                total += count_flops(inner) * times
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    return 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_features


# -- collectives -------------------------------------------------------------------------------------------

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLS = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind: how many run in a step, and bytes.

    ``payload``: of the gathered (or reduced) arrays, as one device holds them; ``traffic``: what one device
    sends on a ring: ``(n - 1) / n`` of the payload, twice that for an all-reduce, all of it for a permutation.
    """

    kind: str
    count: int
    payload: float
    traffic: float


def collectives(hlo: str) -> list[Collective]:
    """Collectives of a compiled program (its HLO text), each counted as often as its loop runs."""
    computations, entry = _parse(hlo)
    sums: dict[str, list[float]] = {}
    for (kind, _), (times, payload, group) in _collective_calls(computations, entry).items():
        if group > 1:
            share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
            share = 1 if kind == "collective-permute" else share
            total = sums.setdefault(kind, [0, 0.0, 0.0])
            for i, x in enumerate((times, times * payload, times * payload * share)):
                total[i] += x
    return [Collective(kind, int(sums[kind][0]), *sums[kind][1:]) for kind in _KINDS if kind in sums]


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":  # other lines at the margin continue a kernel's metadata
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _collective_calls(
    computations: dict[str, list[_Instruction]], entry: str
) -> dict[tuple[str, str], tuple[float, float, int]]:
    """``{(kind, channel): (times, payload, group size)}``.

    An asynchronous collective stands in the text up to three times, under one channel.
    """
    times = _multiplicities(computations, entry)
    found: dict[tuple[str, str], tuple[float, float, int]] = {}
    for name, instructions in computations.items():
        for i in instructions:
            kind = i.op.removesuffix("-start")
            if kind not in _KINDS or not times.get(name):
                continue
            group = _group_size(i.rest)
            payload = sum(_bytes(*a) for a in _ARRAY.findall(i.type))
            if i.op in ("all-gather-start", "reduce-scatter-start"):
                payload *= group / (group + 1)  # a start returns parts and wholes: one of each
            elif i.op == "collective-permute-start":
                # What is sent, what is received, and counters.
                payload = sum(_bytes(*a) for a in _ARRAY.findall(i.type) if a[1]) / 2
            elif kind == "reduce-scatter":
                payload *= group
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the TPU compiler's fusion of an all-reduce and a slice
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = (kind, channel[1] if channel else f"{name}/{i.name}")
            if times[name] > found.get(key, (0,))[0]:
                found[key] = (times[name], payload, group)
    return found


def _multiplicities(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs in one step (of a conditional's branches: each as if taken)."""
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, n: float) -> None:
        times[name] += n
        for i in computations.get(name, ()):
            called = _CALLS.findall(i.rest)
            for group in _BRANCHES.findall(i.rest):
                called += [("branch", b.strip().lstrip("%")) for b in group.split(",")]
            loops = _trip_count(i, computations) if i.op == "while" else 1
            for _, inner in called:
                visit(inner, n * loops)

    visit(entry, 1)
    return times


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Of a counted loop: stated by the compiler, or the constant that its condition compares with; else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = dict(_CALLS.findall(loop.rest)).get("condition", "")
    constants = [i.rest for i in computations.get(condition, ()) if i.op == "constant"]
    if len(constants) == 1 and (number := re.match(r"(\d+)\)", constants[0])):
        return int(number[1])
    return 1


def _group_size(attributes: str) -> int:
    """Devices that take part in one collective, from any of the three spellings of ``replica_groups``."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs" in attributes else 1


def _bytes(dtype: str, shape: str) -> float:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    return bits / 8 * float(np.prod([int(n) for n in shape.split(",") if n]))

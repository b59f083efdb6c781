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

    @property
    def total(self) -> float:
        return self.dense + self.kernels

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
            total += Flops(0.0, body.total * math.prod(p["grid_mapping"].grid))
        elif name == "cond":
            branches = [count_flops(b.jaxpr) for b in p["branches"]]
            total += max(branches, key=lambda f: f.total)
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

SLICED = "all-reduce, sliced"
"""Kind of a sum of which every device keeps its own slice: what the TPU compiler makes of a reduce-scatter over all of
a plane of 8 x 8 or more, also of one that is written as such (``jax.lax.psum_scatter``)."""

_KINDS = ("all-gather", "reduce-scatter", SLICED, "all-reduce", "all-to-all", "collective-permute")
_RINGS = {"all-reduce": 2, SLICED: 2}
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
    times = _multiplicities(computations, entry)
    sums: dict[str, list[float]] = {}
    for name, instructions in computations.items():
        if not times.get(name) or _is_later_piece(name, instructions):
            continue
        for kind, payload, group in _collectives_of(name, computations):
            if group > 1:
                share = 1 if kind == "collective-permute" else _RINGS.get(kind, 1) * (group - 1) / group
                total = sums.setdefault(kind, [0, 0.0, 0.0])
                for i, x in enumerate((1, payload, payload * share)):
                    total[i] += times[name] * x
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


def _is_later_piece(name: str, instructions: list[_Instruction]) -> bool:
    """Whether a computation goes on with, or ends, a collective that another one starts (the TPU compiler's)."""
    done = any('"AsyncCollectiveDone"' in i.rest for i in instructions)
    return done or name.startswith("async_collective_fusion")


def _collectives_of(
    name: str, computations: dict[str, list[_Instruction]]
) -> Iterator[tuple[str, float, int]]:
    """``(kind, payload, group size)`` of the collectives in a computation."""
    for i in computations[name]:
        kind = i.op.removesuffix("-start")
        if kind not in _KINDS:
            continue
        group = _group_size(i.rest)
        arrays = [_bytes(*a) for a in _ARRAY.findall(i.type)]
        if i.op in ("all-gather-start", "reduce-scatter-start"):
            yield kind, sum(arrays) * group / (group + 1), group  # parts and wholes: one of each
        elif i.op == "collective-permute-start":
            # What is sent, what is received, and counters.
            yield kind, sum(_bytes(*a) for a in _ARRAY.findall(i.type) if a[1]) / 2, group
        elif kind == "reduce-scatter":
            yield kind, sum(arrays) * group, group
        elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # The TPU compiler's fusion of an all-reduce and a slice.
            yield "reduce-scatter", sum(arrays), group
        elif kind == "all-reduce":
            sliced = [_is_sliced(value, name, computations) for value in _values(i, computations[name])]
            for part, now in ((SLICED, True), (kind, False)):
                if now in sliced:
                    yield part, sum(a for a, s in zip(arrays, sliced, strict=True) if s == now), group
        else:
            yield kind, sum(arrays), group


def _values(i: _Instruction, computation: list[_Instruction]) -> list[str]:
    """Names of what an instruction gives: its own, or of the elements that are taken from its tuple ("" if none)."""
    if not i.type.startswith("("):
        return [i.name]
    taken = {}
    for user in computation:
        if user.op == "get-tuple-element" and _operands(user) == [i.name]:
            taken[int(re.search(r"index=(\d+)", user.rest)[1])] = user.name  # type: ignore[index]
    return [taken.get(n, "") for n in range(len(_ARRAY.findall(i.type)))]


def _is_sliced(value: str, name: str, computations: dict[str, list[_Instruction]]) -> bool:
    """Whether all that a computation does with a value is to take a slice of it."""
    users = [i for i in computations[name] if value in _operands(i)]
    for user in users:
        if user.op == "fusion":
            inner = dict(_CALLS.findall(user.rest))["calls"]
            number = f"{_operands(user).index(value)})"
            argument = next(
                i.name for i in computations[inner] if i.op == "parameter" and i.rest.startswith(number)
            )
            sliced = _is_sliced(argument, inner, computations)
        elif user.op in ("bitcast", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose"):
            sliced = _is_sliced(user.name, name, computations)
        else:
            sliced = user.op == "dynamic-slice"
        if not sliced:
            return False
    return bool(users)


def _operands(i: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", i.rest.partition(")")[0])


def _multiplicities(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs in one step (of a conditional's branches: each as if taken)."""
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, n: float) -> None:
        times[name] += n
        for i in computations.get(name, ()):
            called = _CALLS.findall(i.rest)
            for group in _BRANCHES.findall(i.rest):
                called += [("branch", b.strip().lstrip("%")) for b in group.split(",")]
            loops = _trip_count(i, computations[name], computations) if i.op == "while" else 1
            for _, inner in called:
                visit(inner, n * loops)

    visit(entry, 1)
    return times


def _trip_count(
    loop: _Instruction, around: list[_Instruction], computations: dict[str, list[_Instruction]]
) -> int:
    """Of a counted loop: stated by the compiler, or from its counter's start to the constant that the condition
    compares it with; else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations.get(dict(_CALLS.findall(loop.rest)).get("condition", ""), [])
    constants = [n for i in condition if (n := _constant(i)) is not None]
    return constants[0] - _counter_start(loop, around) if len(constants) == 1 else 1


def _counter_start(loop: _Instruction, around: list[_Instruction]) -> int:
    """The first number that a loop carries is its counter: 0, or 1 where the compiler took the first round out."""
    found = {i.name: i for i in around}
    at: _Instruction | None = loop
    while at is not None and at.op in ("while", "tuple", "copy"):
        at = found.get(_operands(at)[0]) if _operands(at) else None
    return (None if at is None else _constant(at)) or 0


def _constant(i: _Instruction) -> int | None:
    """The value of an integer constant."""
    number = re.match(r"(\d+)\)", i.rest)
    return int(number[1]) if i.op == "constant" and number else None


def _group_size(attributes: str) -> int:
    """Devices that take part in one collective, from any of the three spellings of ``replica_groups``."""
    # Between sizes and axes may stand the order of devices: "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}".
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
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

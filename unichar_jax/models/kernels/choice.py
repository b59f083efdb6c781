"""``auto`` on a GPU: the fastest kernel that is right on this card, found by trying.

Each candidate computes a small ragged row, forward and backward, and is compared with dense attention in float32;
then it is compiled for a row of the run's own size, and timed there if its memory fits. What fails, differs or does
not fit is left out, and said with the reason. It takes at most half a minute, once: choices are remembered on disk
by device, version of jax, source of the kernels and size, and a run keeps its own. Process 0 decides for all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.model import DecoderConfig
from unichar_jax.files import digest, write_text
from unichar_jax.models import kernels
from unichar_jax.models.kernels.sharded import device_kind, platform
from unichar_jax.models.streams import TokenMeta
from unichar_jax.parallel import distributed
from unichar_jax.parallel.mesh import make_mesh

_log = logging.getLogger(__name__)

CANDIDATES = ("flash", "cudnn", "reference")
LAST_RESORT = "chunked"
SECONDS = 30.0
"""After these no further candidate is tried."""

_RAGGED = (
    (("text", 37), ("clean", 33), ("text", 11), ("noised", 25), ("text", 7), ("noised", 16)),
    (("noised", 25),),
    (("text", 9),),
)


@dataclass(frozen=True)
class Case:
    """What is asked of attention: its heads, and the length of a row."""

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    dtype: str


@dataclass(frozen=True)
class Trial:
    """One candidate: its error as a multiple of dense attention's in the same dtype, its time and memory (temporaries,
    bytes) at the real size, forward and backward; ``out`` says why it was left out, and is empty if it was not."""

    kernel: str
    error: float | None = None
    milliseconds: float | None = None
    memory: int | None = None
    out: str = ""

    def __str__(self) -> str:
        return (
            f"{self.kernel} left out: {self.out}" if self.out else f"{self.kernel} {self.milliseconds:.2f} ms"
        )


@dataclass(frozen=True)
class Choice:
    """The kernel taken for a case on a device, and what was tried."""

    kernel: str
    device: str
    case: Case
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        tried = "; ".join(map(str, self.trials))
        return f"{self.kernel} on {self.device}, rows of {self.case.length:,} tokens ({tried})"

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Choice:
        """From ``dataclasses.asdict`` of one; raises TypeError or KeyError if it is of another version."""
        trials = tuple(Trial(**trial) for trial in fields["trials"])
        return cls(fields["kernel"], fields["device"], Case(**fields["case"]), trials)


def row(documents: Sequence[Sequence[tuple[str, int]]], length: int = 0) -> TokenMeta:
    """Metadata ``[1, L]`` of documents made of spans (text, clean or noised; tokens), and padding up to ``length``."""
    tokens = [
        (segment, 0 if kind == "text" else block, kind == "noised")
        for segment, spans in enumerate(documents, start=1)
        for block, (kind, n) in enumerate(spans, start=1)
        for _ in range(n)
    ]
    segment, block, noisy = np.pad(np.array(tokens, np.int32).T, ((0, 0), (0, max(0, length - len(tokens)))))
    order = np.arange(len(segment)) - np.searchsorted(segment[: len(tokens)], segment)
    order = np.where(segment > 0, order, 0)
    return TokenMeta(*(np.asarray(x, np.int32)[None] for x in (segment, order, order, block, noisy)))


def find(
    case: Case,
    candidates: Mapping[str, kernels.Kernel] | None = None,
    *,
    room: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Tries the candidates (default: ``CANDIDATES``) on the default device; ``room`` is for temporaries, in bytes."""
    candidates = candidates or {name: kernels.KERNELS[name] for name in CANDIDATES}
    began, trials = clock(), []
    for name, kernel in candidates.items():
        if clock() - began > SECONDS:
            trials.append(Trial(name, out=f"{SECONDS:.0f} s had passed"))
            continue
        try:
            trials.append(_try(name, kernel, case, room, clock))
        except Exception as error:  # whatever a compiler or a card says is a reason to take another kernel
            trials.append(
                Trial(name, out=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            )
    for trial in trials:
        if trial.out:
            _log.warning("attention kernel %s", trial)
    right = [t for t in trials if not t.out]
    kernel = min(right, key=lambda t: t.milliseconds).kernel if right else LAST_RESORT
    return Choice(kernel, device_kind(), case, tuple(trials))


def _try(name: str, kernel: kernels.Kernel, case: Case, room: float, clock: Callable[[], float]) -> Trial:
    if reason := kernel.unsupported(platform()):
        return Trial(name, out=reason)
    error = deviation(kernel, case)
    if not error <= 2:
        return Trial(name, error, out=f"its error is {error:.1f} times that of dense attention")
    program, meta, inputs = compiled_at_size(kernel, case)
    memory = program.memory_analysis().temp_size_in_bytes
    if memory > room:
        return Trial(
            name, error, None, memory, f"needs {memory / 2**30:.1f} GiB, {room / 2**30:.1f} are free"
        )
    seconds = []
    for _ in range(4):  # the first one warms up
        start = clock()
        jax.block_until_ready(program(meta, *inputs))
        seconds.append(clock() - start)
    return Trial(name, error, 1e3 * min(seconds[1:]), memory)


def compiled_at_size(kernel: kernels.Kernel, case: Case) -> tuple[Any, TokenMeta, list[jax.Array]]:
    """Forward and backward of one row, compiled, and its arguments: one document whose last image is noised."""
    text, vit = case.length // 4, case.length * 5 // 12
    meta = row([[("text", text), ("clean", vit), ("noised", case.length - text - vit)]])
    inputs = _inputs(case, meta)
    return jax.jit(functools.partial(_both, kernel)).lower(meta, *inputs).compile(), meta, inputs


def deviation(kernel: kernels.Kernel, case: Case) -> float:
    """Error of the output and the gradients on a small ragged row, beside that of dense attention in the same dtype:
    the largest quotient of the four. Infinite where something is no number."""
    meta = row(_RAGGED, 176)
    inputs = _inputs(case, meta)
    dense = kernels.KERNELS["reference"]
    with jax.default_matmul_precision("highest"):
        exact = _run(dense, meta, [x.astype(jnp.float32) for x in inputs])
        found, usual = _run(kernel, meta, inputs), _run(dense, meta, inputs)
    quotients = []
    for x, y, z in zip(found, usual, exact, strict=True):
        floor = max(np.linalg.norm(y - z), 1e-5 * np.linalg.norm(z))
        quotients.append(np.linalg.norm(x - z) / floor)
    return float(np.nan_to_num(max(quotients), nan=np.inf)) if np.isfinite(quotients).all() else float("inf")


def _inputs(case: Case, meta: TokenMeta) -> list[jax.Array]:
    """q, k, v and the output's gradient for a row."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [
        jax.random.normal(key, (*meta.shape, n, case.head_dim), case.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def _both(kernel: kernels.Kernel, meta: TokenMeta, q, k, v, g) -> tuple[jax.Array, ...]:
    out, backward = jax.vjp(functools.partial(kernel.run, kernel.prepare(meta, meta)), q, k, v)
    return out, *backward(g)


def _run(kernel: kernels.Kernel, meta: TokenMeta, inputs: Sequence[jax.Array]) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in jax.jit(functools.partial(_both, kernel))(meta, *inputs)]


# -- what is settled and remembered -------------------------------------------------------------------------


def settle(compute: Compute, model: DecoderConfig, length: int, record: Path | None = None) -> None:
    """Decides what ``auto`` stands for in this process, where that is a matter of trying: on GPUs.

    Args:
      compute: decides nothing unless its kernel is ``auto``.
      model: whose heads.
      length: tokens of a row.
      record: a run's file; its choice is taken again on the same kind of device, and written where there is none.
    """
    if compute.attention != "auto" or platform() not in ("gpu", "cuda"):
        return
    case = Case(model.num_heads, model.num_kv_heads, model.head_dim, length, compute.dtype)
    names, choice = list(kernels.KERNELS), None
    if distributed.is_leader():
        kept = remembered(record).get("run") if record else None
        choice = kept if kept and kept.device == device_kind() else choose(case)
        if record:
            _write(record, {"run": choice})
    index = distributed.from_leader("attention", names.index(choice.kernel) if choice else 0)
    kernels.settle(names[index], str(choice) if choice else "process 0 tried")


def choose(case: Case) -> Choice:
    """``find`` once for a device, a version and a case."""
    key, known = _key(case), remembered()
    if key not in known:
        # Half of the device's memory: weights and activations want the rest.
        stats = jax.local_devices()[0].memory_stats() or {}
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):  # other processes are elsewhere
            known[key] = find(case, room=stats.get("bytes_limit", float("inf")) / 2)
        _write(memory_file(), known)
    return known[key]


def memory_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(home) / "unichar-jax" / "attention.json"


def remembered(file: Path | None = None) -> dict[str, Choice]:
    """Choices on disk by their key; none where the file is absent or of another version."""
    try:
        return {k: Choice.of(v) for k, v in json.loads((file or memory_file()).read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(file: Path, choices: Mapping[str, Choice]) -> None:
    try:
        write_text(file, json.dumps({k: dataclasses.asdict(v) for k, v in choices.items()}, indent=1))
    except OSError as error:
        _log.warning("the choice of an attention kernel is not remembered: %s", error)


def _key(case: Case) -> str:
    """What a choice depends on: device, jax, the kernels' source, and the case."""
    sources = digest(*(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))[:12]
    return f"{device_kind()} | jax {jax.__version__} | kernels {sources} | {case}"

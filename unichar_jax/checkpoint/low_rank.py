"""From two full checkpoints to adapters: the low-rank part of what a fine-tune changed.

Each projection's change ``D = W_finetune - W_base`` is replaced by the nearest product of rank r in the
Frobenius norm, its truncated singular value decomposition. Both checkpoints stream, of either kind and in any
dtype; in memory are one change in float32 with its factors, and the adapters so far, which are the result.
What changed but is no projection of an expert (norms, biases, embeddings, towers) has no low-rank form here:
it is reported, and kept whole if asked for.

Nothing is said without its price: for every array the report gives how much changed, and the share of it that
is lost.

Sources: Eckart and Young (1936) for the nearest product; randomised range finding with power iterations for
large matrices, Halko, Martinsson and Tropp (arXiv 0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unichar_jax.checkpoint import convert, peft_names, runs, store, writing
from unichar_jax.checkpoint import footing as footing_lib
from unichar_jax.checkpoint import lora as lora_file
from unichar_jax.checkpoint import weights as weights_lib
from unichar_jax.checkpoint.arrays import bits, row_blocks
from unichar_jax.checkpoint.weights import MODEL, ArrayInfo, Weights
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import lora, params
from unichar_jax.models.unified import UnifiedModel

Keep = Literal["none", "vectors", "all"]

_EXACT = 1024  # smaller side up to which the exact decomposition is quick
_OVERSAMPLE, _POWER = 16, 2


@dataclass(frozen=True)
class Row:
    """What became of one array that changed.

    Attributes:
      name: on disk.
      kept: "low-rank", "whole" or "left out".
      change: Frobenius norm of the change.
      base: Frobenius norm of the base's array.
      lost: Frobenius norm of what is not kept of the change.
    """

    name: str
    kept: str
    change: float
    base: float
    lost: float

    @property
    def relative_loss(self) -> float:
        """Share of the change that is lost, in [0, 1]."""
        return self.lost / self.change


@dataclass(frozen=True)
class Report:
    """What became of every array that changed."""

    rows: tuple[Row, ...]

    @property
    def relative_loss(self) -> float:
        """Share of the whole change that is lost, in the Frobenius norm."""
        change = math.hypot(*(r.change for r in self.rows))
        return math.hypot(*(r.lost for r in self.rows)) / change if change else 0.0


def truncated_svd(x: np.ndarray, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``a [m, rank]`` and ``b [rank, n]`` whose product is x's best approximation, float32.

    Exact where the smaller side is at most 1024 or not much larger than the rank; else randomised, which for
    changes of weights (falling spectra) is within a fraction of a percent of the best.
    """
    x = np.asarray(x, np.float32)
    small, sketch = min(x.shape), rank + _OVERSAMPLE
    if small <= _EXACT or 2 * sketch >= small:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
    else:
        draws = np.random.default_rng(seed).standard_normal((x.shape[1], sketch), np.float32)
        q = np.linalg.qr(x @ draws)[0]
        for _ in range(_POWER):
            q = np.linalg.qr(x.T @ q)[0]
            q = np.linalg.qr(x @ q)[0]
        u, s, vt = np.linalg.svd(q.T @ x, full_matrices=False)
        u = q @ u
    root = np.sqrt(s[:rank])
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    missing = rank - len(root)  # a small model's matrix may have fewer singular values
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def difference(
    finetune: str | Path,
    base: str | Path,
    dst: str | Path,
    rank: int,
    *,
    keep: Keep = "vectors",
    dtype: Any = np.float32,
    item: str | None = None,
    character: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Writes the adapters that turn ``base`` into nearly ``finetune``, as a folder of ``checkpoint.lora``.

    Args:
      finetune, base: BAGEL directories, safetensors files (``finetune``), model directories, runs or steps,
        in any combination.
      dst: the folder to write.
      rank: of the adapters.
      keep: what to keep whole of the rest that changed: nothing, vectors (norms and biases, some megabytes
        for BAGEL), or all.
      dtype: of the adapters on disk; the report counts its rounding.
      item: of the fine-tune, if it is a training step.
      character: who the adapters play.
      on_progress: called with the bytes of the base that are done, and all of them.

    Raises:
      UserError: models of different sizes, equal models, a rank that is none, or weights that are not finite.
    """
    writing.check_destination(Path(dst), 0)
    cfg, old, new = _open(Path(finetune), Path(base), Path(dst), item)
    kernels = {e.ours for e in peft_names.projections(cfg).values()}
    most = max(min(old.infos[n].shape) for n in kernels)
    if not 1 <= rank <= most:
        raise UserError(f"rank: expected 1 to {most} for this model, got {rank}.")
    total, done = sum(map(weights_lib.array_bytes, old.infos.values())), 0
    rows: list[Row] = []
    adapters: dict[str, np.ndarray] = {}
    names = list(old.infos)
    for (name, x), (_, y) in zip(old.read(names), new.read(names), strict=True):
        row, pair = _approximate(name, x, y, rank if name in kernels else 0, dtype)
        if row is not None:
            rows.append(row)
        if pair is not None:
            stem = name.removesuffix(".kernel")
            adapters |= {f"{stem}.{leaf}": x for leaf, x in zip((lora.A, lora.B), pair, strict=True)}
        done += weights_lib.array_bytes(old.infos[name])
        if on_progress is not None:
            on_progress(done, total)
    if not adapters:
        raise UserError(
            f"{finetune} and {base}: no projection of the experts differs, so there is nothing to make adapters of."
        )
    kept = _to_keep(cfg, new, {r.name for r in rows if r.name not in kernels}, keep)
    whole = (kept, new.read(list(kept))) if kept else None
    footing = footing_lib.of_weights(old, cfg)
    lora_file.save(dst, adapters, cfg, base=str(base), footing=footing, whole=whole, character=character)
    settled = (replace(r, kept="whole", lost=0.0) if r.name in kept else r for r in rows)
    return Report(tuple(settled))


def _open(finetune: Path, base: Path, dst: Path, item: str | None) -> tuple[ModelConfig, Weights, Weights]:
    """Both sides under the same names and of the same shapes."""
    base = runs.find(base)
    cfg = store.load_config(base)
    stored = weights_lib.open_weights(base, cfg, MODEL, runs.weights_item(base), adapters=True)
    old = lora_file.merged(stored)
    if finetune.is_dir():
        finetune = runs.resolve(finetune)
        item = item or runs.weights_item(finetune)
    new = convert.plan(finetune, dst, base=base, item=item).parts[0].weights
    shape = lambda weights, n: list(weights.infos[n].shape) if n in weights.infos else "nothing"  # noqa: E731
    different = [
        f"{n}: {shape(new, n)} and {shape(old, n)}"
        for n in dict.fromkeys([*old.infos, *new.infos])
        if shape(new, n) != shape(old, n)
    ]
    if different:
        raise UserError(
            f"{finetune} and {base} are models of different sizes ({len(different)} arrays, the first is"
            f" {different[0]}). Name the base that the fine-tune started from."
        )
    return cfg, old, new


def _approximate(
    name: str, x: np.ndarray, y: np.ndarray, rank: int, dtype: Any
) -> tuple[Row | None, tuple[np.ndarray, np.ndarray] | None]:
    """The row of one array and, if ``rank`` is not 0, its factors; None for an array that is the same."""
    if x.dtype == y.dtype and np.array_equal(bits(x), bits(y)):
        return None, None
    change = _norm(y[i].astype(np.float32) - x[i].astype(np.float32) for i in row_blocks(x.shape))
    if not math.isfinite(change):
        raise UserError(f"{name}: the two checkpoints differ by a value that is not finite; one is damaged.")
    if change == 0:
        return None, None
    norm = _norm(x[i].astype(np.float32) for i in row_blocks(x.shape))
    if not rank:
        return Row(name, "left out", change, norm, change), None
    d = y.astype(np.float32)
    d -= x
    a, b = (f.astype(dtype) for f in truncated_svd(d, rank))
    p, q = a.astype(np.float32), b.astype(np.float32)  # as they will be read
    lost = _norm(d[i] - p[i] @ q for i in row_blocks(d.shape))
    return Row(name, "low-rank", change, norm, lost), (a, b)


def _norm(blocks: Iterator[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(b).sum(dtype=np.float64)) for b in blocks))


def _to_keep(cfg: ModelConfig, weights: Weights, changed: set[str], keep: Keep) -> dict[str, ArrayInfo]:
    """What is kept whole, in the order of the model: all layers of an array if one of them changed."""
    out: dict[str, ArrayInfo] = {}
    for name, spec in params.named_leaves(UnifiedModel(cfg)):
        names = params.stored_names(name, spec)
        wanted = keep == "all" or (keep == "vectors" and len(params.one_layer(spec).shape) == 1)
        if wanted and not changed.isdisjoint(names):
            out |= {n: weights.infos[n] for n in names}
    return out

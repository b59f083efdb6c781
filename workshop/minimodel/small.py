"""What the small models of the mini world share in training: drawn pictures on disk, and one resumable loop.

``picture_pool`` draws pictures once and finds them again. ``fit`` trains flat weights ``{name: array}``
on a budget of minutes: the schedule follows training time rather than steps, so that a machine of any
speed ends its cosine when asked to. Every few minutes it writes its state (complete or not at all) and a
line of the log; called again with the same folder it goes on. One process, every device of it; the
unified model has its own loop (``loop.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unichar_jax.errors import UserError
from unichar_jax.files import replacing
from workshop import miniworld
from workshop.miniworld.cast import sample_look
from workshop.miniworld.draw import draw
from workshop.miniworld.world import ATTRIBUTES, attributes, random_look, sample_scene

Weights = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# -- pictures ----------------------------------------------------------------------------------------------

_DRAWING_CODE = ("world", "anatomy", "creature", "outfit", "pen", "places", "draw", "cast")


class Pool(NamedTuple):
    """Drawn pictures, uint8 ``[N, S, S, 3]`` (memory-mapped), and classes ``[N, 10]`` as ``ATTRIBUTES``."""

    pictures: np.ndarray
    labels: np.ndarray


def picture_pool(
    folder: Path, count: int, seed: int, *, scenes: int = 1, size: int = 96, all_looks: bool = False
) -> Pool:
    """Draws ``count`` pictures of unnamed characters once, and finds them again afterwards.

    Each character is drawn in ``scenes`` pictures that follow one another. ``all_looks``: those near the named
    cast's too, for who only reads. The file name carries a digest of the drawing code, so that a changed drawing
    is never mixed with an old pool.
    """
    sources = [Path(miniworld.__file__).with_name(f"{name}.py") for name in _DRAWING_CODE]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:8]
    stem = f"{digest}-{size}px-{count}-seed{seed}" + (f"-scenes{scenes}" if scenes > 1 else "")
    new_look, stem = (random_look, f"{stem}-all") if all_looks else (sample_look, stem)
    pictures, labels = folder / f"{stem}.pictures.npy", folder / f"{stem}.labels.npy"
    if not labels.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{stem}.{os.getpid()}.npy"
        drawn = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        classes = np.empty((count, len(ATTRIBUTES)), np.int32)
        rng = np.random.default_rng(seed)
        look = new_look(rng)
        for i in range(count):
            if i % scenes == 0 and i > 0:
                look = new_look(rng)
            scene = sample_scene(rng)
            drawn[i] = draw(look, scene, size)
            classes[i] = list(attributes(look, scene).values())
        drawn.flush()
        partial.rename(pictures)
        np.save(labels, classes)
    return Pool(np.load(pictures, mmap_mode="r"), np.load(labels))


def to_float(pictures: Any) -> Any:
    """uint8 pixels to float32 in [-1, 1]; numpy or JAX."""
    return pictures.astype(np.float32) / 127.5 - 1.0


def to_pixels(images: np.ndarray | jax.Array) -> np.ndarray:
    """Images in [-1, 1] (overshoot is clipped) to uint8 pixels."""
    return np.asarray(np.clip(np.round((np.asarray(images) + 1.0) * 127.5), 0, 255), np.uint8)


# -- state -------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """Everything that a resumed run needs. Weights are flat dictionaries: a step then costs little Python."""

    weights: Weights
    average: Weights
    """Moving average of the weights: what is measured and published."""
    optimizer: Any
    step: jax.Array
    seconds: jax.Array
    """Training time so far."""


def _muon_dimensions(weights: dict[str, Any]) -> dict[str, Any]:
    """Which arrays Muon updates, as matrices [inputs, outputs]: kernels, but those next to pixels.

    Anything else gets Adam.
    """

    def dimensions(name: str, x: Any) -> Any:
        # optax also asks with masked placeholders in the place of what is not Muon's.
        if not name.endswith(".kernel") or not hasattr(x, "ndim") or 3 in x.shape[-2:]:
            return None
        stacked = (0,) if ".layers." in f".{name}" else ()
        inputs = tuple(range(len(stacked), x.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, x.ndim - 1)

    return {name: dimensions(name, x) for name, x in weights.items()}


# Muon's updates are given Adam's size (rms 0.2), so that one learning rate serves both.
_OPTIMIZER = optax.contrib.muon(
    1.0, adam_b2=0.99, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_dimensions
)


def fresh_state(weights: Weights) -> TrainState:
    """A state at step 0 whose average is the weights themselves."""
    average = jax.tree.map(jnp.copy, weights)
    return TrainState(weights, average, _OPTIMIZER.init(weights), jnp.zeros((), jnp.int32), jnp.zeros(()))


def save_state(path: Path, state: TrainState) -> None:
    """Writes a state as one npz, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as made, made.open("wb") as file:
        np.savez(file, *[np.asarray(leaf) for leaf in jax.tree.leaves(state)])


def load_state(path: Path, like: TrainState) -> TrainState:
    """Reads what ``save_state`` wrote into the structure of ``like``; the shapes must agree."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(like)
    with np.load(path) as file:
        arrays = [file[name] for name in file.files]
    if [a.shape for a in arrays] != [tuple(leaf.shape) for leaf in leaves]:
        raise UserError(
            f"{path}: was written by a run of another model or version ({len(arrays)} arrays; expected"
            f" {len(leaves)} of this model's shapes). Remove the file to start again."
        )
    return treedef.unflatten([jnp.asarray(a) for a in arrays])


# -- the loop ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long and how fast to train, and where to keep the state.

    Attributes:
      work: folder of ``state.npz`` and ``log.jsonl``.
      minutes: training time; evaluation and compilation are not counted.
      learning_rate: its peak; 100 steps of warmup, then a cosine to 1 % at the end of the time.
      average: decay of the moving average, once there are enough steps.
      report_minutes: time between checkpoints, log lines and evaluations.
      seed: of batches and noise; both are functions of it and the step.
      frozen: prefix of the names that are not trained, or "".
    """

    work: Path
    minutes: float
    learning_rate: float = 2e-3
    average: float = 0.999
    report_minutes: float = 2.0
    seed: int = 0
    frozen: str = ""

    def rate_at(self, step: int, progress: float) -> float:
        """The learning rate of a step, ``progress`` in [0, 1] being the share of the time that is spent."""
        cosine = 0.01 + 0.99 * 0.5 * (1.0 + np.cos(np.pi * min(progress, 1.0)))
        return self.learning_rate * min(1.0, (step + 1) / 100) * float(cosine)


def make_step(
    budget: Budget, loss_fn: Callable[[Weights, Any, jax.Array], tuple[jax.Array, Metrics]]
) -> Callable[[TrainState, Any, float], tuple[TrainState, Metrics]]:
    """The compiled step ``(state, batch, learning rate) -> (state, metrics)``; the state is given away."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Any, rate: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(budget.seed), state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.weights, batch, key)
        updates, optimizer = _OPTIMIZER.update(grads, state.optimizer, state.weights)
        weights = {
            name: w if budget.frozen and name.startswith(budget.frozen) else w + rate * updates[name]
            for name, w in state.weights.items()
        }
        # The average forgets its start quickly: its window grows with the steps up to 1 / (1 - average).
        keep = jnp.minimum(budget.average, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, w: a + (1.0 - keep) * (w - a), state.average, weights)
        return TrainState(weights, average, optimizer, state.step + 1, state.seconds), metrics

    return step


def fit(
    budget: Budget,
    weights: Weights,
    loss_fn: Callable[[Weights, Any, jax.Array], tuple[jax.Array, Metrics]],
    batch_fn: Callable[[np.random.Generator, float], Any],
    evaluate: Callable[[Weights], dict[str, float]],
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Trains, or resumes, until the budget is spent.

    Args:
      budget: see there.
      weights: where to start if ``budget.work`` has no state.
      loss_fn: ``(weights, batch, key) -> (loss, metrics)``; metrics are scalars, logged as means.
      batch_fn: ``(generator of this step, progress) ->`` a tree of arrays with a leading batch dimension,
        which as many devices share as divide it.
      evaluate: measures the averaged weights at every report.
      clock: seconds.

    Returns:
      The last state, on the first device.
    """
    budget.work.mkdir(parents=True, exist_ok=True)
    state_path, log_path = budget.work / "state.npz", budget.work / "log.jsonl"
    state = fresh_state(weights)
    if state_path.exists():
        state = load_state(state_path, state)
    # Two simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=2) make better use of two cores.
    rows = len(jax.tree.leaves(batch_fn(np.random.default_rng(0), 0.0))[0])
    mesh = Mesh(np.array(jax.devices()[: math.gcd(rows, jax.device_count())]), ("data",))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("data"))
    step_fn = make_step(budget, loss_fn)

    step, seconds, whole = int(state.step), float(state.seconds), 60 * budget.minutes
    history: list[Metrics] = []
    compiled: set[str] = set()
    reported = seconds
    while seconds < whole:
        began, progress = clock(), seconds / whole
        rate = budget.rate_at(step, progress)
        batch = batch_fn(np.random.default_rng((budget.seed, step)), progress)
        # Waited for: the budget counts time, and simulated devices that share few cores may not run ahead.
        state, metrics = jax.block_until_ready(step_fn(state, jax.device_put(batch, split), rate))
        history.append(metrics)
        step += 1
        shapes = str(jax.tree.map(np.shape, batch))
        if shapes in compiled:  # the first step of its shapes was compiling: that is not training time
            seconds += clock() - began
        compiled.add(shapes)
        if seconds - reported > 60 * budget.report_minutes or seconds >= whole:
            state = state._replace(seconds=jnp.float32(seconds))
            save_state(state_path, state)
            means = jax.tree.map(lambda *values: float(np.mean(values)), *history)
            measured = evaluate(jax.device_put(state.average, jax.devices()[0]))
            record = {"step": step, "minutes": seconds / 60, "learning_rate": rate, **means, **measured}
            line = json.dumps({name: _rounded(value) for name, value in record.items()})
            with log_path.open("a") as log:
                log.write(line + "\n")
            print(line, flush=True)
            history, reported = [], seconds
    return jax.device_put(state, jax.devices()[0])


def _rounded(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.5g}")

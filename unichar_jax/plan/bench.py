"""The speed of the training step: timed on the devices that are here, or what can be checked without any.

The step is the one that training runs; weights are random and a row is full, because neither values nor the
story of a batch change the time. Without hardware a record says what the compiled program holds: executed
over useful work, the share that is recomputed, bytes of collectives against the links. Records are kept in
one JSON file for each kind of device; the tables in the documents are made from these files
(``scripts/performance_table.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unichar_jax.config.model import ModelConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.models import params
from unichar_jax.models.streams import Batch, LatentStream, TextStream, TokenMeta, VitStream
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.parallel.chips import device_name, peak_flops
from unichar_jax.plan.sft import NUM_TASKS, Plan, assumed_capacities
from unichar_jax.plan.workload import Workload
from unichar_jax.training import state as state_lib
from unichar_jax.training.metrics import USEFUL
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.start import declare
from unichar_jax.training.step import jit_step

Record = dict[str, Any]

WARM_UP = 2
"""Steps before the clock starts, after compilation."""


def full_batch(cfg: ModelConfig, capacities: tuple[int, int, int], rows: int) -> Batch:
    """Host arrays of ``rows`` full rows, each one document: causal text, an image that is looked at, and a
    noised image; every text token is labelled."""
    rng = np.random.default_rng(0)
    t, v, n = capacities

    def ints(length: int, values: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, np.int32), (rows, length)).copy()

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((rows, *shape), np.float32)

    def meta(length: int, first: int, block: int) -> TokenMeta:
        order: np.ndarray = first + np.arange(length)
        position = order if block == 0 else first
        fields: tuple[Any, ...] = (1, order, position, block, block == 2)
        return TokenMeta(*(ints(length, f) for f in fields))

    ids = rng.integers(0, cfg.decoder.vocab_size, (rows, t)).astype(np.int32)
    text = TextStream(ids, meta(t, 0, 0), np.roll(ids, -1, 1), np.ones((rows, t), np.float32), ints(t, 0))
    patches = cfg.vision.max_patches_per_side**2
    vit = VitStream(normal(v, cfg.vision.patch_dim), ints(v, np.arange(v) % patches), meta(v, t, 1))
    moments, cells = normal(n, cfg.latent_dim), ints(n, np.arange(n) % cfg.max_latent_size**2)
    latent = LatentStream(
        moments,
        np.full_like(moments, -3),
        cells,
        np.zeros((rows, n), np.float32),
        meta(n, t + v, 2),
        np.ones((rows, n), np.float32),
        ints(n, 0),
    )
    return Batch(text, vit, latent)


def random_weights(declared: Any, mesh: Mesh) -> Any:
    """Weights of about the usual size, drawn where they are needed: the host never holds them."""
    names = {name: i for i, (name, _) in enumerate(params.named_leaves(declared))}
    key = jax.random.key(0, impl="rbg")  # one instruction of the device for a whole array

    @functools.cache  # a program for each kind of array: one for all of them takes minutes to compile
    def drawer(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[..., jax.Array]:
        draw = lambda key, mean: (mean + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)  # noqa: E731
        return jax.jit(draw, out_shardings=sharding)

    def draw(name: str, spec: params.ArraySpec, sharding: Any) -> jax.Array:
        mean = np.asarray(1 if name.endswith("norm.scale") else 0, spec.dtype)
        return drawer(spec.shape, spec.dtype, sharding)(jax.random.fold_in(key, names[name]), mean)

    return params.map_named(draw, declared, params.shardings(declared, mesh))


def measure(
    cfg: SFTConfig, model: ModelConfig, steps: int, say: Callable[[str], None] = lambda _: None
) -> Record:
    """Times ``steps`` training steps on all devices that are here.

    Returns:
      ``step_seconds`` (the median), ``tokens_per_s`` of one device, ``useful`` FLOPs of a step on all devices
      and ``mfu`` (their share of the devices' peak) where they are defined, ``peak_memory`` in bytes of one
      device where it tells.
    """
    mesh = mesh_lib.make_mesh(cfg.mesh)
    capacities = cfg.data.capacities or assumed_capacities(cfg.data.tokens_per_row)
    rows = mesh_lib.global_batch_size(mesh, cfg.data.rows_per_device) * cfg.accumulate
    declared = declare(cfg, model)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    with jax.set_mesh(mesh):
        weights = random_weights(declared, mesh)
        layout, state = state_lib.create(
            weights,
            declared,
            optimizer,
            trainable=cfg.trainable,
            ema=cfg.optimizer.ema_decay > 0,
            mesh=mesh,
        )
        del weights
        batch = mesh_lib.put_batch(full_batch(model, capacities, rows), mesh)
        say(f"compiling the step of {params.count(declared):,} parameters on {mesh.size} devices")
        began = time.monotonic()
        step = jit_step(cfg, model, layout, optimizer, NUM_TASKS, state, mesh).lower(state, batch).compile()
        compiled = time.monotonic() - began
        seconds: list[float] = []
        metrics: dict[str, jax.Array] = {}
        for i in range(WARM_UP + steps):
            began = time.monotonic()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if i >= WARM_UP:
                seconds.append(time.monotonic() - began)
    median = statistics.median(seconds)
    useful = float(metrics[USEFUL]) if USEFUL in metrics else None
    peak = peak_flops()
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "mark": "measured",
        "chip": device_name(),
        "topology": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "layers": model.decoder.num_layers,
        "capacities": list(capacities),
        "rows": rows,
        "parameters": params.count(declared),
        "steps": steps,
        "compile_seconds": compiled,
        "step_seconds": median,
        "fastest_seconds": min(seconds),
        "tokens_per_s": rows * sum(capacities) / median / mesh.size,
        "useful": useful,
        "mfu": None if useful is None or peak is None else useful / median / peak,
        "peak_memory": memory.get("peak_bytes_in_use"),
        "loss": float(metrics["loss"]),
    }


def compiled(plan: Plan | Workload) -> Record:
    """What a plan tells, without hardware."""
    left_out = ("changes", "seconds")
    return {"mark": "compiled"} | {k: v for k, v in plan.to_dict().items() if k not in left_out}


def report(record: Record) -> str:
    """A measurement in words and numbers."""
    tera = None if record["useful"] is None else record["useful"] / record["step_seconds"] / 1e12
    lines = [
        f"{record['topology']}, mesh {record['mesh']}, {record['layers']} layers,"
        f" {record['parameters']:,} parameters",
        f"step            {record['step_seconds']:10.3f} s (median of {record['steps']}; fastest"
        f" {record['fastest_seconds']:.3f} s, compiled in {record['compile_seconds']:.0f} s)",
        f"tokens          {record['tokens_per_s']:10,.0f} a second and device",
        "useful work     "
        + ("    not defined where one expert learns" if tera is None else f"{tera:10.3f} TFLOP/s"),
        "of the peak     " + (f"{record['mfu']:10.1%}" if record["mfu"] else "    unknown for this device"),
    ]
    if record["peak_memory"]:
        lines.append(f"memory at most  {record['peak_memory'] / 2**30:10.2f} GiB of one device")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What compiled and ran it."""
    import importlib.metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def keep(record: Record, command: str, folder: Path) -> Path:
    """Puts a record into its device's file, in the place of an earlier one of the same command and mark."""
    path = folder / f"{record['chip']}.json"
    record = {"command": command} | record | {"versions": versions()}
    record = json.loads(json.dumps(record, default=dataclasses.asdict))

    def key(r: Record) -> tuple[str, str]:
        return r["command"], r["mark"]

    records = json.loads(path.read_text("utf-8")) if path.is_file() else []
    records = sorted([r for r in records if key(r) != key(record)] + [record], key=key)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path

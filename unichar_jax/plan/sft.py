"""A training run, compiled for a pod without the pod: will it fit, what does it compute, what does it send.

The step that is compiled is the one that training runs, on shapes in place of arrays: all parameters,
optimiser state and average with their shardings, and one packed batch. Nothing is timed; a floor time is work
over the device's peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unichar_jax.config.model import ModelConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.models import flops, kernels, params
from unichar_jax.models.streams import Batch, LatentStream, TextStream, TokenMeta, VitStream
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.parallel.chips import GIB
from unichar_jax.plan.program import Collective, Flops, Memory
from unichar_jax.plan.topology import Topology
from unichar_jax.plan.workload import compile_program, with_sharding
from unichar_jax.training.optimizer import make_optimizer, state_shardings
from unichar_jax.training.start import declare
from unichar_jax.training.state import TRAINABLE, Layout, TrainState
from unichar_jax.training.step import PASSES, jit_step

NUM_TASKS = 8  # losses per task in the log; no influence on anything that is reported


@dataclass(frozen=True)
class Plan:
    """What compiling told.

    Attributes:
      capacities: tokens of a row in text, vit, latent.
      kernel: the attention kernel that was compiled; ``proven`` if it is the one that runs on this topology.
      memory: of one device; None if the compiler found no room, and then ``needed`` is what it asked for, if it
        said.
      useful: FLOPs that the batch asks for, all devices (attention: as if each row were one document; where one
        expert learns, as if both did).
      executed: FLOPs of the traced program, all devices.
      seconds: that compilation took.
      changes: what would save memory, cheapest first, with estimated bytes per device.
    """

    topology: Topology
    mesh: dict[str, int]
    parameters: int
    trained: int
    capacities: tuple[int, int, int]
    rows: int
    kernel: str
    proven: bool
    memory: Memory | None
    needed: float | None
    useful: float
    useful_attention: float
    executed: Flops
    collectives: list[Collective]
    seconds: float
    changes: list[tuple[str, float]]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.device <= self.topology.chip.memory

    @property
    def recomputed(self) -> float:
        """Work outside attention that is executed beyond what is useful, as a share of the useful."""
        return self.executed.dense / (self.useful - self.useful_attention) - 1

    @property
    def floor_seconds(self) -> float:
        """Useful work at the devices' peak."""
        return self.useful / self.topology.size / self.topology.chip.flops

    @property
    def link_seconds(self) -> float:
        """Collectives' traffic over one device's links, if nothing overlapped."""
        return sum(c.traffic for c in self.collectives) / self.topology.chip.link

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        where = self.topology
        tree = dataclasses.asdict(self) | {
            "topology": where.text,
            "chip": where.chip.name,
            "chip_memory": where.chip.memory,
            "devices": where.size,
        }
        names = ("fits", "recomputed", "floor_seconds", "link_seconds")
        return tree | {name: getattr(self, name) for name in names}


def assumed_capacities(tokens_per_row: int) -> tuple[int, int, int]:
    """Text, vit and latent tokens of a row where no data says better: 1/4, 5/12, 1/3 (3072, 5120, 4096 of
    12k)."""
    text, latent = tokens_per_row // 4, tokens_per_row // 3
    return text, tokens_per_row - text - latent, latent


def abstract_batch(cfg: ModelConfig, capacities: tuple[int, int, int], rows: int, mesh: Mesh) -> Batch:
    """Shapes of a global batch of ``rows``."""
    sharding = mesh_lib.batch_sharding(mesh)

    def of(dtype: Any, length: int, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, *rest), dtype, sharding=sharding)

    def ints(length: int) -> jax.ShapeDtypeStruct:
        return of(jnp.int32, length)

    def floats(length: int, *rest: int) -> jax.ShapeDtypeStruct:
        return of(jnp.float32, length, *rest)

    def meta(length: int) -> TokenMeta:
        return TokenMeta(*[ints(length)] * 5)

    t, v, n = capacities
    moments = floats(n, cfg.latent_dim)
    return Batch(
        TextStream(ints(t), meta(t), ints(t), floats(t), ints(t)),
        VitStream(floats(v, cfg.vision.patch_dim), ints(v), meta(v)),
        LatentStream(moments, moments, ints(n), floats(n), meta(n), floats(n), ints(n)),
    )


def abstract_state(
    layout: Layout, optimizer: optax.GradientTransformation, mesh: Mesh, trainable: str, ema: bool
) -> TrainState:
    """Shapes and shardings of a run's state."""
    trained, frozen = layout.split(params.flat(params.abstract(layout.module, mesh)), TRAINABLE[trainable])
    opt = jax.eval_shape(optimizer.init, trained)
    opt = jax.tree.map(with_sharding, opt, state_shardings(opt, trained, mesh))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
    return TrainState(count, trained, frozen, opt, trained if ema else None)


def abstract_run(cfg: SFTConfig, model: ModelConfig, mesh: Mesh) -> tuple[Any, TrainState, Layout]:
    """The jitted training step, and the shapes and shardings of its state."""
    layout, optimizer = Layout(declare(cfg, model)), make_optimizer(cfg.optimizer, cfg.steps)
    state = abstract_state(layout, optimizer, mesh, cfg.trainable, cfg.optimizer.ema_decay > 0)
    return jit_step(cfg, model, layout, optimizer, NUM_TASKS, state, mesh), state, layout


def make_plan(
    cfg: SFTConfig, model: ModelConfig, topology: Topology, say: Callable[[str], None] = lambda _: None
) -> Plan:
    """Compiles the run's step for a topology; minutes at full size.

    Raises:
      UserError: the topology's compiler is absent, or the mesh does not fit its devices.
    """
    mesh = mesh_lib.make_mesh(cfg.mesh, topology.devices())
    capacities = cfg.data.capacities or assumed_capacities(cfg.data.tokens_per_row)
    rows = mesh_lib.global_batch_size(mesh, cfg.data.rows_per_device) * cfg.accumulate
    with jax.set_mesh(mesh):
        kernel = kernels.resolve(cfg.compute.attention)
        step, state, layout = abstract_run(cfg, model, mesh)
        say(
            f"compiling the step of {params.count(layout.module):,} parameters on {topology.size} devices"
            " (a minute or more at full size)"
        )
        program = compile_program("step", step, state, abstract_batch(model, capacities, rows, mesh))
    work = _work(capacities, rows)
    return Plan(
        topology,
        dict(mesh.shape),
        params.count(layout.module),
        sum(x.size for x in state.params.values()),
        capacities,
        rows,
        kernel,
        kernel == kernels.choose(topology.chip.platform)[0],
        program.memory,
        program.needed,
        flops.train_step(model, work, PASSES.get(cfg.trainable, 3)),
        3 * flops.attention_of(model, work),
        program.executed,
        program.collectives,
        program.seconds,
        cheapest_changes(cfg, model, topology, state, sum(capacities)),
    )


def _work(capacities: tuple[int, int, int], rows: int) -> flops.Work:
    """Full rows, each one document: causal clean tokens, then one noised image; looked-at patches are one
    image."""
    text, vit, latent = capacities
    clean = text + vit
    pairs = clean**2 / 2 + latent * (clean + latent)
    return flops.Work(*(rows * n for n in (text, vit, latent, text, pairs, vit**2)))


def cheapest_changes(
    cfg: SFTConfig, model: ModelConfig, topology: Topology, state: TrainState, tokens: int
) -> list[tuple[str, float]]:
    """Settings that would save memory, those that cost least first, with estimated bytes per device."""
    d = model.decoder
    split = cfg.mesh.resolve(topology.size)
    shards = split[1] * split[2]
    trained = sum(x.size for x in state.params.values()) / shards
    frozen = sum(x.size * x.dtype.itemsize for x in state.frozen.values()) / shards  # bytes
    held = tokens * cfg.data.rows_per_device * d.num_layers * 2  # one bf16 number per token and layer
    projections = 2 * d.num_heads * d.head_dim + 2 * d.num_kv_heads * d.head_dim
    # What each policy keeps of a layer beyond its input; "none" keeps roughly every intermediate.
    kept = {
        "attention": projections,
        "most": projections + 2 * d.mlp_size,
        "none": projections + 4 * d.mlp_size + 6 * d.hidden_size,
    }
    remat, optimizer, changes = cfg.compute.remat, cfg.optimizer, []
    if remat in kept:
        changes.append(("compute.remat = full (a forward pass more)", held * kept[remat]))
    if remat != "offload_inputs":
        saved = held * (d.hidden_size + kept.get(remat, 0))
        changes.append(("compute.remat = offload_inputs (layer inputs in host memory)", saved))
    if optimizer.first_moment_dtype == "float32":
        changes.append(("optimizer.first_moment_dtype = bfloat16", 2 * trained))
    if optimizer.ema_decay:
        changes.append(("optimizer.ema_decay = 0 (no average of the weights)", 4 * trained))
    changes.append(("a topology twice as large, mesh.fsdp over all of it", (16 * trained + frozen) / 2))
    if cfg.data.rows_per_device > 1:
        share = (cfg.data.rows_per_device - 1) / cfg.data.rows_per_device
        changes.append(("data.rows_per_device = 1 (and accumulate)", held * d.hidden_size * share))
    changes.append(("data.tokens_per_row halved", held * (d.hidden_size + kept.get(remat, 0)) / 2))
    if cfg.trainable == "all":
        moments_and_precision = 16 - cfg.compute.jax_dtype.itemsize
        changes.append(("trainable = lora with lora.rank = 64", moments_and_precision * trained))
    return changes


def report(plan: Plan) -> str:
    """The plan in words and numbers."""
    chip, gib = plan.topology.chip, lambda n: f"{n / GIB:8.2f} GiB"
    lines = [
        f"{plan.parameters:,} parameters, {plan.trained:,} trained, on {plan.topology.text}"
        f" ({plan.topology.size} x {chip.name}), mesh {plan.mesh}",
        f"{plan.rows} rows a step, each of {sum(plan.capacities):,} tokens: text {plan.capacities[0]:,}, vit"
        f" {plan.capacities[1]:,}, latent {plan.capacities[2]:,}",
        f"attention kernel: {plan.kernel}"
        + ("" if plan.proven else " - a stand-in, unproven: another kernel runs on this hardware"),
        "",
        "memory of one device",
    ]
    if plan.memory is None:
        asked = f"{plan.needed / GIB:.2f} GiB asked for, " if plan.needed else ""
        lines.append(f"  the compiler found no room: {asked}{chip.memory / GIB:.2f} GiB there")
    else:
        m = plan.memory
        rows = {
            "arguments (state, batch)": m.arguments,
            "outputs beyond them": m.outputs - m.reused,
            "temporaries": m.temporaries,
            "program": m.code,
            "sum": m.device,
            f"of {chip.name}'s": chip.memory,
            "host memory": m.host,
        }
        lines += [f"  {name:<26}{gib(n)}" for name, n in rows.items()]
    lines.append(
        "it fits" if plan.fits else "it does NOT fit; the cheapest changes (estimated savings per device):"
    )
    if not plan.fits:
        lines += [f"  {gib(saved)}  {change}" for change, saved in plan.changes[:3]]
    tera = 1e12 * plan.topology.size
    attention = f"{plan.useful_attention / tera:,.1f} in attention"
    executed = plan.executed
    lines += [
        "",
        "work of one device and step, TFLOP",
        f"  useful                  {plan.useful / tera:10,.1f}  ({attention})",
        f"  executed, dense         {executed.dense / tera:10,.1f}  ({plan.recomputed:+.1%} over useful)",
        f"  executed, in kernels    {executed.kernels / tera:10,.1f}  (at most: if no block were skipped)"
        if executed.kernels
        else "  attention is not counted: the mask decides how many of its tiles there are",
        f"  floor at {chip.flops / 1e12:,.0f} TFLOP/s    {plan.floor_seconds:10.3f}  s",
        "",
        "collectives of one device and step",
    ]
    lines += [
        f"  {c.kind:<20}{c.count:>6} x  {c.payload / 1e9:10.3f} GB in all,{c.traffic / 1e9:10.3f} GB sent"
        for c in plan.collectives
    ] or ["  none"]
    lines.append(
        f"  {plan.link_seconds:.3f} s over {chip.link / 1e9:,.0f} GB/s of links, if nothing overlapped"
    )
    lines.append(f"compiled in {plan.seconds:.0f} s; nothing here was timed on the hardware")
    return "\n".join(lines)

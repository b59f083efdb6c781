"""Drawing and answering on one device that is not here: does the model fit, and how long can it take at the least.

The programs are the engine's own (``sampling``), for a sheet of pictures (read the prompt, guided and unguided
steps, autoencoder) and for a reply (read what was said and a picture, then draw tokens one by one). One device runs
them: the engine has no mesh yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.config.ranges import POSITIVE, at_least, check
from unichar_jax.errors import UserError
from unichar_jax.models import flops, int8, kernels, params
from unichar_jax.models.autoencoder import Autoencoder, decoding_in
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.plan.grpo import evaluation_flops
from unichar_jax.plan.topology import Topology
from unichar_jax.plan.workload import Compiled, Task, Workload, bytes_of, compile_program, with_sharding
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, pixels, text
from unichar_jax.sampling.flow import Contexts, FlowSettings


@dataclass(frozen=True)
class Drawing:
    """A sheet of pictures.

    Attributes:
      base: the model, of which only the sizes are read.
      size: pixels of a side.
      batch: pictures that are drawn together.
      steps: times of the schedule.
      scale: of text guidance; at most 1: none.
      prompt: tokens of the prompt, padded.
      weights: int8: the decoder's weights in eight bits.
    """

    base: str = "bagel-7b"
    size: int = 1024
    batch: int = 1
    steps: int = 50
    scale: float = 4.0
    prompt: int = 128
    weights: Literal["int8"] | None = None


@dataclass(frozen=True)
class Talking:
    """A reply.

    Attributes:
      base: the model, of which only the sizes are read.
      context: tokens that were said before, padded.
      reply: tokens of the reply.
      batch: conversations that are answered together.
      picture: patches of a picture that is looked at; 0: none.
      weights: int8: the decoder's weights in eight bits.
    """

    base: str = "bagel-7b"
    context: int = 2048
    reply: int = 256
    batch: int = 1
    picture: int = 4900
    weights: Literal["int8"] | None = None


class _Abstract:
    """The model's shapes on one described device, and the bytes of its parts."""

    def __init__(self, model: ModelConfig, compute: Compute, weights: str | None, mesh: Mesh):
        self.mesh, self.cfg = mesh, model
        declared = UnifiedModel(model, compute)
        self.model = params.abstract(declared, mesh, compute.jax_dtype)
        if weights == "int8":  # as a loaded model becomes small, array by array
            arrays: dict[str, Any] = {}
            for name, x in params.named_leaves(self.model):
                arrays |= jax.eval_shape(lambda x, name=name: int8.small_form(name, x, {}), x)
            self.model = self.on(params.map_named(lambda n, _: arrays[n], int8.declare(declared)))
        # The engine keeps the inner convolutions of its decoder in the compute dtype.
        float32 = params.abstract(Autoencoder(model.autoencoder), mesh)
        lower = jax.eval_shape(lambda a: decoding_in(a, compute.dtype), float32)
        self.autoencoder = self.on(lower)
        self.stays = {"model": bytes_of(self.model), "autoencoder": bytes_of(self.autoencoder)}

    def on(self, tree: Any) -> Any:
        """Shapes, whole on every device."""
        return with_sharding(tree, mesh_lib.replicated(self.mesh))

    def of(self, function: Any, *args: Any) -> Any:
        """Shapes of what a function of (model, ...) gives."""
        return self.on(jax.eval_shape(function, self.model, *args))

    def cache(self, batch: int, capacity: int) -> Any:
        return self.of(lambda m: kv.empty(m, batch, capacity))

    def ints(self, *shape: int) -> Any:
        return self.on(jax.ShapeDtypeStruct(shape, jnp.int32))

    def expert_bytes(self, *, und: bool = True, gen: bool = False, head: bool = False) -> int:
        """Bytes of the weights that a pass reads."""
        named = dict(params.named_leaves(self.model))
        parts = [".und."] * und + [".gen."] * gen
        layers = [x for n, x in named.items() if n.startswith("decoder.") and any(p in n for p in parts)]
        return bytes_of([*layers, *([named["lm_head.kernel"]] if head else [])])


def _single(topology: Topology) -> Mesh:
    return mesh_lib.make_mesh(MeshConfig(), list(topology.devices())[:1])


def plan_drawing(job: Drawing, model: ModelConfig, compute: Compute, topology: Topology) -> Workload:
    """Compiles what drawing takes.

    Raises:
      UserError: a number is out of range, or the topology's compiler is absent.
    """
    check(job, "draw.", size=POSITIVE, batch=POSITIVE, prompt=POSITIVE, steps=at_least(2))
    step = model.pixels_per_latent
    if job.size % step or job.size > model.max_latent_size * step:
        raise UserError(
            f"draw.size {job.size}: expected a multiple of {step} up to {model.max_latent_size * step}, the model's"
            " largest."
        )
    mesh = _single(topology)
    settings = FlowSettings(num_timesteps=job.steps, guidance=flow.Guidance(job.scale))
    grid = (job.size // step,) * 2
    tokens = grid[0] * grid[1]
    with jax.set_mesh(mesh):
        at = _Abstract(model, compute, job.weights, mesh)
        cache, noise = (
            at.cache(job.batch, job.prompt),
            at.of(lambda m: jnp.zeros((job.batch, tokens, model.latent_dim))),
        )
        times = at.on(jax.ShapeDtypeStruct((kv.bucket(job.steps, flow.MIN_TIMES),), jnp.float32))
        read = compile_program(
            "read the prompt",
            kv.prefill_text,
            at.model,
            at.cache(1, job.prompt),
            at.ints(1, job.prompt),
            at.ints(1),
        )
        work = flops.Work(job.prompt, 0, 0, 0, job.prompt**2 / 2, 0)
        tasks = [Task(read, 1, flops.forward(model, work), at.expert_bytes())]
        guidance = flow.Guidance(job.scale, interval=flow.Guidance.interval)
        for guided in (True, False):
            count = sum(
                b - a for a, b, acts in settings.runs() if (acts and settings.guidance.uses[0]) == guided
            )
            if not count:
                continue
            rows = at.of(
                lambda m, c, guided=guided: flow.branches(m, Contexts(c), guidance, (guided, False)), cache
            )
            done = compile_program(
                "guided step" if guided else "plain step",
                flow._some_steps,
                *(
                    at.model,
                    rows,
                    noise,
                    times,
                    at.ints(),
                    at.ints(),
                    at.on(jax.eval_shape(lambda: guidance)),
                ),
                grid=grid,
            )
            branches = job.batch * (2 if guided else 1)
            useful = branches * evaluation_flops(model, tokens, job.prompt)
            tasks.append(Task(done, count, useful, at.expert_bytes(gen=True)))
        patch = model.latent_patch_size
        decode = compile_program(
            "autoencoder", pixels.decode_images, at.autoencoder, noise, grid=grid, patch=patch
        )
        tasks.append(Task(decode, 1, decode.executed.total, bytes_of(at.autoencoder)))
        kernel = kernels.resolve(compute.attention)
    return Workload(
        f"{job.batch} x {job.size} px, {job.steps - 1} steps{_with(job.weights)}",
        topology,
        dict(mesh.shape),
        kernel,
        at.stays | {"contexts": 3 * bytes_of(cache)},
        tasks,
        ("--weights int8 (half the memory of the model)", "a smaller --batch or --size"),
    )


def plan_talking(job: Talking, model: ModelConfig, compute: Compute, topology: Topology) -> Workload:
    """Compiles what a reply takes; raises as ``plan_drawing``."""
    check(job, "chat.", context=POSITIVE, reply=POSITIVE, batch=POSITIVE, picture=at_least(0))
    mesh, batch = _single(topology), job.batch
    delimited = job.picture + 2 if job.picture else 0
    capacity = kv.bucket(job.context + delimited + job.reply)
    with jax.set_mesh(mesh):
        at = _Abstract(model, compute, job.weights, mesh)
        cache = at.cache(batch, capacity)
        read = compile_program(
            "read", kv.prefill_text, at.model, cache, at.ints(batch, job.context), at.ints(batch)
        )
        work = flops.Work(batch * job.context, 0, 0, 0, batch * job.context**2 / 2, 0)
        tasks = [Task(read, 1, flops.forward(model, work), at.expert_bytes())]
        if job.picture:
            patches = at.of(lambda m: jnp.zeros((batch, job.picture, model.vision.patch_dim)))
            look = compile_program(
                "look", kv.prefill_vit, at.model, cache, patches, at.ints(batch, job.picture), at.ints(batch)
            )
            pairs = batch * delimited * (delimited + job.context)
            seen = flops.Work(2 * batch, batch * job.picture, 0, 0, pairs, batch * job.picture**2)
            tasks.append(Task(look, 1, flops.forward(model, seen), at.expert_bytes()))
        decode = _decode(at, cache, batch)
        held = bytes_of(cache) * (job.context + delimited + job.reply / 2) / capacity
        one = flops.Work(batch, 0, 0, batch, batch * (job.context + delimited + job.reply / 2), 0)
        chunk = text.CHUNK
        tasks.append(
            Task(
                decode,
                -(-job.reply // chunk),
                chunk * flops.forward(model, one),
                chunk * (at.expert_bytes(head=True) + held),
            )
        )
        kernel = kernels.resolve(compute.attention)
    chip = topology.chip
    rate = chunk * batch / tasks[-1].floor(chip, 1)
    return Workload(
        f"{batch} x a reply of {job.reply} tokens after {job.context} tokens"
        + (f" and a picture of {job.picture} patches" if job.picture else "")
        + _with(job.weights),
        topology,
        dict(mesh.shape),
        kernel,
        at.stays | {"contexts": 2 * bytes_of(cache)},
        tasks,
        ("--weights int8 (half the memory of the model)", "a shorter --context, a smaller --batch"),
        (f"at the memory's bandwidth at most {rate:,.0f} tokens/s",),
    )


def _with(weights: str | None) -> str:
    return f", weights in {weights}" if weights else ""


def _decode(at: _Abstract, cache: Any, batch: int) -> Compiled:
    layers = None  # where they are: what needs least memory (``text.text_layers``)
    state = at.of(lambda m, c: text.start(m, c), cache)
    choice = at.on(jax.eval_shape(lambda: text.Choice.of([text.TextSettings()] * batch)))
    return compile_program(
        f"{text.CHUNK} tokens", text.decode_chunk, at.model, layers, state, choice, num_tokens=text.CHUNK
    )

"""A round of stage 2 on devices that are not here: drawing, scoring and learning, compiled and added up.

The programs are the trainer's own, for the shapes that the configuration gives: prompts read into a cache, a batch of
pictures drawn and decoded, the scorers that the reward names (the published encoders, at their default sizes), one
update. Visual questions are counted as one look at each picture and ``ANSWERS`` short answers about it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.models import flops, kernels, params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2, Dinov2Config
from unichar_jax.models.encoders.lpips import Lpips
from unichar_jax.models.lora import switched_off
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.plan.grpo import round_cost
from unichar_jax.plan.sft import abstract_state
from unichar_jax.plan.topology import Topology
from unichar_jax.plan.workload import Compiled, Task, Workload, bytes_of, compile_program, with_sharding
from unichar_jax.sampling import cache as kv
from unichar_jax.scoring.preprocess import CLIP, DINOV2
from unichar_jax.training.grpo import rollouts
from unichar_jax.training.grpo.trainer import make_algorithm
from unichar_jax.training.grpo.update import Share, jit_update
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.start import declare
from unichar_jax.training.state import Layout, TrainState

PROMPTS, PROMPT_TOKENS = 100, 128
"""Prompts that a run keeps in its cache, and their padded length (RoleScape-20's have 38 to 102 tokens)."""

ANSWERS, ANSWER_TOKENS = 26, 64
"""Answers that visual questions weigh for a picture, and the padded length of a question with its answer."""

AT_ONCE = 32
"""Pictures in one call of a scorer."""

SHARE = 0.4
"""Of the devices' peak, for hours: a forecast; drawing reached 0.45 on an H100."""


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """What the programs take, as shapes with shardings."""

    cfg: GRPOConfig
    model: ModelConfig
    mesh: Mesh
    layout: Layout
    state: TrainState
    autoencoder: Any

    def whole(self, tree: Any) -> Any:
        return with_sharding(tree, mesh_lib.replicated(self.mesh))

    def rows(self, tree: Any) -> Any:
        """Split over the batch where it divides."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            dims = ("batch", *(None,) * (x.ndim - 1))
            return with_sharding(x, mesh_lib.sharding_for(dims, x.shape, self.mesh))

        return jax.tree.map(one, tree)

    def contexts(self, batch: int, capacity: int) -> Any:
        """A cache; heads are split as the model's are."""

        def split(x: Any) -> jax.ShapeDtypeStruct:
            dims = (None, None, "kv_heads", None, None) if x.ndim == 5 else (None,) * x.ndim
            return with_sharding(x, mesh_lib.sharding_for(dims, x.shape, self.mesh))

        return jax.tree.map(split, jax.eval_shape(lambda m: kv.empty(m, batch, capacity), self.learner))

    @property
    def learner(self) -> Any:
        return self.layout.assemble(self.state.params, self.state.frozen)


def plan_round(cfg: GRPOConfig, model: ModelConfig, topology: Topology) -> Workload:
    """Compiles a round's programs; minutes at full size.

    Raises:
      UserError: the topology's compiler is absent, or the mesh does not fit its devices.
    """
    mesh = mesh_lib.make_mesh(cfg.mesh, topology.devices())
    algorithm = make_algorithm(cfg, model)
    optimizer = make_optimizer(cfg.optimizer, cfg.rounds * cfg.updates)
    layout = Layout(declare(cfg, model))
    with jax.set_mesh(mesh):
        kernel = kernels.resolve(cfg.compute.attention)
        ema = algorithm.follows or cfg.optimizer.ema_decay > 0
        state = abstract_state(layout, optimizer, mesh, cfg.trainable, ema)
        autoencoder = with_sharding(
            params.abstract(Autoencoder(model.autoencoder)), mesh_lib.replicated(mesh)
        )
        shapes = _Shapes(cfg, model, mesh, layout, state, autoencoder)
        cache = shapes.contexts(PROMPTS, PROMPT_TOKENS)
        draw, record = _draw(shapes, algorithm, cache)
        learn, reference = _learn(shapes, algorithm, optimizer, cache, record)
        scores, encoders = _scorers(shapes)
    cost = round_cost(cfg, model, PROMPT_TOKENS)
    batches = cfg.prompts_per_round / cfg.prompts_per_batch * (len(cfg.rollout.window_starts) or 1)
    tasks = [
        Task(draw, batches, cost.draw * cost.evaluation / batches),
        *scores,
        Task(learn, cfg.updates, cost.learn * cost.evaluation / cfg.updates),
    ]
    stays = {
        "frozen weights": bytes_of(state.frozen),
        "trained, moments, average": bytes_of((state.params, state.opt, state.ema)),
        "reference": 0 if cfg.trainable == "lora" else bytes_of(reference),
        "autoencoder": bytes_of(autoencoder),
        "prompts": bytes_of(cache),
        "scorers": encoders,
    }
    job = Workload(
        f"a round of {cfg.pictures} pictures of {cfg.rollout.width} x {cfg.rollout.height} px ({cfg.algorithm})",
        topology,
        dict(mesh.shape),
        kernel,
        {name: n for name, n in stays.items() if n},
        tasks,
        (
            "rollout.batch smaller (pictures drawn at once)",
            "micro_batch smaller (pictures learned from at once)",
            "compute.remat = full",
            "trainable = lora",
            "a topology twice as large, mesh.fsdp over all of it",
        ),
    )
    hours = cfg.rounds * job.floor_seconds / SHARE / 3600
    note = (
        f"{cfg.rounds} rounds: {hours:,.1f} hours, {hours * job.devices:,.1f} device hours if it runs at {SHARE:.0%}"
        " of the peak (forecast)"
    )
    return dataclasses.replace(job, notes=(note,))


def _draw(shapes: _Shapes, algorithm: Any, cache: Any) -> tuple[Compiled, Any]:
    """The program that draws a batch, and the record of the pictures of one update."""
    cfg, model = shapes.cfg, shapes.model
    grid = rollouts.grid_of(cfg.rollout.height, cfg.rollout.width, model)
    roller = rollouts.Roller(cfg, algorithm, rollouts.settings_of(cfg.rollout), grid, model.latent_patch_size)
    prompts = cfg.prompts_per_batch
    pictures = prompts * cfg.group // (len(cfg.rollout.window_starts) or 1)
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    ints = lambda *shape: shapes.whole(jax.ShapeDtypeStruct(shape, jnp.int32))  # noqa: E731
    args = (
        *(shapes.learner, shapes.autoencoder, cache, ints(prompts)),
        *(shapes.whole(jax.ShapeDtypeStruct((pictures,), key)), ints()),
    )
    compiled = compile_program("draw", roller.program, *args)
    _, record, _ = jax.eval_shape(roller.program, *args)
    learned = cfg.pictures // cfg.updates
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct((learned, *x.shape[1:]), x.dtype), record)
    return compiled, shapes.rows(record)


def _learn(shapes: _Shapes, algorithm: Any, optimizer: Any, cache: Any, record: Any) -> tuple[Compiled, Any]:
    """The program of an update, and the reference model's weights."""
    cfg, state = shapes.cfg, shapes.state
    reference = None
    if algorithm.kl:
        reference = state.params
        if cfg.trainable == "lora":
            off = jax.eval_shape(switched_off, state.params)
            reference = jax.tree.map(lambda x, p: with_sharding(x, p.sharding), off, state.params)
    learned = cfg.pictures // cfg.updates
    share = Share(
        record,
        shapes.rows(jax.ShapeDtypeStruct((learned,), jnp.int32)),
        shapes.rows(jax.ShapeDtypeStruct((learned,), jnp.float32)),
    )
    key = shapes.whole(jax.eval_shape(lambda: jax.random.key(0)))
    update = jit_update(shapes.layout, algorithm, optimizer, cfg.micro_batch)
    moving = dataclasses.replace(state, frozen={})
    args = (moving, state.frozen, reference, cache, share, key)
    return compile_program("learn", update, *args), reference


def _scorers(shapes: _Shapes) -> tuple[list[Task], int]:
    """Programs of the reward's terms, and the bytes that their encoders keep."""
    cfg, names = shapes.cfg, {term.name for term in shapes.cfg.reward}
    calls = cfg.pictures / AT_ONCE
    side = (cfg.rollout.height, cfg.rollout.width)
    tasks, stays = [], 0

    def encoder(name: str, module: Any, apply: Any, times: float, *shape: int) -> None:
        nonlocal stays
        arrays = shapes.whole(params.abstract(module))
        pictures = shapes.rows(jax.ShapeDtypeStruct(shape, jnp.float32))
        done = compile_program(name, jax.jit(apply), arrays, pictures)
        stays += bytes_of(arrays)
        tasks.append(Task(done, times, done.executed.dense, bytes_of(arrays)))

    if "text_image_match" in names:
        encoder(
            "score: CLIP", Clip(ClipConfig()), Clip.encode_images, calls, AT_ONCE, CLIP.crop, CLIP.crop, 3
        )
    if names & {"identity", "identity_band", "feature_diversity"}:
        crop = DINOV2.crop
        encoder("score: DINOv2", Dinov2(Dinov2Config()), Dinov2.__call__, calls, AT_ONCE, crop, crop, 3)
    if "diversity" in names:
        compare = lambda m, x: m.pairwise(m.features(x))  # noqa: E731
        encoder("score: LPIPS", Lpips(), compare, cfg.prompts_per_round, cfg.group, *side, 3)
    if "visual_questions" in names:
        tasks += _questions(shapes, calls)
    return tasks, stays


def _questions(shapes: _Shapes, calls: float) -> list[Task]:
    """A look at each picture, then answers that are read after it."""
    cfg, model = shapes.cfg, shapes.model
    patch = model.vision.patch_size
    patches = (cfg.rollout.height // patch) * (cfg.rollout.width // patch)
    capacity = kv.bucket(patches + 2 + ANSWER_TOKENS)
    cache = shapes.contexts(AT_ONCE, capacity)
    ints = lambda *shape: shapes.rows(jax.ShapeDtypeStruct(shape, jnp.int32))  # noqa: E731
    pixels = shapes.rows(jax.ShapeDtypeStruct((AT_ONCE, patches, model.vision.patch_dim), jnp.float32))
    look = compile_program(
        "score: look", kv.prefill_vit, shapes.learner, cache, pixels, ints(AT_ONCE, patches), ints(AT_ONCE)
    )
    answer = compile_program(
        "score: answer", kv.prefill_text, shapes.learner, cache, ints(AT_ONCE, ANSWER_TOKENS), ints(AT_ONCE)
    )
    queries = patches + 2
    seen = flops.Work(2 * AT_ONCE, AT_ONCE * patches, 0, 0, AT_ONCE * queries**2, AT_ONCE * patches**2)
    pairs = AT_ONCE * ANSWER_TOKENS * (queries + ANSWER_TOKENS / 2)
    said = flops.Work(AT_ONCE * ANSWER_TOKENS, 0, 0, AT_ONCE * ANSWER_TOKENS, pairs, 0)
    return [
        Task(look, calls, flops.forward(model, seen)),
        Task(answer, calls * ANSWERS, flops.forward(model, said)),
    ]

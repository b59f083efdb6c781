"""Measures rounds of stage 2, batched against one picture at a time, and projects GPU hours by formula.

    python scripts/bench_grpo.py --model mini --config grpo-mini-reference
    python scripts/bench_grpo.py --project

The one-at-a-time scheme is the reference's, with the same modules: every picture, guidance branch and step
is a forward pass of its own, and every (picture, step) a backward pass of its own. Both schemes are compiled
before the clock starts. The projection multiplies formula FLOPs (``plan/grpo.py``) by rounds and
divides by a peak and a share of it; it is an estimate, and prints what it assumes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import LoraConfig
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.plan.grpo import round_cost
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.flow import Contexts
from unichar_jax.training import state as state_lib
from unichar_jax.training.grpo.rollouts import picture_keys, read_prompts
from unichar_jax.training.grpo.trainer import make_algorithm
from unichar_jax.training.grpo.update import Share, gradients_of
from unichar_jax.training.optimizer import make_optimizer

H100_PEAK = 989e12  # dense bf16


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "mini"
    config: str = "grpo-mini-reference"
    pictures: int = 16
    """Pictures in the batched scheme; half as many prompts as groups of two."""
    repeats: int = 3
    project: bool = False
    """Only print the projection."""
    utilisation: float = 0.45
    """Assumed share of the peak, for the projection."""


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Shortest time of each, after one that compiles; taken in turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def measure(args: Arguments) -> dict[str, float]:
    """Pictures per second of drawing and learning in both schemes, and their ratios."""
    cfg = presets.load(GRPOConfig, args.config)
    model_cfg = model_preset(args.model)
    declared = UnifiedModel(model_cfg, cfg.compute)
    model = params.initialize(declared, 0)
    cfg = dataclasses.replace(cfg, trainable="gen_expert", lora=LoraConfig())
    algorithm = make_algorithm(cfg, model_cfg)
    optimizer = make_optimizer(cfg.optimizer, 1)
    layout, state = state_lib.create(
        model, declared, optimizer, trainable="gen_expert", ema=algorithm.follows
    )
    prompts = args.pictures // 2
    cache = read_prompts(model, [list(range(8, 8 + 24))] * prompts)
    start = jnp.int32(cfg.rollout.window_range[0])
    draw = jax.jit(
        lambda model, rows, keys: algorithm.draw(model, Contexts(kv.take(cache, rows)), keys, start)
    )
    learn = jax.jit(
        lambda state, share: gradients_of(layout, algorithm, state, None, cache, share, jax.random.key(0))[0]
    )
    keys = picture_keys(jax.random.key(0), args.pictures)
    rows = jnp.arange(prompts)

    def share_of(record: Any, prompt: jax.Array) -> Share:
        return Share(record, prompt, jnp.ones(prompt.shape[0]))

    drawn = draw(model, rows, keys)
    together = share_of(drawn[1], jnp.repeat(rows, 2))
    alone = draw(model, rows[:1], keys[:1])
    one = share_of(alone[1], rows[:1])
    times = seconds(
        {
            "batched_draw": lambda: draw(model, rows, keys),
            "single_draw": lambda: _draw_alone(model, algorithm, cache, keys[0]),
            "batched_learn": lambda: learn(state, together),
            "single_learn": lambda: _learn_alone(layout, algorithm, state, cache, one),
        },
        args.repeats,
    )
    speed = {name: (args.pictures if name.startswith("batched") else 1) / t for name, t in times.items()}
    report = {f"{name}_pictures_per_second": v for name, v in speed.items()}
    return report | {f"{k}_speedup": speed[f"batched_{k}"] / speed[f"single_{k}"] for k in ("draw", "learn")}


_velocity = jax.jit(flow.velocity, static_argnums=4)


def _draw_alone(model: Any, algorithm: Any, cache: Any, key: jax.Array) -> jax.Array:
    """One picture; each branch of each step is a call of its own (the stochastic step's noise costs nothing here)."""
    settings, grid = algorithm.settings, algorithm.grid
    settings = getattr(settings, "flow", settings)
    full = kv.take(cache, jnp.array([0]))
    empty = kv.empty(model, 1, full.capacity)
    x = flow.draw_noise(key[None], 0, grid, model.cfg.latent_dim)
    for t, t_next in zip(settings.times[:-1], settings.times[1:], strict=True):
        v = _velocity(model, full, x, jnp.float32(t), grid)
        if settings.guidance.text_scale > 1:
            other = _velocity(model, empty, x, jnp.float32(t), grid)
            v = flow.guide(v, other, None, settings.guidance)
        x = x + v * (t_next - t)
    return x


_learn_one: dict[Any, Any] = {}


def _learn_alone(layout: Any, algorithm: Any, state: Any, cache: Any, share: Share) -> Any:
    """One picture; each of its items is a backward pass of its own."""
    if algorithm not in _learn_one:

        def gradient(trained: Any, frozen: Any, ema: Any, item: Any, advantage: jax.Array) -> Any:
            from unichar_jax.training.grpo.algorithm import Policies

            def loss(trained: Any) -> jax.Array:
                drawer = layout.assemble(ema, frozen) if ema is not None else None
                policies = Policies(layout.assemble(trained, frozen), drawer)
                contexts = Contexts(kv.take(cache, share.prompts))
                return algorithm.loss(policies, contexts, item, advantage)[0].sum()

            return jax.grad(loss)(trained)

        _learn_one[algorithm] = jax.jit(gradient)
    items = algorithm.items(share.record, jax.random.key(0))
    total = None
    for j in range(jax.tree.leaves(items)[0].shape[1]):
        item = jax.tree.map(lambda x, j=j: x[:, j], items)
        grads = _learn_one[algorithm](state.params, state.frozen, state.ema, item, share.advantages)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    return total


def project(utilisation: float) -> list[dict[str, Any]]:
    """H100 hours of a whole run of both BAGEL recipes at 512 and 1024 pixels."""
    model = model_preset("bagel-7b")
    rows = []
    for name in ("grpo-reference", "grpo-bagel-7b"):
        for side in (512, 1024):
            cfg = presets.load(GRPOConfig, name)
            cfg = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, height=side, width=side))
            cost = round_cost(cfg, model)
            held_out = 0
            if cfg.eval.every:
                branches = 2 if cfg.rollout.text_scale > 1 else 1
                pictures = cfg.held_out * cfg.eval.pictures * (1 + cfg.rounds // cfg.eval.every)
                held_out = pictures * branches * (cfg.eval.num_timesteps - 1) * cost.evaluation
            total = cfg.rounds * cost.flops + held_out
            rows.append(
                dict(
                    recipe=name,
                    pixels=side,
                    rounds=cfg.rounds,
                    pictures=cost.pictures * cfg.rounds,
                    evaluations_per_picture=(cost.draw + cost.learn) / cost.pictures,
                    tflops_per_evaluation=cost.evaluation / 1e12,
                    h100_hours=total / (H100_PEAK * utilisation) / 3600,
                )
            )
    return rows


def main(args: Arguments) -> None:
    if not args.project:
        print(json.dumps(measure(args), indent=1))
    print(
        f"projection: formula FLOPs over {H100_PEAK / 1e12:.0f} TFLOP/s x {args.utilisation:.0%} (assumed), prompts of"
        " 128 cached tokens; autoencoder and scorers left out"
    )
    for row in project(args.utilisation):
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Arguments))

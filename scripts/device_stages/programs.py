"""Stages of whole programs with random weights: the training step, decoding, drawing, rounds of stage 2.

The model is BAGEL-7B-MoT's size (small: the toy of the tests). ``decode``, ``draw`` and ``nft`` share one model, loaded
once for a process: 29 GB, and adapters around it for stage 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_stages.kernels import name_device
from device_stages.measure import clock, part, peak_gib, say

from unichar_jax.config import presets
from unichar_jax.config.compute import Compute
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import ModelConfig, model_preset
from unichar_jax.config.train import SFTConfig
from unichar_jax.data.rl_prompts import RLPrompt
from unichar_jax.models import kernels, params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.lora import attach
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.plan import bench
from unichar_jax.plan.grpo import evaluation_flops
from unichar_jax.sampling.engine import Engine, EngineConfig
from unichar_jax.sampling.flow import FlowSettings, Guidance
from unichar_jax.sampling.text import TextSettings
from unichar_jax.training import state as state_lib
from unichar_jax.training.grpo.rewards import Scores
from unichar_jax.training.grpo.rollouts import Round, read_prompts
from unichar_jax.training.grpo.trainer import Trainer, make_algorithm, reference_weights
from unichar_jax.training.optimizer import make_optimizer
from unichar_jax.training.start import declare

TOKENS = 12_288
"""Of a row of the training step."""
FEW = 8
"""Points of a short drawing. It has guided steps and others, so it compiles whatever one with more points needs."""


def model_of(small: bool, layers: int | None = None) -> ModelConfig:
    model = model_preset("debug" if small else "bagel-7b")
    decoder = model.decoder
    return dataclasses.replace(
        model, decoder=dataclasses.replace(decoder, num_layers=layers or decoder.num_layers)
    )


# -- the training step --------------------------------------------------------------------------------------------


def step(what: str, preset: str, small: bool, layers: int | None = None, **compute: str) -> None:
    """Times the training step that ``unichar bench`` times; two steps, for each may take ten seconds."""
    with part(what):
        cfg = presets.load(SFTConfig, preset)
        data = dataclasses.replace(cfg.data, tokens_per_row=256 if small else TOKENS, rows_per_device=1)
        cfg = dataclasses.replace(cfg, data=data, compute=dataclasses.replace(cfg.compute, **compute))
        record = bench.measure(cfg, model_of(small, layers), steps=2)
        useful = record["useful"]
        say(
            what,
            record["step_seconds"],
            "s",
            tokens_per_s=record["tokens_per_s"],
            tflops=None if useful is None else useful / record["step_seconds"] / 1e12,
            share_of_data_sheet=record["mfu"],
            compile_s=record["compile_seconds"],
            parameters=record["parameters"],
            layers=record["layers"],
            kernel=kernels.resolve(cfg.compute.attention),
            remat=cfg.compute.remat,
            peak_gib=peak_gib(),
        )


def kernels_to_try() -> list[str]:
    """``flash`` where it runs, then what ``auto`` takes, unless that is the same."""
    auto = kernels.resolve("auto")
    flash = kernels.KERNELS["flash"].unsupported(jax.default_backend()) is None
    return ["flash", "auto"] if flash and auto != "flash" else ["auto"]


def lora(small: bool) -> None:
    name_device()
    for kernel in kernels_to_try():
        step(f"sft step, adapters, all layers, {kernel}", "sft-lora-bagel-7b", small, attention=kernel)


def full(small: bool) -> None:
    name_device()
    for kernel in kernels_to_try():
        for layers in (1, 2) if small else (2, 4):
            what = f"sft step, all weights, {layers} layers, {kernel}"
            step(what, "sft-bagel-7b", small, layers, attention=kernel, remat="most")


# -- sampling -----------------------------------------------------------------------------------------------------


class Letters:
    """One token for each byte."""

    def encode(self, text: str) -> list[int]:
        return [16 + b for b in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + int(i) % 90) for i in ids)


@functools.cache
def loaded(small: bool) -> tuple[UnifiedModel, Autoencoder]:
    """A random model in bfloat16 that never ends a text by itself, and its autoencoder in float32."""
    name_device()
    cfg, mesh = model_of(small), mesh_lib.make_mesh()
    compute = Compute(dtype="bfloat16", attention="auto", remat="full")
    declared = state_lib.frozen_in(compute.jax_dtype, UnifiedModel(cfg, compute), "lora")
    model = bench.random_weights(declared, mesh)
    ends = jnp.array([cfg.special_tokens.bos, cfg.special_tokens.eos])
    model.lm_head.kernel[...] = (
        model.lm_head.kernel[...].at[:, ends].set(0)
    )  # the largest of the others is above 0
    autoencoder = bench.random_weights(Autoencoder(cfg.autoencoder), mesh)
    say("loaded", params.count(declared), "parameters", peak_gib=peak_gib())
    return model, autoencoder


def engine(small: bool) -> Engine:
    return Engine(*loaded(small), Letters(), EngineConfig(max_batch=8))


def decode(small: bool) -> None:
    """Steps of decoding: a long answer less a short one to the same prompt, which is remembered.

    ``gb_per_s``: what a step has to read (the understanding expert, the head, the filled cache) over its time.
    """
    model, _ = loaded(small)
    d, width = model.cfg.decoder, model.compute.jax_dtype.itemsize
    weights = sum(x.size for name, x in params.named_leaves(model) if ".und." in name or "lm_head" in name)
    context, tokens = (32, 9) if small else (500, 129)
    per_slot = 2 * d.num_layers * d.num_kv_heads * d.head_dim * width
    with engine(small) as one:
        for batch in (1, 8):
            with part(f"decode, batch {batch}"):

                def ask(count: int, batch: int = batch) -> float:
                    with one.together():
                        settings = TextSettings(max_tokens=count)
                        jobs = [
                            one.submit_text(f"{i}{'x' * context}", settings=settings) for i in range(batch)
                        ]
                    return clock(lambda: [job.result() for job in jobs])

                first = ask(tokens)
                long = min(ask(tokens) for _ in range(3))
                ask(1)
                short = min(ask(1) for _ in range(3))
                took = (long - short) / (tokens - 1)
                read = weights * width + batch * (context + tokens / 2) * per_slot
                say(
                    f"decode, batch {batch}: a step",
                    took * 1e3,
                    "ms",
                    tokens_per_s=batch / took,
                    gb_per_s=read / took / 1e9,
                    prompt_and_first_token_s=short,
                    first_call_s=first,
                    peak_gib=peak_gib(),
                )


def draw(small: bool) -> None:
    """Whole pictures, the autoencoder included; work by formula, in one evaluation and guided branch after another.

    Eight at a time with few points, all guided, so that they fit the time: seconds of an evaluation are what
    compares.
    """
    prompt = "a lamp on a hill in the rain, drawn with great care " * 2
    wide, narrow = (64, 32) if small else (1024, 512)

    def settings(points: int) -> FlowSettings:
        return FlowSettings(points, 3.0, Guidance(4.0, interval=(0.4, 1.0)))

    with engine(small) as one:
        for side, count, points in ((wide, 1, 50), (narrow, 1, 50), (narrow, 8, 4), (wide, 8, 4)):
            points = min(points, FEW) if small else points
            what = f"draw {side} px, {points} points, {count} at a time"

            def picture(seed: int, points: int, side: int = side, count: int = count) -> float:
                drawing = settings(points)
                size = (side, side)
                return clock(lambda: one.generate_images([prompt], count, drawing, size=size, seed=seed))

            with part(what):
                first, took = picture(0, min(points, FEW)), picture(1, points)
                if took < 6:
                    took = min(took, picture(2, points))
                evaluations = sum((b - a) * (2 if guided else 1) for a, b, guided in settings(points).runs())
                latents = (side // one.cfg.pixels_per_latent) ** 2
                work = count * evaluations * evaluation_flops(one.cfg, latents, 128)
                say(
                    what,
                    took,
                    "s",
                    pictures_per_s=count / took,
                    evaluations=evaluations,
                    ms_per_evaluation=took / evaluations / count * 1e3,
                    tflops=work / took / 1e12,
                    first_call_s=first,
                    peak_gib=peak_gib(),
                )


# -- stage 2 ------------------------------------------------------------------------------------------------------


def no_rewards(
    images: jax.Array, prompts: Sequence[RLPrompt], groups: np.ndarray, model: UnifiedModel
) -> Scores:
    """Rewards in the place of scorers: some number for each picture."""
    del images, groups, model
    return Scores(np.arange(len(prompts), dtype=np.float32), {})


def nft(small: bool) -> None:
    """Rounds of eight pictures by the trainer of stage 2, the autoencoder included, rewards left out."""
    base, autoencoder = loaded(small)
    cfg = presets.load(GRPOConfig, "grpo-bagel-7b")
    rollout = dataclasses.replace(cfg.rollout, batch=0)
    cfg = dataclasses.replace(cfg, rollout=rollout, prompts_per_round=1, group=8)
    if small:
        rollout = dataclasses.replace(
            rollout, height=32, width=32, num_timesteps=3, window_size=1, window_range=(0, 2)
        )
        cfg = dataclasses.replace(cfg, rollout=rollout, group=2, micro_batch=0)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        declared = declare(cfg, base.cfg)
        model: Any = attach(base, declared, cfg.seed, mesh)
        optimizer = make_optimizer(cfg.optimizer, cfg.rounds)
        layout, state = state_lib.create(model, declared, optimizer, trainable="lora", ema=True, mesh=mesh)
        prompt = RLPrompt("a lamp", "Tess", "0", (), 1)
        ids = [list(range(8, 8 + 100))]
        algorithm = make_algorithm(cfg, base.cfg)
        trainer = Trainer(
            cfg,
            model_cfg=base.cfg,
            algorithm=algorithm,
            layout=layout,
            optimizer=optimizer,
            autoencoder=autoencoder,
            rewards=no_rewards,
            prompts=[prompt],
            cache=read_prompts(layout.assemble(state.params, state.frozen), ids),
            reference=reference_weights(cfg, algorithm, state),
            mesh=mesh,
        )
        rounds: list[dict[str, float]] = []
        for number in range(3):  # the first compiles
            state, metrics = trainer(state, Round(number, np.zeros(1, np.int32)))
            rounds.append(metrics)
    drawn, learned = (min(r[f"seconds_{k}"] for r in rounds[1:]) for k in ("draw", "learn"))
    say(
        f"nft, {cfg.rollout.height} px, a round of {cfg.group}",
        cfg.group / (drawn + learned),
        "pictures/s",
        draw_s=drawn,
        learn_s=learned,
        first_round_s=rounds[0]["seconds_draw"] + rounds[0]["seconds_learn"],
        evaluations=cfg.rollout.num_timesteps - 1,
        peak_gib=peak_gib(),
    )

"""Stage 2 against the reference numbers, through the trainer's own functions: drawing, loss, and every
gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity import golden
from unichar_jax.checkpoint import table
from unichar_jax.config.grpo import FlowGRPOConfig
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.schedule import Noising
from unichar_jax.training import state as state_lib
from unichar_jax.training.grpo.flow_grpo import FlowGRPO, Record
from unichar_jax.training.grpo.rollouts import read_prompts
from unichar_jax.training.grpo.update import Share, gradients_of

TOLERANCE, GRADIENTS = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _algorithm() -> FlowGRPO:
    case = golden.read_json("grpo_case.json")
    guidance = flow.Guidance(
        case["cfg_text_scale"], interval=tuple(case["cfg_interval"]), renorm=case["renorm"]
    )
    settings = flow.RolloutSettings(
        flow.FlowSettings(case["num_timesteps"], case["timestep_shift"], guidance),
        Noising("sde", case["noise_level"]),
        case["window_size"],
        (0, case["num_timesteps"] - 1),
    )
    pixels = golden.config().pixels_per_latent
    grid = (case["shape"][0] // pixels, case["shape"][1] // pixels)
    return FlowGRPO(FlowGRPOConfig(case["clip"], case["clip"]), settings, grid)


def _cache() -> kv.KVCache:
    """The prompt's context in the second of two rows, so that picking rows is part of what is tested."""
    prompt = golden.tensors()["decode.prompt"].tolist()
    return read_prompts(golden.model(), [prompt[:1], prompt])


def test_drawing_keeps_the_steps_of_the_reference() -> None:
    data, case, algorithm = golden.tensors(), golden.read_json("grpo_case.json"), _algorithm()
    final, record = jax.jit(algorithm.draw)(
        golden.model(),
        flow.Contexts(kv.take(_cache(), jnp.array([1]))),
        flow.row_keys([0]),
        jnp.int32(case["window_start"]),
        noise=data["grpo.init_noise"][None],
        step_noise=data["grpo.step_noise"][:, None],
    )
    golden.assert_close(final[0], data["grpo.final_latent"], TOLERANCE, "final latents")
    golden.assert_close(record.latents[0], data["grpo.latents"], TOLERANCE, "stored latents")
    golden.assert_close(record.log_probs[0], data["grpo.logprobs_rollout"], TOLERANCE, "log-probabilities")
    times = algorithm.settings.flow.times[np.asarray(record.steps[0])]
    golden.assert_close(times, data["grpo.timesteps"], 1e-6, "times")


def test_the_update_has_the_loss_and_every_gradient_of_the_reference() -> None:
    data, case, algorithm = golden.tensors(), golden.read_json("grpo_case.json"), _algorithm()
    declared = UnifiedModel(golden.config(), golden.FLOAT32)
    layout, state = state_lib.create(golden.model(), declared, optax.sgd(1.0), trainable="gen_expert")
    copies = 2  # the same picture twice, one at a time: the mean is that of one
    record = Record(
        jnp.repeat(data["grpo.latents"][None], copies, axis=0),
        jnp.repeat(data["grpo.logprobs_old"][None], copies, axis=0),
        jnp.tile(case["window_start"] + jnp.arange(case["window_size"]), (copies, 1)),
        flow.row_keys([0] * copies),
    )
    share = Share(
        record,
        jnp.ones(copies, jnp.int32),
        jnp.full(copies, float(data["grpo.advantage"]), jnp.float32),
    )
    gradient = jax.jit(
        lambda state, share: gradients_of(
            layout, algorithm, state, None, _cache(), share, jax.random.key(0), micro_batch=1
        )
    )
    grads, metrics = gradient(state, share)
    golden.assert_close(metrics["loss"], data["grpo.policy_loss"], TOLERANCE, "loss")

    # Back to the reference's tensors; what is frozen has no gradient and no reference number.
    zeros = {n: jnp.zeros(x.shape, x.dtype) for n, x in state.frozen.items()}
    module = layout.assemble(grads, zeros)
    entries = tuple(e for e in table.model_table(golden.config()) if "_moe_gen" in e.torch)
    tensors = table.module_to_torch(module, entries)
    expected = {n.removeprefix("grpo.grad.") for n in data if n.startswith("grpo.grad.")}
    assert set(tensors) == expected
    assert sum(x.size for x in tensors.values()) == params.count(dataclasses.replace(state).params)
    for name, got in tensors.items():
        golden.assert_close(got, data[f"grpo.grad.{name}"], GRADIENTS, name)

"""Sampling against the reference numbers: text decoding, pictures, stochastic steps, a rollout and its
policy gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import golden
from tests.sampling.decoding import decode
from unichar_jax.checkpoint import table
from unichar_jax.data.images import position_ids
from unichar_jax.models.autoencoder import patchify, unpatchify
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, pixels, schedule, text
from unichar_jax.sampling.schedule import Noising

TOLERANCE = 1e-5
CONTEXTS = {
    "text": ("text",),
    "vit_text": ("vit", "text"),
    "vae_vit_text": ("vae", "vit", "text"),
}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def read_part(cache: kv.KVCache, part: str) -> kv.KVCache:
    """Reads the case's prompt, image to look at, or clean image, padded beyond its length."""
    cfg, data, model = golden.config(), golden.tensors(), golden.model()
    if part == "text":
        tokens = cfg.special_tokens
        ids = np.array([tokens.bos, *data["decode.prompt"], tokens.eos, 0, 0], np.int32)
        return kv.prefill_text(model, cache, ids[None], jnp.array([len(ids) - 2]))
    if part == "vit":
        rows, columns = (side // cfg.vision.patch_size for side in data["vit.image0"].shape[1:])
        count = rows * columns
        patches = np.pad(data["vit.tokens"][:count], [(0, 3), (0, 0)])[None]
        grid = np.pad(position_ids(rows, columns, cfg.vision.max_patches_per_side), (0, 3))[None]
        return kv.prefill_vit(model, cache, patches, grid, jnp.array([count]))
    # The clean image is the training case's first, through the autoencoder's posterior mean.
    rows, columns = (int(n) for n in data["train.latent_shapes"][0])
    pixels = cfg.pixels_per_latent
    image = data["train.padded_images"][:1, :, : rows * pixels, : columns * pixels]
    latent = jax.jit(golden.autoencoder().encode)(jnp.asarray(image.transpose(0, 2, 3, 1)))
    tokens, count = patchify(latent, cfg.latent_patch_size), rows * columns
    padded = jnp.pad(tokens, [(0, 0), (0, 3), (0, 0)])
    grid = np.pad(position_ids(rows, columns, cfg.max_latent_size), (0, 3))[None]
    return kv.prefill_latent(model, cache, padded, grid, jnp.array([count]))


def read(parts: tuple[str, ...] | list[str], capacity: int = 64) -> kv.KVCache:
    data = golden.tensors()
    longest = int(data["decode.vae_vit_text.kv_len"][0]) + len(data["decode.text.tokens"])
    cache = kv.empty(golden.model(), 1, max(capacity, kv.bucket(longest)))
    for part in parts:
        cache = read_part(cache, part)
    return cache


@pytest.mark.parametrize("name", CONTEXTS)
def test_prefill_fills_the_cache_of_the_reference(name: str) -> None:
    data, cache = golden.tensors(), read(CONTEXTS[name])
    length = int(data[f"decode.{name}.kv_len"][0])
    assert int(cache.length[0]) == length
    assert int(cache.rope[0]) == int(data[f"decode.{name}.rope"][0])
    golden.assert_close(
        cache.k[-1, 0, :, :length].swapaxes(0, 1), data[f"decode.{name}.key_last_layer"], TOLERANCE, "keys"
    )
    golden.assert_close(
        cache.v[-1, 0, :, :length].swapaxes(0, 1),
        data[f"decode.{name}.value_last_layer"],
        TOLERANCE,
        "values",
    )


@pytest.mark.parametrize("name", CONTEXTS)
def test_greedy_decoding_gives_the_tokens_and_logits_of_the_reference(name: str) -> None:
    data, model, cache = golden.tensors(), golden.model(), read(CONTEXTS[name])
    expected = data[f"decode.{name}.tokens"]
    assert expected[0] == golden.config().special_tokens.bos
    tokens, state = decode(model, cache, [text.TextSettings(max_tokens=len(expected) - 1)])
    assert tokens[0] == expected[1:].tolist()
    assert int(state.cache.length[0]) == int(cache.length[0]) + len(expected) - 1

    step = jax.jit(kv.read_text)
    for token, logits in zip(expected, data[f"decode.{name}.logits"], strict=True):
        hidden, cache = step(model, cache, jnp.array([[token]], jnp.int32), jnp.array([1]))
        golden.assert_close(model.logits(hidden)[0, 0], logits, TOLERANCE, "logits")


@pytest.mark.parametrize("case", golden.read_json("image_cases.json"), ids=lambda c: c["name"])
def test_pictures_equal_those_of_the_reference(case: dict) -> None:
    data, pixels = golden.tensors(), golden.config().pixels_per_latent
    full, no_text, no_image = (case[name] for name in ("context", "cfg_text_context", "cfg_img_context"))
    contexts = flow.Contexts(
        read(full),
        read(no_text) if no_text else None,
        None if no_image == full else read(no_image),
    )
    guidance = flow.Guidance(
        case["cfg_text_scale"],
        case["cfg_img_scale"],
        case["renorm_min"],
        tuple(case["cfg_interval"]),
        case["renorm"],
    )
    settings = flow.FlowSettings(case["num_timesteps"], case["timestep_shift"], guidance)
    grid = (case["shape"][0] // pixels, case["shape"][1] // pixels)
    latents = flow.sample_latents(golden.model(), contexts, data["image.init_noise"][None], grid, settings)
    golden.assert_close(latents[0], data[f"image.{case['name']}"], TOLERANCE, case["name"])


def test_decoded_picture_equals_that_of_the_reference() -> None:
    data, cfg = golden.tensors(), golden.config()
    expected = data["image.t2i_global.decoded"].transpose(0, 2, 3, 1)
    grid = tuple(n // cfg.pixels_per_latent for n in expected.shape[1:3])
    latents = data["image.t2i_global"][None]
    values = jax.jit(lambda a, z: a.decode(unpatchify(z, grid, cfg.latent_patch_size)))(
        golden.autoencoder(), latents
    )
    golden.assert_close(values, expected, TOLERANCE, "decoded values")
    got = pixels.decode_images(golden.autoencoder(), latents, grid, cfg.latent_patch_size)
    whole = np.clip(expected * 0.5 + 0.5, 0, 1) * 255
    # Truncation: a value that is whole up to rounding may fall to either side.
    assert np.abs(np.asarray(got, np.float64) - np.floor(whole)).max() <= 1
    assert np.mean(np.asarray(got) != np.floor(whole)) < 1e-3


@pytest.mark.parametrize(("solver", "level"), [("sde", 1.3), ("cps", 0.8)])
def test_stochastic_steps_equal_those_of_the_reference(solver: str, level: float) -> None:
    data = golden.tensors()
    times = data["sde.timesteps"]
    golden.assert_close(schedule.times(len(times), 3.0), times, 1e-6, "times")
    sample, velocity = data["sde.sample"][None], data["sde.velocity"][None]
    for row, i in enumerate(data[f"sde.{solver}.step_index"]):
        noise = data[f"sde.{solver}.noise.{i}"][None]
        taken = schedule.step(
            Noising(solver, level), sample, velocity, times[i], times[i + 1], times[1], noise=noise
        )
        for name, got in (
            ("mean", taken.mean[0]),
            ("next", taken.next[0]),
            ("logprob", taken.log_prob[0]),
            ("std", taken.scale),
        ):
            expected = data[f"sde.{solver}.{name}"][row]
            golden.assert_close(got, expected, TOLERANCE, f"{solver} step {i}: {name}")


def grpo_case() -> tuple[dict, flow.RolloutSettings, tuple[int, int]]:
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
    return case, settings, (case["shape"][0] // pixels, case["shape"][1] // pixels)


def test_rollout_equals_that_of_the_reference() -> None:
    data, (case, settings, grid) = golden.tensors(), grpo_case()
    contexts = flow.Contexts(read(["text"]))
    rolled = jax.jit(flow.rollout, static_argnums=(5, 6))(
        golden.model(),
        contexts,
        data["grpo.init_noise"][None],
        flow.row_keys(np.array([0])),
        jnp.int32(case["window_start"]),
        grid,
        settings,
        step_noise=data["grpo.step_noise"][:, None],
    )
    golden.assert_close(rolled.latents[0], data["grpo.latents"], TOLERANCE, "stored latents")
    golden.assert_close(rolled.log_probs[0], data["grpo.logprobs_rollout"], TOLERANCE, "log-probs")
    golden.assert_close(rolled.final[0], data["grpo.final_latent"], TOLERANCE, "final latents")
    times = settings.flow.times[np.asarray(rolled.steps)]
    golden.assert_close(times, data["grpo.timesteps"], 1e-6, "times")


def test_policy_step_gives_the_log_probs_and_gradients_of_the_reference() -> None:
    data, (case, settings, grid) = golden.tensors(), grpo_case()
    stored, size = data["grpo.latents"], case["window_size"]
    contexts = flow.Contexts(kv.repeat(read(["text"]), size))
    steps = case["window_start"] + jnp.arange(size)

    @jax.jit
    def loss(model):
        rows = flow.branches(model, contexts, settings.flow.guidance)
        taken = flow.policy_step(model, rows, stored[:-1], steps, grid, settings, sample=stored[1:])
        ratio = jnp.exp(taken.log_prob - data["grpo.logprobs_old"])
        clipped = jnp.clip(ratio, 1 - case["clip"], 1 + case["clip"])
        a = data["grpo.advantage"]
        return jnp.mean(jnp.maximum(-a * ratio, -a * clipped)), taken.log_prob

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(golden.model())
    golden.assert_close(new, data["grpo.logprobs_new"], TOLERANCE, "log-probs")
    golden.assert_close(value, data["grpo.policy_loss"], TOLERANCE, "loss")
    entries = tuple(e for e in table.model_table(golden.config()) if "_moe_gen" in e.torch)
    grads = table.module_to_torch(grads, entries)
    assert len(grads) == sum(name.startswith("grpo.grad.") for name in data)
    for name, got in grads.items():
        golden.assert_close(got, data[f"grpo.grad.{name}"], TOLERANCE, name)

"""Weights of eight bits: what they hold, how far they are from the whole ones, and what it costs in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unichar_jax.checkpoint import store
from unichar_jax.config.compute import Compute
from unichar_jax.data import templates
from unichar_jax.data.tokenizer import load_tokenizer
from unichar_jax.models import int8, lora, params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.text import TextSettings
from workshop.miniworld import unnamed

MINI = Path(__file__).parents[2] / "checkpoints" / "mini"
BFLOAT16 = Compute(dtype="bfloat16")


def kernels(model: UnifiedModel) -> dict[str, jax.Array]:
    flat = params.flat(model)
    return {n: x for n, x in flat.items() if n.endswith(".kernel") and n.startswith("decoder.layers.")}


@pytest.fixture(scope="module")
def whole() -> UnifiedModel:
    return store.load_model(MINI, compute=BFLOAT16, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def small() -> UnifiedModel:
    return store.load_model(MINI, compute=BFLOAT16, dtype=jnp.bfloat16, weights="int8")


def test_each_weight_is_within_half_a_step(whole: UnifiedModel, small: UnifiedModel) -> None:
    held, scales = kernels(small), params.flat(small)
    assert len(held) == 14
    for name, kernel in kernels(whole).items():
        q, scale = held[name], scales[name.replace(".kernel", ".scale")][:, None]
        assert q.dtype == np.int8
        assert int(jnp.abs(q).max()) == 127
        np.testing.assert_array_equal(scale, scale.astype(jnp.bfloat16))  # casting it loses nothing
        error = jnp.abs(q * scale - kernel.astype(jnp.float32))
        # The largest weight of a channel may lie a rounding of the scale beyond 127.
        assert float((error / scale).max()) <= 0.5 + 127 * 2**-8
        assert float((error / scale <= 0.5).mean()) > 0.99


def test_a_channel_of_zeros_and_one_large_weight() -> None:
    kernel = jnp.zeros((4, 3)).at[1, 2].set(-1e4).at[0, 2].set(30.0)
    q, scale = int8.packed(kernel)
    np.testing.assert_array_equal(q[:, :2], 0)
    assert np.all(np.isfinite(scale))
    np.testing.assert_array_equal(q[:2, 2], [0, -127])


def test_everything_else_is_as_it_was(whole: UnifiedModel, small: UnifiedModel) -> None:
    had, has = params.flat(whole), params.flat(small)
    assert {n for n in has if n not in had} == {n.replace(".kernel", ".scale") for n in kernels(small)}
    for name in set(had) - set(kernels(whole)):
        np.testing.assert_array_equal(np.asarray(has[name]), np.asarray(had[name]))


def test_projections_take_half_of_their_memory(whole: UnifiedModel, small: UnifiedModel) -> None:
    size = lambda model: sum(x.nbytes for x in kernels(model).values())  # noqa: E731
    assert size(small) * 2 == size(whole)
    scales = sum(x.nbytes for n, x in params.named_leaves(small) if n.endswith(".scale") and "norm" not in n)
    assert scales < 0.04 * size(small)  # of a model 192 wide; 0.1 % of BAGEL's


def test_adapters_go_around_it_and_merge_into_it(whole: UnifiedModel, tmp_path: Path) -> None:
    """A base with adapters is what its dequantised base with them is; a step with adapters is merged, then packed."""
    small = store.load_model(MINI, compute=Compute(dtype="float32"), dtype=jnp.float32, weights="int8")
    places = {"und.q": 4, "gen.down": 2}
    declared = lora.declare(UnifiedModel(small.cfg), places)
    rng = np.random.default_rng(0)
    arrays = {
        n: jnp.asarray(rng.normal(size=s.shape, scale=0.1), jnp.float32)
        for n, s in params.named_leaves(declared)
        if "lora_" in n
    }
    adapted = lora.adapted(small, arrays)
    flat = params.flat(adapted)
    plain = UnifiedModel(small.cfg, Compute(dtype="float32"))

    def dequantised(name: str, _: params.ArraySpec) -> jax.Array:
        scale = flat.get(name.replace(".kernel", ".scale")) if name.endswith(".kernel") else None
        return flat[name] if scale is None else flat[name] * scale[..., None, :]

    same = params.map_named(dequantised, lora.declare(plain, places))
    ids = jnp.asarray(rng.integers(8, 200, (1, 12)))
    hidden = [said(m, ids) for m in (adapted, same, small)]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=2e-3, atol=2e-3)
    assert np.abs(hidden[0] - hidden[2]).max() > 0.1

    name = "decoder.layers.und.q.kernel"
    kernel = kernels(whole)[name].astype(jnp.float32)
    made = int8.small_form(name, kernel, arrays)
    merged = kernel + arrays["decoder.layers.und.q.lora_a"] @ arrays["decoder.layers.und.q.lora_b"]
    expected = int8.small_form(name, merged, {})
    difference = np.abs(made[name].astype(int) - expected[name].astype(int))
    assert difference.max() <= 1  # the product's rounding
    assert float(np.mean(difference > 0)) < 1e-2


def said(model: UnifiedModel, ids: jax.Array) -> np.ndarray:
    from unichar_jax.sampling import cache as kv

    cache = kv.empty(model, 1, 16)
    return np.asarray(jax.jit(kv.read_text)(model, cache, ids, jnp.array([ids.shape[1]]))[0], np.float32)


@pytest.mark.slow
def test_greedy_texts_agree_with_those_of_bfloat16(whole: UnifiedModel, small: UnifiedModel) -> None:
    """Replies and answers to questions about pictures, as an evaluation asks for them: 98 % of tokens agree."""
    records = [unnamed.unnamed_sample(5000 + i) for i in range(24)]
    tokenizer, agree, total = load_tokenizer(MINI, whole.cfg), 0, 0
    settings = TextSettings(max_tokens=64)
    texts: list[list[str]] = []
    for model in (whole, small):
        with Engine(model, None, tokenizer) as engine:
            told = [
                templates.dialogue(r["name"], r["full_profile"], r["opening"], r["user"], []) for r in records
            ]
            replies = engine.generate_text(told, None, settings)
            asked = [(Image.fromarray(r["image"]), q["question"]) for r in records for q in r["vqa"][:4]]
            answers = engine.generate_text(
                [q for _, q in asked], [i for i, _ in asked], replace(settings, max_tokens=12)
            )
            texts.append([*replies, *answers])
    for a, b in zip(*texts, strict=True):
        ids = [tokenizer.encode(t) for t in (a, b)]
        agree += sum(x == y for x, y in zip(*ids, strict=False))
        total += max(map(len, ids))
    print(f"{agree} of {total} tokens agree: {100 * agree / total:.1f} %")
    assert total > 800
    assert agree >= 0.98 * total

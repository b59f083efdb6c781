"""Guidance, sampling and rollouts: what must be equal, and what must not be computed."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from unichar_jax.errors import UserError
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.flow import Contexts, FlowSettings, Guidance, RolloutSettings
from unichar_jax.sampling.schedule import Noising
from unichar_jax.sampling.tracing import compilations

from .conftest import CONFIG

GRID = (2, 3)
GUIDANCE = Guidance(4.0, 2.0)


def noise(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 6, CONFIG.latent_dim)).astype(np.float32)


@pytest.fixture(scope="module")
def read(model: UnifiedModel, prompts) -> kv.KVCache:
    return kv.prefill_text(model, kv.empty(model, 3, 16), *prompts)


def apart(a: jax.Array, b: jax.Array) -> float:
    """Their difference as a share of the second, in norm."""
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


@functools.partial(jax.jit, static_argnums=4)
def guided(model, contexts, x, t, guidance, acts=None):
    rows = flow.branches(model, contexts, guidance)
    return flow.guided_velocity(model, rows, x, t, GRID, guidance, acts)


@jax.jit
def plain(model, cache, x, t):
    return flow.velocity(model, cache, x, t, GRID)


# -- combining branches, against the formulas in plain numpy -----------------------------------------------


@pytest.mark.parametrize("renorm", flow.RENORMS)
@pytest.mark.parametrize("image", [False, True])
def test_branches_are_combined_by_the_published_formulas(renorm: str, image: bool) -> None:
    full, no_text, no_image = (noise(3, seed) for seed in (1, 2, 3))
    guidance = Guidance(3.0, 1.5, renorm_min=0.7, renorm=renorm)
    got = flow.guide(full, no_text, no_image if image else None, guidance)
    for row in range(3):  # one picture at a time, as the reference does
        vc, vu, vi = full[row], no_text[row], no_image[row]
        a = vu + 3.0 * (vc - vu)
        norm = functools.partial(np.linalg.norm, axis=-1, keepdims=True)
        if renorm == "text_channel":
            a = a * np.clip(norm(vc) / norm(a), 0.7, 1)
            expected = vi + 1.5 * (a - vi) if image else a
        else:
            b = vi + 1.5 * (a - vi) if image else a
            norm = np.linalg.norm if renorm == "global" else norm
            expected = b * np.clip(norm(vc) / norm(b), 0.7, 1)
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-5)


def test_guidance_of_a_velocity_of_zero_has_a_finite_gradient() -> None:
    zero = np.zeros((1, 6, 4), np.float32)
    grad = jax.grad(lambda v: flow.guide(v, zero, None, Guidance()).sum())(zero)
    assert np.all(np.isfinite(grad))


# -- branches ------------------------------------------------------------------------------------------------


def test_scales_of_one_drop_branches(model: UnifiedModel, read: kv.KVCache) -> None:
    other = kv.truncate(read, np.array([1, 1, 1]))
    count = lambda *scales, **c: flow.branches(model, Contexts(read, **c), Guidance(*scales)).count  # noqa: E731
    assert count(1.0, 2.0, no_image=other) == 1
    assert count(4.0, 1.0, no_image=other) == 2
    assert count(4.0, 2.0) == 2
    assert count(4.0, 2.0, no_image=other) == 3
    x = noise(3)
    off = guided(model, Contexts(read, no_image=other), x, 0.6, Guidance(1.0, 2.0))
    np.testing.assert_allclose(off, plain(model, read, x, 0.6), rtol=1e-4, atol=1e-5)


def test_two_branches_are_exactly_three_where_the_texts_are_all_there_is(
    model: UnifiedModel, read: kv.KVCache
) -> None:
    two = guided(model, Contexts(read), noise(3), 0.6, GUIDANCE)
    three = guided(model, Contexts(read, no_image=read), noise(3), 0.6, GUIDANCE)
    assert apart(two, three) <= 1e-5
    assert np.abs(two - guided(model, Contexts(read), noise(3), 0.6, Guidance(4.0))).max() > 1e-3


def test_rows_do_not_know_each_other(model: UnifiedModel, read: kv.KVCache) -> None:
    t = np.array([0.9, 0.5, 0.2], np.float32)
    together = guided(model, Contexts(read), noise(3), t, GUIDANCE)
    for row in range(3):
        one = Contexts(kv.take(read, np.array([row])))
        alone = guided(model, one, noise(3)[row : row + 1], t[row : row + 1], GUIDANCE)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_guidance_acts_where_it_is_told_to(model: UnifiedModel, read: kv.KVCache) -> None:
    acts = np.array([True, False, True])
    got = guided(model, Contexts(read), noise(3), 0.6, GUIDANCE, acts)
    on = guided(model, Contexts(read), noise(3), 0.6, GUIDANCE)
    np.testing.assert_allclose(got[0], on[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], plain(model, read, noise(3), 0.6)[1], rtol=1e-4, atol=1e-5)


# -- sampling ------------------------------------------------------------------------------------------------


def test_steps_outside_the_interval_run_one_branch() -> None:
    settings = FlowSettings(50, 3.0, Guidance(interval=(0.4, 1.0)))
    assert settings.runs() == ((0, 41, True), (41, 49, False))
    inner = FlowSettings(50, 3.0, Guidance(interval=(0.4, 0.9))).runs()
    assert [on for *_, on in inner] == [False, True, False]
    assert inner[0][0] == 0
    assert inner[-1][1] == 49
    assert FlowSettings(15, 3.0, Guidance(interval=(0.0, 1.0))).runs() == ((0, 14, True),)


def test_sampling_is_the_plain_loop(model: UnifiedModel, read: kv.KVCache) -> None:
    # Few steps: a random model's flow magnifies rounding at each.
    settings = FlowSettings(3, 3.0, Guidance(4.0, 2.0, interval=(0.8, 1.0)))
    got = flow.sample_latents(model, Contexts(read), noise(3), GRID, settings)
    x, times = noise(3), settings.times
    assert [settings.guidance.acts(t) for t in times[:2]] == [True, False]
    for i in range(2):
        acts = settings.guidance.acts(times[i])
        v = guided(model, Contexts(read), x, times[i], GUIDANCE) if acts else plain(model, read, x, times[i])
        x = x - np.asarray(v) * (times[i] - times[i + 1])
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_other_scales_and_shifts_compile_nothing(model: UnifiedModel, read: kv.KVCache) -> None:
    flow.sample_latents(model, Contexts(read), noise(3), GRID, FlowSettings(5, 3.0, GUIDANCE))
    before = compilations()["_sample"]
    changed = FlowSettings(5, 3.2, Guidance(5.5, 1.2, renorm_min=0.3))
    other = flow.sample_latents(model, Contexts(read), noise(3), GRID, changed)
    assert compilations()["_sample"] == before
    assert np.all(np.isfinite(other))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("interval", [(0.4, 1.0), (0.4, 0.9), (0.0, 1.0)])
def test_chunks_of_steps_are_the_whole_loop_to_the_bit(model, read, monkeypatch, seconds, interval) -> None:
    monkeypatch.setattr(flow, "CHUNK_SECONDS", seconds)
    settings = FlowSettings(9, 3.0, Guidance(4.0, 2.0, interval=interval))
    contexts = Contexts(read, no_image=kv.truncate(read, np.array([1, 1, 1])))
    whole = flow.sample_latents(model, contexts, noise(3), GRID, settings)
    chunks = list(flow.sample_in_chunks(model, contexts, noise(3), GRID, settings))
    np.testing.assert_array_equal(chunks[-1], whole)
    # One step each, or 1 + 4 + the rest of each run of equal guidance.
    assert len(chunks) == 8 if not seconds else len(settings.runs()) < len(chunks) <= 2 + len(settings.runs())


def test_unguided_chunks_are_the_whole_loop_to_the_bit(model: UnifiedModel, read: kv.KVCache) -> None:
    settings = FlowSettings(6, 3.0, Guidance(1.0))
    whole = flow.sample_latents(model, Contexts(read), noise(3), GRID, settings)
    *_, last = flow.sample_in_chunks(model, Contexts(read), noise(3), GRID, settings)
    np.testing.assert_array_equal(last, whole)


def test_any_number_of_steps_and_any_interval_are_two_programs(model: UnifiedModel, read: kv.KVCache) -> None:
    def draw(steps: int, interval: tuple[float, float]) -> None:
        settings = FlowSettings(steps, 3.0, Guidance(3.0, interval=interval))
        for _ in flow.sample_in_chunks(model, Contexts(read), noise(3)[:, :4], (2, 2), settings):
            pass

    before = compilations().get("_some_steps", 0)
    draw(3, (0.8, 1.0))
    assert compilations()["_some_steps"] == before + 2
    for steps, interval in ((2, (0.8, 1.0)), (7, (0.4, 1.0)), (20, (0.3, 0.9))):
        draw(steps, interval)
    assert compilations()["_some_steps"] == before + 2


def test_noise_comes_from_the_seed_of_its_row() -> None:
    keys = flow.row_keys(np.array([5, 6, 5]))
    drawn = flow.draw_noise(keys, 0, GRID, 4)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    np.testing.assert_array_equal(flow.draw_noise(keys[1:2], 0, GRID, 4)[0], drawn[1])
    assert np.abs(flow.draw_noise(keys, 1, GRID, 4) - drawn).max() > 0.1


# -- rollouts ------------------------------------------------------------------------------------------------

SETTINGS = RolloutSettings(
    FlowSettings(7, 3.0, Guidance(4.0, interval=(0.5, 1.0))), Noising("sde", 0.8), 2, (0, 5)
)
roll = jax.jit(flow.rollout, static_argnums=(5, 6))


@pytest.mark.parametrize("start", [0, 3])
def test_a_rollout_is_sampling_with_a_window(model: UnifiedModel, read: kv.KVCache, start: int) -> None:
    keys = flow.row_keys(np.arange(6))
    shared = roll(model, Contexts(read), noise(3), keys, start, GRID, SETTINGS)
    spread = np.repeat(noise(3), 2, axis=0)
    wide = roll(model, Contexts(read), spread, keys, start, GRID, SETTINGS)
    assert apart(shared.latents, wide.latents) <= 1e-3  # seven steps of a model that magnifies rounding
    np.testing.assert_array_equal(shared.steps, [start, start + 1])
    # A group shares what lies before the window and nothing after it.
    pairs = np.asarray(shared.latents).reshape(3, 2, 3, 6, -1)
    np.testing.assert_allclose(pairs[:, 0, 0], pairs[:, 1, 0], rtol=1e-4, atol=1e-4)
    assert np.abs(pairs[:, 0, 1] - pairs[:, 1, 1]).max() > 1e-2
    if start == 0:
        np.testing.assert_allclose(shared.latents[:, 0], spread, rtol=1e-6)
    assert np.abs(np.asarray(shared.final) - np.asarray(shared.latents[:, -1])).max() > 1e-2


def test_the_update_sees_the_log_probs_of_the_rollout(model: UnifiedModel, read: kv.KVCache) -> None:
    keys = flow.row_keys(np.arange(3))
    rolled = roll(model, Contexts(read), noise(3), keys, 3, GRID, SETTINGS)

    @jax.jit
    def judge(cache, x, following, index):
        rows = flow.branches(model, Contexts(cache), SETTINGS.flow.guidance)
        return flow.policy_step(model, rows, x, index, GRID, SETTINGS, sample=following).log_prob

    # Step 3 is guided and step 4 is not; a batch of another size and order than the rollout's.
    order = np.array([2, 0])
    for j in range(2):
        got = judge(
            kv.take(read, order), rolled.latents[order, j], rolled.latents[order, j + 1], rolled.steps[j]
        )
        np.testing.assert_allclose(got, rolled.log_probs[order, j], rtol=1e-4)
    # Steps may differ by row.
    steps = np.array([4, 3])
    got = judge(
        kv.take(read, order),
        rolled.latents[order, steps - 3],
        rolled.latents[order, steps - 2],
        steps,
    )
    np.testing.assert_allclose(got, rolled.log_probs[order, steps - 3], rtol=1e-4)


def test_window_starts_cover_their_range() -> None:
    starts = {int(SETTINGS.draw_start(jax.random.key(i))) for i in range(40)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize(("size", "bounds"), [(0, (0, 5)), (3, (0, 2)), (2, (-1, 4)), (2, (0, 7))])
def test_windows_must_fit(size: int, bounds: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="window_range"):
        RolloutSettings(SETTINGS.flow, Noising(), size, bounds)


def test_an_unknown_renorm_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'channel'"):
        Guidance(renorm="chanel")

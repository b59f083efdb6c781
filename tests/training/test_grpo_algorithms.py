"""The algorithms' formulas on toy velocities, and the order of pictures in a round: no model is compiled."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.config.grpo import FlowGRPOConfig, GRPOConfig, NFTConfig, RolloutConfig
from unichar_jax.config.train import LoraConfig
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, schedule
from unichar_jax.training.grpo import rollouts
from unichar_jax.training.grpo.algorithm import Policies
from unichar_jax.training.grpo.flow_grpo import FlowGRPO, Item
from unichar_jax.training.grpo.nft import NFT
from unichar_jax.training.grpo.nft import Item as CleanItem
from unichar_jax.training.grpo.rollouts import Roller, Round, picture_keys, round_key, settings_of

ITEMS, TOKENS, WIDTH = 5, 3, 4
ADVANTAGES = jnp.array([1.0, -2.0, 0.0, 0.5, -0.25])


@pytest.fixture
def toy(monkeypatch):
    """A model is a number m, and its velocity at x is ``m x``."""
    monkeypatch.setattr(flow, "branches", lambda model, *_: model)
    monkeypatch.setattr(flow, "guided_velocity", lambda model, rows, x, *_: model * x)
    monkeypatch.setattr(flow, "velocity", lambda model, cache, x, t, grid: model * x)


class _Contexts:
    full = None


# -- Flow-GRPO ----------------------------------------------------------------------------------------------

OLD = 0.3


def _steps(solver: str) -> tuple[FlowGRPO, Item]:
    """Steps that a policy ``OLD`` drew from its keys."""
    settings = settings_of(
        RolloutConfig(num_timesteps=8, window_range=(0, 5), solver=solver, noise_level=0.7)
    )
    algorithm = FlowGRPO(FlowGRPOConfig(), settings, (1, TOKENS))
    keys = picture_keys(jax.random.key(0), ITEMS)
    x = flow.draw_noise(keys, 0, (1, TOKENS), WIDTH)
    step = jnp.arange(ITEMS)
    item = Item(x, x, jnp.zeros(ITEMS), step, keys)
    times = jnp.asarray(settings.flow.times)
    taken = schedule.step(
        settings.noising,
        x,
        OLD * x,
        times[step],
        times[step + 1],
        times[1],
        noise=algorithm._noise(item),
    )
    return algorithm, dataclasses.replace(item, next=taken.next, log_prob=taken.log_prob)


def _loss(algorithm, items, learner, reference=None, **switches):
    algorithm = dataclasses.replace(algorithm, cfg=dataclasses.replace(algorithm.cfg, **switches))
    return algorithm.loss(Policies(learner, None, reference), _Contexts(), items, ADVANTAGES)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("ratio_norm", [False, True])
@pytest.mark.parametrize("solver", ["sde", "cps"])
def test_before_any_update_the_ratio_is_one(solver: str, ratio_norm: bool):
    algorithm, items = _steps(solver)
    loss, metrics = _loss(algorithm, items, OLD, ratio_norm=ratio_norm)
    weight = 1 / algorithm._dt(items.step) if ratio_norm else 1
    np.testing.assert_allclose(loss, -ADVANTAGES * weight, rtol=2e-6)
    assert float(metrics["ratio_drift"].max()) <= 1e-6


@pytest.mark.usefixtures("toy")
def test_the_clip_cuts_on_the_side_of_the_advantage():
    algorithm, items = _steps("sde")
    far, wide = jnp.float32(2.0), dict(clip_low=0.3, clip_high=0.1)
    loss, metrics = _loss(algorithm, items, far, **wide)
    taken = algorithm._judge(far, _Contexts(), items)
    ratio = np.exp(np.asarray(taken.log_prob - items.log_prob))
    a = np.asarray(ADVANTAGES)
    np.testing.assert_allclose(loss, np.maximum(-a * ratio, -a * np.clip(ratio, 0.7, 1.1)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["clip_low"], ratio < 0.7)
    np.testing.assert_array_equal(metrics["clip_high"], ratio > 1.1)
    assert metrics["clip_low"].sum() > 0


@pytest.mark.usefixtures("toy")
def test_the_divergence_is_that_of_the_two_gaussians():
    algorithm, items = _steps("sde")
    learner, reference = jnp.float32(0.5), jnp.float32(0.1)
    plain, _ = _loss(algorithm, items, learner)
    loss, metrics = _loss(algorithm, items, learner, reference, kl=0.25)
    mu, mu_ref = (algorithm._judge(m, _Contexts(), items) for m in (learner, reference))
    times = np.asarray(algorithm.settings.flow.times)
    variance = np.asarray(mu.scale) ** 2 * (times[:-1] - times[1:])[np.asarray(items.step)]
    kl = np.square(np.asarray(mu.mean - mu_ref.mean)).mean(axis=(1, 2)) / (2 * variance)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, plain + 0.25 * kl, rtol=1e-4)


@pytest.mark.usefixtures("toy")
def test_the_normalised_ratio_has_no_bias_and_one_spread():
    """It equals the published form: (log ratio + mean(dmu^2) / 2 s^2) s, and the loss over |dt|."""
    algorithm, items = _steps("sde")
    learner = jnp.float32(0.35)
    loss, _ = _loss(algorithm, items, learner, ratio_norm=True, clip_low=0.9, clip_high=9.0)
    new, old = (algorithm._judge(jnp.float32(m), _Contexts(), items) for m in (learner, OLD))
    s = np.asarray(algorithm._std(new.scale, items.step))
    bias = np.square(np.asarray(new.mean - old.mean)).mean(axis=(1, 2)) / (2 * s**2)
    ratio = np.exp((np.asarray(new.log_prob - items.log_prob) + bias) * s)
    np.testing.assert_allclose(loss, -ADVANTAGES * ratio / algorithm._dt(items.step), rtol=1e-5)


# -- DiffusionNFT -------------------------------------------------------------------------------------------


def _clean(beta: float = 0.5, kl: float = 0.0) -> tuple[NFT, CleanItem]:
    settings = settings_of(RolloutConfig()).flow
    algorithm = NFT(NFTConfig(beta=beta, kl=kl), settings, (1, TOKENS))
    clean = jax.random.normal(jax.random.key(3), (ITEMS, TOKENS, WIDTH))
    return algorithm, CleanItem(clean, jnp.linspace(0.1, 0.9, ITEMS), picture_keys(jax.random.key(4), ITEMS))


@pytest.mark.usefixtures("toy")
def test_the_loss_of_nft_is_that_of_the_paper():
    algorithm, items = _clean(beta=0.5, kl=0.2)
    v, old, reference = 0.7, 0.4, 0.1
    loss, _ = algorithm.loss(Policies(v, old, reference), _Contexts(), items, ADVANTAGES)
    for i, a in enumerate(np.asarray(ADVANTAGES)):
        x0, t = np.asarray(items.clean[i]), float(items.t[i])
        x_t = (1 - t) * x0 + t * np.asarray(jax.random.normal(items.key[i], x0.shape))

        def error(m, x0=x0, t=t, x_t=x_t):
            d = x_t - t * m * x_t - x0
            return np.mean(d**2) / np.abs(d).mean()

        o = 0.5 + a / 10
        expected = 5 / 0.5 * (o * error(0.5 * old + 0.5 * v) + (1 - o) * error(1.5 * old - 0.5 * v))
        expected += 0.2 * np.mean(((v - reference) * x_t) ** 2)
        assert float(loss[i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_pulls_by_the_advantage(beta: float):
    """At the drawing policy the gradient is the advantage times that of the plain error, whatever beta."""
    algorithm, items = _clean(beta)

    def losses(v):
        return algorithm.loss(Policies(v, 0.4), _Contexts(), items, ADVANTAGES)[0]

    pull = np.asarray(jax.jacobian(losses)(jnp.float32(0.4)))
    unit = dataclasses.replace(algorithm, bound=1.0)

    def plain(v):  # advantage = bound: all positive
        return unit.loss(Policies(v, 0.4), _Contexts(), items, jnp.ones(ITEMS))[0]

    np.testing.assert_allclose(pull, ADVANTAGES * jax.jacobian(plain)(jnp.float32(0.4)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scales", [(), (1.0, 4.0)])
def test_members_of_a_group_take_turns_in_guidance(monkeypatch, scales):
    """Member g has scale g mod 2 and the noise of its own key, as without turns."""
    algorithm = NFT(NFTConfig(scales=scales), settings_of(RolloutConfig()).flow, (1, TOKENS))
    seen = []

    def sample_latents(model, contexts, noise, grid, settings):
        seen.append((settings.guidance.text_scale, np.asarray(contexts.full).tolist()))
        return noise + 100 * settings.guidance.text_scale

    monkeypatch.setattr(flow, "sample_latents", sample_latents)
    monkeypatch.setattr(kv, "take", lambda cache, rows: rows)
    prompts, group = 3, 4
    keys = picture_keys(jax.random.key(5), prompts * group)
    contexts: Any = SimpleNamespace(full=SimpleNamespace(batch=prompts))
    model: Any = SimpleNamespace(cfg=SimpleNamespace(latent_dim=WIDTH))
    final, record = algorithm.draw(model, contexts, keys, jnp.int32(0))
    assert record is final
    noise = flow.draw_noise(keys, 0, (1, TOKENS), WIDTH)
    turns = np.tile(scales or (1.0,), prompts * group // len(scales or (1.0,)))
    np.testing.assert_allclose(final, noise + 100 * turns[:, None, None], rtol=1e-6)
    rows = np.repeat(np.arange(prompts), group // len(scales or (1.0,))).tolist()
    assert seen == [(scale, rows) for scale in scales or (1.0,)]


def test_copies_of_a_picture_have_times_of_their_own():
    algorithm, _ = _clean()
    algorithm = dataclasses.replace(algorithm, cfg=NFTConfig(times=4))
    items = algorithm.items(jnp.zeros((100, TOKENS, WIDTH)), jax.random.key(0))
    assert items.clean.shape == (100, 4, TOKENS, WIDTH)
    shift = algorithm.settings.shift
    u = np.asarray(items.t / (shift - (shift - 1) * items.t))  # back through the schedule's shift
    assert (np.floor(u * 4 - 1e-6) == np.arange(4)).all()
    assert np.unique(np.asarray(jax.random.key_data(items.key)).reshape(400, -1), axis=0).shape[0] == 400


def test_the_drawing_policy_lags_more_and_more():
    algorithm, _ = _clean()
    assert [algorithm.decay(n) for n in (1, 100, 10_000)] == [0.001, 0.1, 0.5]


# -- the order of pictures ----------------------------------------------------------------------------------


class _Recorder:
    """An algorithm that keeps what it was asked for."""

    follows, kl = False, 0.0

    def draw(self, model, contexts, keys, start):
        prompts = jnp.repeat(contexts.full, keys.shape[0] // contexts.full.shape[0])
        record = (jax.random.key_data(keys), jnp.full(keys.shape, start), prompts)
        return jnp.zeros((keys.shape[0], 1, 1)), record


@pytest.mark.parametrize(("starts", "batch"), [((), 0), ((), 6), ((3, 0, 1), 0), ((3, 0, 1), 4)])
def test_pictures_do_not_depend_on_batches(monkeypatch, starts: tuple[int, ...], batch: int):
    monkeypatch.setattr(rollouts.kv, "take", lambda cache, rows: rows)
    monkeypatch.setattr(rollouts, "decode", lambda ae, latents, grid, patch: latents)
    cfg = GRPOConfig(
        prompts_per_round=6,
        group=6,
        lora=LoraConfig(rank=2, experts=("gen",)),
        rollout=RolloutConfig(batch=batch, window_starts=starts),
    )
    settings = settings_of(cfg.rollout)
    roll = Roller(cfg, _Recorder(), settings, (1, 1), 1)
    drawn = roll(None, None, None, Round(5, np.array([7, 1, 4, 2, 0, 3], np.int32)))
    keys, begin, prompts = drawn.record
    expected = jax.random.key_data(picture_keys(round_key(cfg.seed, 5, "picture"), 36))
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(prompts, np.repeat([7, 1, 4, 2, 0, 3], 6))
    if starts:
        np.testing.assert_array_equal(begin, np.tile(starts, 12))
    else:
        per_group = np.asarray(begin).reshape(6, 6)
        assert (per_group == per_group[:, :1]).all()
        a, b = settings.window_range
        assert (a <= per_group).all()
        assert (per_group <= b - settings.window_size).all()

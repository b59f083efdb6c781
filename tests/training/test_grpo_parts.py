"""Stage 2 without a model: advantages, rounds, configuration, rewards, questions, warnings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unichar_jax.config.grpo import GRPOConfig, NFTConfig, RewardTerm, RolloutConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import LoraConfig
from unichar_jax.data.rl_prompts import RLPrompt, RLQuestion
from unichar_jax.errors import UserError
from unichar_jax.scoring.base import References, ScoreContext, group_table
from unichar_jax.scoring.visual_questions import choices_of, distinct
from unichar_jax.training.grpo.advantages import EPSILON, group_advantages
from unichar_jax.training.grpo.rewards import RewardError, Rewards
from unichar_jax.training.grpo.rollouts import Rounds, grid_of, round_of, settings_of
from unichar_jax.training.grpo.run import read_references, split_prompts
from unichar_jax.training.grpo.watch import HackingWatch, best_and_worst

# -- advantages ---------------------------------------------------------------------------------------------


def test_an_advantage_is_relative_to_its_group():
    rewards, groups = np.array([1.0, 10, 3, 10, 5, 10]), np.array([7, 2, 7, 2, 7, 2])
    got = group_advantages(rewards, groups)
    std = np.sqrt(8 / 3)
    expected = np.array([-2, 0, 0, 0, 2, 0]) / (std + EPSILON)
    np.testing.assert_allclose(got.values, expected, rtol=1e-6)
    assert got.dead == 0.5
    assert got.std == pytest.approx(std / 2)


def test_whole_deviation_and_bound():
    rewards = np.array([0.0, 1, 0, 100])
    groups = np.array([0, 0, 1, 1])
    whole = group_advantages(rewards, groups, whole_std=True)
    np.testing.assert_allclose(whole.values, np.array([-0.5, 0.5, -50, 50]) / (rewards.std() + EPSILON), 1e-6)
    tight = group_advantages(rewards, groups, clip=0.5)
    assert np.abs(tight.values).max() == 0.5
    assert tight.clipped == 1.0


@settings(deadline=None)
@given(st.permutations(range(12)))
def test_order_of_pictures_does_not_matter(order: list[int]):
    """What a rank-local grouping would fail: groups scattered in any way have the statistics of whole
    groups."""
    rewards, groups = np.random.default_rng(0).normal(size=12), np.repeat([0, 1, 2], 4)
    plain, moved = group_advantages(rewards, groups), group_advantages(rewards[order], groups[order])
    np.testing.assert_allclose(moved.values, plain.values[order], rtol=1e-6)


# -- rounds -------------------------------------------------------------------------------------------------


def test_rounds_walk_through_all_prompts_equally():
    drawn = np.concatenate([round_of(n, 5, 3, seed=1).prompts for n in range(10)])
    assert np.bincount(drawn, minlength=5).tolist() == [6] * 5
    for epoch in range(6):
        assert sorted(drawn[epoch * 5 : epoch * 5 + 5]) == list(range(5))
    assert len({tuple(drawn[e * 5 : e * 5 + 5]) for e in range(6)}) > 1


def test_rounds_resume_inside_an_epoch():
    unbroken, broken = Rounds(7, 3, seed=4), Rounds(7, 3, seed=4)
    expected = [next(unbroken) for _ in range(6)]
    for _ in range(2):
        next(broken)
    resumed = Rounds(7, 3, seed=4)
    resumed.restore(json.loads(json.dumps(broken.state())))
    for want in expected[2:]:
        got = next(resumed)
        assert got.number == want.number
        np.testing.assert_array_equal(got.prompts, want.prompts)


# -- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(group=1), "at least 2 pictures"),
        (dict(updates=3), "not a multiple of updates 3"),
        (dict(rollout=RolloutConfig(window_starts=(0, 1, 2, 3, 2), window_range=(0, 5))), "every start"),
        (dict(rollout=RolloutConfig(batch=13)), "rollout.batch 13"),
        (dict(micro_batch=7), "micro_batch 7"),
        (dict(trainable="gen_expert"), "adapters need"),
        (dict(lora=LoraConfig(rank=4)), "only the generation expert"),
        (dict(reward=(RewardTerm("identity", 0.0),)), "no term has a positive weight"),
        (dict(reward=(RewardTerm("identity"), RewardTerm("identity"))), "named twice"),
    ],
)
def test_a_wrong_configuration_says_what_to_change(fields, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(**fields)


def test_windows_outside_of_their_range_are_refused():
    with pytest.raises(UserError, match="window_starts"):
        RolloutConfig(window_starts=(4,), window_range=(0, 5), window_size=2)
    with pytest.raises(UserError, match="window_range"):
        settings_of(RolloutConfig(num_timesteps=4, window_range=(0, 5)))
    with pytest.raises(UserError, match="beta"):
        NFTConfig(beta=0)


def test_pictures_have_sizes_that_the_model_can_draw():
    mini = model_preset("mini")
    assert grid_of(96, 64, mini) == (6, 4)
    with pytest.raises(UserError, match="try 96"):
        grid_of(100, 96, mini)


# -- prompts ------------------------------------------------------------------------------------------------


def _prompt(text: str, questions=()) -> RLPrompt:
    return RLPrompt(text, "Tess", text, tuple(questions), 1)


def test_held_out_prompts_do_not_depend_on_the_order_of_the_file():
    prompts = [_prompt(f"Tess {i}") for i in range(9)]
    training, held_out = split_prompts(prompts, 3)
    assert (len(training), len(held_out)) == (6, 3)
    again = split_prompts(prompts[::-1], 3)[1]
    assert {p.text for p in again} == {p.text for p in held_out}
    with pytest.raises(UserError, match="none is left"):
        split_prompts(prompts, 9)


def test_references_are_composited_on_white(tmp_path: Path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    references = read_references(tmp_path)
    assert len(references.pictures) == 1
    assert (references.pictures[0] == 255).all()
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png"):
        read_references(tmp_path)


# -- questions ----------------------------------------------------------------------------------------------


def _question(text: str, answer: str, kind: str, choices=(), weight: float = 1.0) -> RLQuestion:
    return RLQuestion(text, answer, kind, "", weight, False, tuple(choices))


def test_choices_begin_with_the_expected_answer():
    assert choices_of(_question("Is it?", "No", "yes_no")) == ("No", "yes")
    assert choices_of(_question("Where?", "beach", "multiple_choice", ["park", "Beach ", "city"])) == (
        "beach",
        "park",
        "city",
    )
    assert choices_of(_question("What?", "a hat", "open_ended")) == ("a hat",)


def test_questions_count_once():
    questions = [
        _question("Is it red?", "yes", "yes_no"),
        _question("is it  red?", "yes", "yes_no"),
        _question("Empty?", " ", "open_ended"),
    ]
    assert distinct(questions) == questions[:1]


# -- rewards ------------------------------------------------------------------------------------------------


class _Scorer:
    def __init__(self, function):
        self.name, self._function = "own", function

    def __call__(self, images, context: ScoreContext):
        return self._function(images, context)


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
PROMPTS = [_prompt("Tess")] * 6
GROUPS = np.repeat([0, 1], 3)


def _score(function):
    import jax.numpy as jnp

    rewards = Rewards([RewardTerm("files/own.py:bright", 2.0)], [_Scorer(function)], References())
    return rewards(jnp.asarray(IMAGES), PROMPTS, GROUPS)


def test_a_reward_is_the_weighted_sum_of_its_terms():
    scores = _score(lambda images, _: images.mean(axis=(1, 2, 3)))
    expected = IMAGES.mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(scores.terms["bright"], expected, rtol=1e-5)
    np.testing.assert_allclose(scores.rewards, 2 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, _: np.full(6, np.nan), "not finite"),
        (lambda images, _: np.zeros(5), r"shape \(6,\), got shape \(5,\)"),
        (lambda images, _: "good", "'bright'"),
        (lambda images, _: 1 / 0, "bright.*ZeroDivisionError"),
    ],
)
def test_a_bad_reward_names_its_term(function, message):
    with pytest.raises(RewardError, match=message):
        _score(function)


def test_diversity_of_a_group_is_whole_wherever_its_pictures_are():
    """Distances to all others of the group, so shuffling changes nothing and pictures differ in credit."""
    order = np.random.default_rng(1).permutation(6)

    def credit(images, groups):
        index, _ = group_table(groups)
        flat = images.reshape(6, -1)
        out = np.zeros(6)
        for members in index:
            apart = np.abs(flat[members][:, None] - flat[members][None]).mean(-1)
            out[members] = apart.sum(1) / 2
        return out

    plain, moved = credit(IMAGES / 255, GROUPS), credit(IMAGES[order] / 255, GROUPS[order])
    np.testing.assert_allclose(moved, plain[order])
    assert plain[:3].std() > 0


# -- looking at a run ---------------------------------------------------------------------------------------


def test_the_warning_needs_both_signs():
    def last(rewards, spreads):
        watch = HackingWatch(window=3)
        return [watch.add(r, s) for r, s in zip(rewards, spreads, strict=True)][-1]

    rising, level = [0.1, 0.12, 0.11, 0.5, 0.6, 0.7], [0.1, 0.12, 0.11, 0.1, 0.12, 0.11]
    falling, steady = [1.0, 1, 1, 0.6, 0.5, 0.4], [1.0, 1, 1, 1, 1, 1]
    assert "trick" in (last(rising, falling) or "")
    assert last(rising, steady) is None
    assert last(level, falling) is None
    records = [dict(reward=r, spread=s) for r, s in zip(rising[:-1], falling[:-1], strict=True)]
    assert HackingWatch.resumed(records, window=3).add(rising[-1], falling[-1])


def test_the_sheet_shows_the_best_and_the_worst():
    images = np.stack([np.full((16, 16, 3), i, np.uint8) for i in range(8)])
    rewards = np.array([0.0, 1, 2, 3, 0, 9, 1, 2])
    sheet = np.asarray(best_and_worst(images, rewards, ["Tess"] * 8, group=4, rows=1))
    assert sheet.shape == (40, 32, 3)
    assert sheet[-1, 0].tolist() == [5] * 3  # of the group with the widest range
    assert sheet[-1, -1].tolist() == [4] * 3


def test_presets_are_valid():
    from unichar_jax.config import presets

    names = [n for n in presets.available() if n.startswith("grpo")]
    assert "grpo-reference" in names
    for name in names:
        cfg = presets.load(GRPOConfig, name)
        assert dataclasses.replace(cfg) == cfg


def test_the_reference_preset_is_what_was_published():
    from unichar_jax.config import presets

    cfg = presets.load(GRPOConfig, "grpo-reference")
    assert (cfg.algorithm, cfg.pictures, cfg.group, cfg.updates) == ("flow_grpo", 384, 8, 2)
    r = cfg.rollout
    assert (r.height, r.num_timesteps, r.text_scale, r.noise_level, r.window_size) == (1024, 15, 4.0, 1.3, 3)
    assert r.window_starts == (3, 1, 0, 1, 1, 4, 4, 2)
    assert (cfg.flow_grpo.clip_low, cfg.flow_grpo.clip_high, cfg.flow_grpo.kl) == (1e-5, 1e-5, 0)
    assert [t.weight for t in cfg.reward] == [0.3, 0.45, 0.1, 0.15]

"""Mixtures and the order of draws: weights are kept at every moment, and nothing is drawn too often."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.data.mixture import (
    RECIPES,
    Schedule,
    SourceKey,
    recipe_by_name,
    recipe_from_weights,
    resolve,
)
from unichar_jax.errors import UserError

COUNTS = {
    SourceKey(task, who): n
    for who in ("Bo", "Tess")
    for task, n in {
        "t2i": 4,
        "t2i_with_thinking": 4,
        "pure_t2i": 4,
        "vlm": 4,
        "vlm_extension": 60,
        "vlm_thinking": 4,
        "knowledge_qa": 20,
        "vqa": 80,
    }.items()
}


def schedule(weights: list[float], seed: int = 0, size: int = 7) -> Schedule:
    keys = [SourceKey(f"task{i // 2}", f"who{i % 2}") for i in range(len(weights))]
    sizes = [np.arange(size + i) * 10 + 5 for i in range(len(weights))]
    return Schedule(keys, weights, sizes, seed)


weight_lists = st.lists(st.floats(0.001, 10), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(weight_lists, st.integers(0, 3))
def test_every_prefix_keeps_the_weights_of_tasks(weights, seed):
    order = schedule(weights, seed)
    draws = order.draws(order.start, 300)
    share = np.array(weights) / sum(weights)
    tasks = np.array([d.source // 2 for d in draws])
    for task in range((len(weights) + 1) // 2):
        expected = share[2 * task : 2 * task + 2].sum() * np.arange(1, 301)
        seen = np.cumsum(tasks == task)
        # evenly spaced series merged by time: each is at most one draw off, and so is their sum
        assert np.abs(seen - expected).max() < 1 + len(weights) * share[2 * task : 2 * task + 2].sum()


@settings(max_examples=40, deadline=None)
@given(weight_lists, st.integers(0, 250), st.integers(0, 3))
def test_the_order_can_start_anywhere(weights, cut, seed):
    order = schedule(weights, seed)
    whole = order.draws(order.start, 300)
    middle = order.after(order.start, whole[:cut])
    assert schedule(weights, seed).draws(middle, 300 - cut) == whole[cut:]
    assert order.after(order.start, whole) == order.after(middle, whole[cut:])


def test_no_sample_comes_again_before_all_have_come():
    order = schedule([1.0, 2.0, 0.5])
    per_source = collections.defaultdict(list)
    for draw in order.draws(order.start, 400):
        assert draw.number == len(per_source[draw.source])
        per_source[draw.source].append(draw.sample)
    orders = set()
    for source, seen in per_source.items():
        size = 7 + source
        for turn in range(len(seen) // size):
            one = seen[turn * size : (turn + 1) * size]
            assert sorted(one) == list(range(size))
            orders.add(tuple(one))
    assert len(orders) > 10  # each pass has its own order


def test_large_and_small_samples_alternate():
    keys = [SourceKey("vqa", "Bo")]
    sizes = np.repeat([100, 4900], 100)
    order = Schedule(keys, [1.0], [sizes], seed=3)
    drawn = sizes[[d.sample for d in order.draws(order.start, 200)]]
    for start in range(0, 190, 5):
        assert abs((drawn[start : start + 10] == 4900).sum() - 5) <= 1


def test_the_seed_changes_the_order_and_nothing_else_does():
    draws = [schedule([1.0, 2.0], seed).draws((0, 0), 50) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_reference_recipes_weigh_texts_by_their_number():
    weights = resolve(recipe_by_name("_full"), COUNTS).task_weights()
    assert weights["t2i"] == pytest.approx(weights["pure_t2i"]) == pytest.approx(0.8 / 3)
    assert weights["vqa"] / weights["knowledge_qa"] == pytest.approx(4)
    assert sum(weights.values()) == pytest.approx(1)
    assert set(resolve(RECIPES["base"], COUNTS).task_weights()) == {"t2i", "vlm"}


def test_the_default_draws_looks_and_speaks():
    mixture = resolve(RECIPES["default"], COUNTS)
    weights = mixture.task_weights()
    assert weights["vqa"] == pytest.approx(0.25)
    assert weights["t2i"] == weights["pure_t2i"] == pytest.approx(0.25 / 3)
    assert weights["knowledge_qa"] == pytest.approx(0.125)
    assert any("t2i_generation_instruction_only" in note for note in mixture.notes)


def test_characters_share_a_task_by_their_weights():
    mixture = resolve(recipe_from_weights({"vqa": 3, "t2i": 1}), COUNTS, {"Bo": 3.0})
    weights = dict(zip(mixture.keys, mixture.weights, strict=True))
    assert weights[SourceKey("vqa", "Bo")] == pytest.approx(0.75 * 0.75)
    assert weights[SourceKey("t2i", "Tess")] == pytest.approx(0.25 * 0.25)
    only = resolve(recipe_from_weights({"vqa": 1, "t2i": 0}), COUNTS, {"Bo": 0.0})
    assert only.keys == (SourceKey("vqa", "Tess"),)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(UserError, match=r"'extention' is unknown \(did you mean 'extension'\?\)"):
        recipe_by_name("extention")
    with pytest.raises(UserError, match=r"did you mean 'vqa'"):
        recipe_from_weights({"vqq": 1.0})
    with pytest.raises(UserError, match=r"'Boo' is not in the data \(did you mean 'Bo'\?\)"):
        resolve(RECIPES["base"], COUNTS, {"Boo": 1.0})
    with pytest.raises(UserError, match=r"no sample for any task of the recipe \(t2i, vlm\)"):
        resolve(RECIPES["base"], {SourceKey("vqa", "Bo"): 3})

"""Intervals whose answer is known."""

import numpy as np
import pytest

from unichar_jax.evaluation.stats import mean_interval, paired_difference


def one_character(values, seeds=1):
    return {"pip": {f"item {i}": dict.fromkeys(range(seeds), float(v)) for i, v in enumerate(values)}}


def test_proportion_has_the_normal_interval():
    values = one_character([0, 1] * 200)
    found = mean_interval(values, resamples=20_000)
    assert found.mean == 0.5
    assert found.items == 400
    half = 1.96 * np.sqrt(0.25 / 400)
    assert found.low == pytest.approx(0.5 - half, abs=0.004)
    assert found.high == pytest.approx(0.5 + half, abs=0.004)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        found = mean_interval(one_character(rng.normal(3.0, 2.0, 40)), resamples=400)
        hits += found.low <= 3.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_seeds_of_one_prompt_are_no_new_prompts():
    values = np.random.default_rng(2).normal(size=12)
    assert mean_interval(one_character(values, seeds=1)) == mean_interval(one_character(values, seeds=9))


def test_characters_count_alike_and_do_not_widen():
    values = {"few": one_character([0.0] * 3)["pip"], "many": one_character([1.0] * 30)["pip"]}
    found = mean_interval(values)
    assert (found.mean, found.low, found.high, found.items) == (0.5, 0.5, 0.5, 33)


def test_pairing_removes_what_items_have_in_common():
    hard = np.random.default_rng(3).normal(0, 10, 30)
    first, second = one_character(hard), one_character(hard + 0.5)
    assert not paired_difference(first, one_character(hard)).excludes_zero
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.5)
    assert difference.low == pytest.approx(0.5)
    assert difference.excludes_zero
    apart = mean_interval(second).low - mean_interval(first).high
    assert apart < 0  # the unpaired intervals overlap widely


def test_only_shared_items_and_seeds_are_compared():
    first = {"pip": {"a": {0: 1.0, 1: 100.0}, "b": {0: 5.0}}, "luna": {"c": {0: 1.0}}}
    second = {"pip": {"a": {0: 2.0}, "d": {0: 9.0}}}
    assert paired_difference(first, second).mean == 1.0
    assert paired_difference(first, {"luna": {"x": {0: 1.0}}}) is None


def test_one_item_has_a_mean_and_no_interval():
    found = mean_interval(one_character([0.7]))
    assert (found.mean, found.low, found.high) == (0.7, None, None)
    assert not found.excludes_zero
    assert mean_interval({}) is None
    assert mean_interval({"pip": {}}) is None


def test_the_same_values_give_the_same_interval():
    values = one_character(np.random.default_rng(4).normal(size=20))
    assert mean_interval(values) == mean_interval(values)

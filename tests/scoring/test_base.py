"""The interface of scorers: references, groups, batches, caches, checks, the weighted sum."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unichar_jax.errors import UserError
from unichar_jax.scoring.base import (
    FeatureCache,
    References,
    ScoreContext,
    checked_scores,
    group_table,
    in_batches,
    weighted_sum,
)

CONTEXT = ScoreContext(["a", "b"], np.arange(2))


def test_references_are_composited_on_white_and_known_by_content():
    clear = Image.new("RGBA", (6, 5), (0, 0, 0, 0))
    clear.putpixel((2, 3), (200, 10, 10, 255))
    solid = Image.new("RGB", (6, 5), (255, 255, 255))
    solid.putpixel((2, 3), (200, 10, 10))
    references = References.of([clear, solid, Image.new("RGB", (5, 6), (255, 255, 255))])
    np.testing.assert_array_equal(references.pictures[0], np.asarray(solid))
    assert references.keys[0] == references.keys[1] != references.keys[2]


def test_scores_by_name_and_their_sum():
    scores = {name: checked_scores(name, x, CONTEXT) for name, x in (("a", [1, 2]), ("b", jnp.ones(2)))}
    np.testing.assert_array_equal(weighted_sum(scores, {"a": 0.5}), [0.5, 1.0])
    np.testing.assert_array_equal(weighted_sum(scores, {"a": 0.5, "b": -1}), [-0.5, 0.0])
    with pytest.raises(UserError, match=r"no scorer 'aa' \(did you mean 'a'\?\)"):
        weighted_sum(scores, {"aa": 1.0})
    with pytest.raises(UserError, match="at least one"):
        weighted_sum(scores, {})


@pytest.mark.parametrize("scores", [[1.0], np.full((2, 1), 1.0), [1, np.nan]])
def test_a_scorer_that_returns_nonsense_is_named(scores):
    with pytest.raises(UserError, match="scorer 'odd'"):
        checked_scores("odd", scores, CONTEXT)


def test_group_table():
    index, valid = group_table([7, 3, 7, 7, 3])
    np.testing.assert_array_equal(index, [[1, 4, 0], [0, 2, 3]])
    np.testing.assert_array_equal(valid, [[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_in_batches_calls_one_shape(count):
    shapes = []

    def double(x):
        shapes.append(x.shape)
        return 2 * x

    x = np.arange(3.0 * count).reshape(count, 3)
    np.testing.assert_array_equal(in_batches(double, x, 4), 2 * x)
    assert set(shapes) == {(min(count, 4), 3)}


def test_cache_computes_each_content_once():
    cache, asked = FeatureCache(), []

    def compute(places):
        asked.append(places)
        return [np.full(2, i) for i in places]

    np.testing.assert_array_equal(cache.get(["a", "b", "a"], compute)[:, 0], [2, 1, 2])
    np.testing.assert_array_equal(cache.get(["b", "c"], compute)[:, 0], [1, 1])
    assert asked == [[2, 1], [1]]

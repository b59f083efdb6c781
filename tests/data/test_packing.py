"""Packing by plan: valid, complete, deterministic, and full on mixtures of every kind."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.data.capacities import HIGH, LOW, derive_capacities, try_capacities
from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import (
    RECIPES,
    Mixture,
    Schedule,
    SourceKey,
    recipe_from_weights,
    resolve,
)
from unichar_jax.data.packing import Planner, longest_fit, pack

_size = st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 7, 30, 49]), st.sampled_from([0, 0, 10, 41]))
CAPACITIES = (60, 50, 45)


@settings(max_examples=150, deadline=None)
@given(st.lists(_size, min_size=1, max_size=40), st.integers(1, 6), st.sampled_from([2.0, 0.2]))
def test_packed_rows_hold_their_samples(sizes, rows, spread):
    sizes = np.array(sizes)
    where = pack(sizes, CAPACITIES, rows, spread)
    if where is None:
        assert rows < len(sizes)  # with a row for each sample there is always a way
        return
    assert where.shape == (len(sizes),)
    assert where.min() >= 0
    assert where.max() < rows
    for row in range(rows):
        assert (sizes[where == row].sum(axis=0) <= CAPACITIES).all()


def test_exchanges_find_what_greed_misses():
    # best fit puts 30 with 20 and strands one 25: 30 + 25, 30 + 25 and 20 + ... need an exchange
    sizes = np.array([[1, 0, s] for s in (26, 26, 24, 24, 20, 20, 20)])
    where = pack(sizes, (10, 0, 60), 3)
    assert where is not None
    for row in range(3):
        assert sizes[where == row, 2].sum() <= 60


@settings(max_examples=40, deadline=None)
@given(st.lists(_size, min_size=1, max_size=60), st.integers(1, 4))
def test_the_longest_run_is_a_packed_prefix(sizes, rows):
    sizes = np.array(sizes)
    taken, where = longest_fit(sizes, CAPACITIES, rows)
    assert min(rows, len(sizes)) <= taken == len(where)
    for row in range(rows):
        assert (sizes[:taken][where == row].sum(axis=0) <= CAPACITIES).all()


def synthetic(
    seed: int = 0, who: int = 2, sides: Sequence[int] = (378, 512, 700, 980)
) -> dict[SourceKey, np.ndarray]:
    """Sizes like those of real characters, other ones for each seed."""
    rng = np.random.default_rng(seed)
    sizes = {}
    for c in range(who):
        pictures = int(rng.integers(6, 13))
        side = rng.choice(sides, pictures)
        look = np.round(side / 14).astype(int) ** 2
        draw = np.round(np.maximum(side, 512) / 16).astype(int) ** 2
        texts = {
            "t2i": (154, draw, 2),
            "t2i_with_thinking": (355, draw, 2),
            "pure_t2i": (42, draw, 2),
            "vlm_extension": (178, np.zeros(180, int), 0),
            "knowledge_qa": (23, np.zeros(100, int), 0),
            "vlm_thinking": (475, np.zeros(pictures, int), 0),
            "vqa": (42, np.repeat(look, 20), 1),
        }
        for task, (text, image, stream) in texts.items():
            columns = np.zeros((len(image), 3), int)
            columns[:, 0] = np.maximum(8, rng.normal(text, text / 6, len(image)))
            columns[:, stream] += image
            sizes[SourceKey(task, f"who{c}")] = columns
    return sizes


def planned(recipe, sizes, tokens=12288, capacities=None) -> tuple[Planner, Mixture, list]:
    mixture = resolve(recipe, {k: len(s) for k, s in sizes.items()})
    ordered = [sizes[key] for key in mixture.keys]
    if capacities is None:
        capacities = derive_capacities(mixture, ordered, tokens, 0, 50).sizes
    schedule = Schedule(mixture.keys, mixture.weights, [s.sum(1) for s in ordered], 0)
    return Planner(schedule, ordered, capacities, 50), mixture, ordered


def measure(planner: Planner, mixture: Mixture, sizes: list, sequences: int = 200):
    """Fill, frequencies against weights, and the longest wait, over the first sequences."""
    used = np.zeros(3)
    counts: collections.Counter[str] = collections.Counter()
    placed = {}
    for n in range(sequences):
        for draw in planner.sequence(n):
            used += sizes[draw.source][draw.sample]
            counts[mixture.keys[draw.source].task] += 1
            placed[draw.source, draw.number] = n
    total = sum(counts.values())
    worst = max(abs(counts[t] / total / w - 1) for t, w in mixture.task_weights().items())
    # in a loader without lookahead, draw i of N would be in sequence i * sequences / N
    order = planner.schedule.draws(planner.schedule.start, total)
    waits = [placed[d.source, d.number] - i * sequences // total for i, d in enumerate(order)]
    return used.sum() / (planner.capacities.total * sequences), worst, max(waits)


def test_rows_are_full_and_frequencies_kept():
    planner, mixture, sizes = planned(RECIPES["default"], synthetic(0))
    fill, worst, wait = measure(planner, mixture, sizes)
    assert fill >= 0.95
    assert worst <= 0.02
    assert wait <= 50


@pytest.mark.parametrize(
    ("sides", "least"),
    [((980,), 0.83), ((854,), 0.64), ((378,), 0.95), ((480, 560, 980, 980, 980, 980), 0.92)],
)
def test_weights_are_exact_for_pictures_of_any_size(sides, least):
    """A few sizes, such as all photographs of one camera: no capacities fill with these weights, which stay."""
    planner, mixture, sizes = planned(RECIPES["default"], synthetic(1, who=1, sides=sides))
    assert 11_000 <= planner.capacities.total <= 13_000
    weights = mixture.task_weights()  # synthetic characters lack one drawing task and plain dialogue
    assert [weights[t] for t in ("t2i", "t2i_with_thinking", "pure_t2i")] == pytest.approx([0.25 / 3] * 3)
    assert weights["vqa"] == pytest.approx(0.25)
    assert weights["vlm_extension"] == pytest.approx(0.5 * 0.5 / 0.9)
    fill, worst, wait = measure(planner, mixture, sizes)
    assert fill >= least
    assert worst <= 0.02
    assert wait <= 50


def test_a_row_keeps_its_size_where_few_samples_fit():
    planner, _, _ = planned(recipe_from_weights({"vqa": 1}), synthetic(1, who=1, sides=(980,)))
    assert 11_000 <= planner.capacities.total <= 13_000


def test_drawing_only_is_full_too():
    planner, mixture, sizes = planned(RECIPES["extension"], synthetic(2))
    assert planner.capacities.vit == 0
    fill, _, wait = measure(planner, mixture, sizes, 50)
    assert fill >= 0.95
    assert wait <= 50


@settings(max_examples=3, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["t2i", "vlm_extension", "vqa", "knowledge_qa"]), st.floats(0.1, 5), min_size=1
    ),
    st.integers(0, 99),
)
def test_capacities_of_any_mixture(weights, seed):
    sizes = {k: s for k, s in synthetic(seed, who=1).items() if k.task in weights}
    planner, _, ordered = planned(recipe_from_weights(weights), sizes)
    largest = np.max([s.max(axis=0) for s in ordered], axis=0)
    assert (np.array(planner.capacities) >= largest).all()
    assert ((np.array(planner.capacities) == 0) == (largest == 0)).all()
    assert 11_000 <= planner.capacities.total <= 13_000
    assert 12288 * LOW >= 11_000
    assert 12288 * HIGH <= 13_000


def test_nothing_is_left_over_and_the_order_of_asking_does_not_matter():
    weights = recipe_from_weights({"t2i": 1, "vqa": 1, "vlm_extension": 4})
    capacities = Sizes(1600, 5600, 5120)
    planner, _mixture, sizes = planned(weights, synthetic(3), capacities=capacities)
    rows = [planner.sequence(n) for n in range(120)]
    other, _, _ = planned(weights, synthetic(3), capacities=capacities)
    assert [other.sequence(n) for n in (119, 0, 70)] == [rows[119], rows[0], rows[70]]
    window = sorted(rows[:50] and [d for row in rows[:50] for d in row])
    start = planner.schedule.start
    assert window == sorted(planner.schedule.draws(start, len(window)))
    for row in rows:
        assert Sizes(*np.sum([sizes[d.source][d.sample] for d in row], axis=0)).fits(capacities)


def test_a_cursor_saves_the_planning_of_what_came_before(monkeypatch):
    weights = recipe_from_weights({"t2i": 1, "vqa": 1})
    capacities = Sizes(1600, 5600, 5120)
    planner, _, _ = planned(weights, synthetic(4), capacities=capacities)
    expected, cursor = planner.sequence(130), planner.cursor(130)
    assert cursor["window"] == 2
    fresh, _, _ = planned(weights, synthetic(4), capacities=capacities)
    fresh.seek(cursor)
    windows = []
    monkeypatch.setattr(fresh, "_plan", lambda w, p, plan=fresh._plan: windows.append(w) or plan(w, p))
    assert fresh.sequence(130) == expected
    assert windows == [2]


def test_given_capacities_are_judged_not_changed():
    sizes = synthetic(5)
    mixture = resolve(RECIPES["default"], {k: len(s) for k, s in sizes.items()})
    ordered = [sizes[key] for key in mixture.keys]
    wide = Sizes(4000, 6000, 5000)
    assert try_capacities(mixture, ordered, wide, 0, 50).sizes == wide
    judged = try_capacities(mixture, ordered, wide, 0, 50)
    assert judged.fill == pytest.approx(sum(judged.used) / wide.total)
    used = np.array(judged.used) / wide
    assert (
        (judged.limit, judged.emptiest)
        == ("vit", "text")
        == (Sizes._fields[used.argmax()], Sizes._fields[used.argmin()])
    )

"""Means with bootstrap intervals, over characters, items and seeds.

A measurement belongs to a character, an item (a prompt, a question) and a seed. The *item* is the unit that
is resampled: an item's seeds are averaged first, because more seeds of one prompt say nothing of other
prompts. Characters are fixed strata: a mean over characters is the mean of their means, whatever their
numbers of items. Differences are paired: the same items and seeds on both sides.

Intervals are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), and are a
function of the values alone. Nothing here knows what is measured.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

Values = Mapping[str, Mapping[str, Mapping[Hashable, float]]]
"""character -> item -> seed -> value."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
      mean: of the characters' means.
      low, high: bounds; None where a single item leaves them unknown.
      items: how many items it rests on.
    """

    mean: float
    low: float | None
    high: float | None
    items: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside, which for a difference means: more than chance."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Values, *, resamples: int = 4_000, confidence: float = 0.95) -> Interval | None:
    """The mean over characters; None without values."""
    strata = [
        np.array([np.mean(list(seeds.values())) for _, seeds in sorted(items.items())])
        for _, items in sorted(values.items())
    ]
    return _bootstrap([s for s in strata if s.size], resamples, confidence)


def paired_difference(
    first: Values, second: Values, *, resamples: int = 4_000, confidence: float = 0.95
) -> Interval | None:
    """The mean of ``second - first`` over the items and seeds that both have; None if they share none."""
    strata = []
    for character in sorted(first.keys() & second.keys()):
        differences = []
        for item in sorted(first[character].keys() & second[character].keys()):
            a, b = first[character][item], second[character][item]
            shared = a.keys() & b.keys()
            if shared:
                differences.append(np.mean([b[s] - a[s] for s in sorted(shared, key=str)]))
        if differences:
            strata.append(np.array(differences))
    return _bootstrap(strata, resamples, confidence)


def _bootstrap(strata: list[np.ndarray], resamples: int, confidence: float) -> Interval | None:
    if not strata:
        return None
    mean = float(np.mean([s.mean() for s in strata]))
    items = sum(s.size for s in strata)
    if all(s.size < 2 for s in strata):
        return Interval(mean, None, None, items)
    rng = np.random.default_rng(0)
    means = np.mean([s[rng.integers(s.size, size=(resamples, s.size))].mean(axis=1) for s in strata], axis=0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), items)

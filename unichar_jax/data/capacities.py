"""Budgets of a row: how many tokens of each stream it holds, for any mixture and any pictures.

Some capacities suit the sizes of the pictures at hand (4096 + 1024 tokens fill 5120) and others do not, so
``derive_capacities`` tries many. A mixture's weights are exact and never moved; where no capacities fill with
them, because each must hold the largest sample, the log says which stream ends rows and what helps.

Everything is judged on trials: packing a stretch of the mixture's own draws. Nothing here loads a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import Mixture, Schedule
from unichar_jax.data.packing import best_fit, longest_fit


class Capacities(NamedTuple):
    """Budgets of a row, and how full a mixture gets them.

    Attributes:
      sizes: the capacities.
      used: tokens per row in a trial, on average, in each stream.
    """

    sizes: Sizes
    used: tuple[float, float, float]

    @property
    def fill(self) -> float:
        return sum(self.used) / max(1, self.sizes.total)

    @property
    def limit(self) -> str:
        """The stream that is full first and so ends rows."""
        return max(Sizes._fields, key=lambda name: self._filled(name))

    @property
    def emptiest(self) -> str:
        """The stream, of those that a row has, with the most room to spare."""
        return min(
            (n for n, room in self.sizes._asdict().items() if room), key=lambda name: self._filled(name)
        )

    def _filled(self, name: str) -> float:
        place = Sizes._fields.index(name)
        return self.used[place] / max(1, self.sizes[place])


LOW, HIGH = 0.8953, 1.0579
"""Bounds of a row's total, as parts of the wanted one: 11,002 to 12,999 for 12,288."""

_TRIAL_WINDOWS = 4


def align(value: float, to: int) -> int:
    return math.ceil(value / to) * to


def derive_capacities(
    mixture: Mixture, sizes: Sequence[np.ndarray], tokens_per_row: int, seed: int, window: int
) -> Capacities:
    """Chooses the three capacities that a mixture fills best.

    Each holds the largest sample and is zero for a stream that the mixture lacks. Candidates for the image
    streams are judged by how many draws they can take, which is cheap to find for one stream; text gets what
    those draws need. The best few are tried in full, and the best of these returned.

    Args:
      mixture: weights of the sources.
      sizes: int ``[n, 3]`` of each source's samples.
      tokens_per_row: the wanted total; the result lies within ``LOW`` and ``HIGH`` of it, unless the
        largest samples alone need more.
      seed: of the order of draws in trials.
      window: sequences planned together.
    """
    trial = _Trial(mixture, sizes, tokens_per_row, seed, window)
    low, high = int(LOW * tokens_per_row), int(HIGH * tokens_per_row)
    unit = trial.unit
    words = align(trial.largest[0], unit)
    candidates: dict[Sizes, float] = {}
    for vit, vit_draws in trial.curve(1):
        for latent, latent_draws in trial.curve(2):
            draws = min(vit_draws, latent_draws)
            text = high - vit - latent  # where no picture limits the draws, words do
            if draws < len(trial.sizes):
                text = min(text, align(1.01 * trial.volume[draws, 0] / trial.rows, unit))
            text = max(text // unit * unit, words, align(low - vit - latent, unit))
            if text + vit + latent <= high:
                draws = min(draws, int((trial.volume[1:, 0] <= text * trial.rows).sum()))
                candidates[Sizes(text, vit, latent)] = trial.per_row(draws) / (text + vit + latent)
    if not candidates:  # the largest samples alone need more
        candidates[Sizes(*(align(n, unit) for n in trial.largest))] = 0.0
    ranked = sorted(candidates, key=lambda c: (-candidates[c], c))
    best = max((trial.run(c) for c in ranked[:5]), key=lambda c: c.fill)
    roomier = best.sizes._replace(
        text=align(best.sizes.text * 1.04, unit)
    )  # words rarely spread evenly over rows
    if roomier.total <= high:
        best = max(best, trial.run(roomier), key=lambda c: c.fill)
    return try_capacities(mixture, sizes, best.sizes, seed + 1, window)


def try_capacities(
    mixture: Mixture, sizes: Sequence[np.ndarray], capacities: Sizes, seed: int, window: int
) -> Capacities:
    """Given capacities, and how full a mixture gets them."""
    trial = _Trial(mixture, sizes, max(1, capacities.total), seed, window)
    return trial.run(capacities)


def too_large(sizes: Sizes, capacities: Sizes) -> str | None:
    """Why no row can hold a sample, or None."""
    for name, need, room in zip(Sizes._fields, sizes, capacities, strict=True):
        if need > room:
            return f"it has {need} {name} tokens, a row {room}"
    return None


class _Trial:
    """A stretch of the order of draws, to try capacities on.

    Attributes:
      sizes: int ``[N, 3]`` of the draws.
      volume: int ``[N + 1, 3]``, tokens of the first n draws.
    """

    def __init__(self, mixture: Mixture, sizes: Sequence[np.ndarray], tokens: int, seed: int, window: int):
        self.tokens, self.window = tokens, window
        self.rows = _TRIAL_WINDOWS * window
        self.unit = 16 if tokens >= 4096 else 4
        self.largest = np.max([s.max(axis=0) for s in sizes], axis=0)
        mean = sum(w * s.sum(axis=1).mean() for w, s in zip(mixture.weights, sizes, strict=True))
        schedule = Schedule(mixture.keys, mixture.weights, [s.sum(axis=1) for s in sizes], seed)
        count = int(1.5 * HIGH * _TRIAL_WINDOWS * tokens * window / mean) + 16
        draws = schedule.draws(schedule.start, count)
        self.sizes = np.array([sizes[d.source][d.sample] for d in draws])
        self.volume = np.concatenate([np.zeros((1, 3), int), np.cumsum(self.sizes, axis=0)])

    def run(self, capacities: Sizes) -> Capacities:
        count = 0
        for _ in range(_TRIAL_WINDOWS):
            count += longest_fit(self.sizes[count:], capacities, self.window, 0.01)[0]
        text, vit, latent = (self.volume[count] / self.rows).tolist()
        return Capacities(capacities, (text, vit, latent))

    def grid(self, stream: int) -> list[int]:
        """Capacities to try for an image stream: the smallest possible one, then even steps."""
        first = align(self.largest[stream], self.unit)
        step = align(self.tokens / 200, self.unit)
        return [first, *range(align(first + 1, step), int(HIGH * self.tokens) + 1, step)]

    @functools.cache  # noqa: B019 - a trial lives for one derivation
    def draws_in(self, stream: int, capacity: int) -> int:
        """How many draws the trial's rows can take if only this stream limits them."""
        values = self.sizes[:, stream]
        picked = np.flatnonzero(values)
        fitted = _fit_one(values[picked], capacity, self.rows)
        return int(picked[fitted]) if fitted < len(picked) else len(values)

    @functools.cache  # noqa: B019
    def curve(self, stream: int) -> list[tuple[int, int]]:
        """Capacities of an image stream worth trying, and the draws that fit into the rows then."""
        if not self.largest[stream]:
            return [(0, len(self.sizes))]
        alone = not self.largest[3 - stream]
        points: list[tuple[int, int]] = []
        for capacity in self.grid(stream):
            bound = int((self.volume[1:, stream] <= capacity * self.rows).sum())
            if alone and points and self.per_row(bound) < LOW * self.tokens:
                continue  # too small for a whole row, whatever the packing
            draws = self.draws_in(stream, capacity)
            if not points or draws > points[-1][1]:
                points.append((capacity, draws))
            if self.per_row(draws) > HIGH * self.tokens:
                break
        return points

    def per_row(self, draws: int) -> float:
        return float(self.volume[draws].sum() / self.rows)


def _fit_one(values: np.ndarray, capacity: int, rows: int) -> int:
    """Length of the longest prefix of one stream's sizes that best-fit decreasing packs, to 1 %."""
    low, high = 0, int((np.cumsum(values) <= capacity * rows).sum())
    middle = high
    while low < high:
        if best_fit(sorted(values[:middle].tolist(), reverse=True), [capacity] * rows) is not None:
            low = middle
        else:
            high = middle - 1
        if high - low <= 0.01 * high and low:
            break
        middle = max(int(0.95 * high), (low + high + 1) // 2)
    return low

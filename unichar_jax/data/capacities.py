"""Budgets of a row: how many tokens of each stream it holds, for any mixture and any pictures.

Some capacities suit the sizes of the pictures at hand (4096 + 1024 tokens fill 5120) and others do not, so
``derive_capacities`` tries many. Often no capacities fill with a mixture's weights, because each must hold
the largest sample: then ``balance`` moves the weights of a recipe that allows it.

Everything is judged on trials: packing a stretch of the mixture's own draws. Nothing here loads a sample.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import Mixture, Schedule
from unichar_jax.data.packing import best_fit, longest_fit

_ENOUGH = 0.97
"""Fill of a row beyond which shares stay rather than move."""

_RELUCTANCE = 0.03
"""Fill that is given up to keep a group's share from changing by a factor of e."""

_NOTABLE = 0.15
"""A change of shares from which on the log tells of it."""

_WORDS_FILL = 0.98
"""How full words usually get a stream."""

_TRIED, _CORRECTIONS = 8, 3
"""Capacities that ``balance`` tries in full, and trials of each."""


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


LOW, HIGH = 0.8953, 1.0579
"""Bounds of a row's total, as parts of the wanted one: 11,002 to 12,999 for 12,288."""

_TRIAL_WINDOWS = 2


def align(value: float, to: int) -> int:
    return math.ceil(value / to) * to


def derive_capacities(
    mixture: Mixture, sizes: Sequence[np.ndarray], tokens_per_row: int, seed: int, window: int
) -> Capacities:
    """Chooses the three capacities that a mixture fills best.

    Each holds the largest sample and is zero for a stream that the mixture lacks. The weights stay as they
    are; ``balance`` moves them too. Candidates for the image streams are judged by how many draws they can
    take, which is cheap to find for one stream; text gets what those draws need. The best few are tried in
    full, and the best of these returned.

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
    for more in (1.04,):  # words rarely spread evenly over rows
        capacities = best.sizes._replace(text=align(best.sizes.text * more, unit))
        if capacities.total <= high:
            best = max(best, trial.run(capacities), key=lambda c: c.fill)
    return try_capacities(mixture, sizes, best.sizes, seed + 1, window)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A mixture's groups, each as one kind of sample of average size.

    Attributes:
      share: of the samples, float ``[G]``.
      mean: tokens of a sample, float ``[G, 3]``.
      stream: the one that most of a group's tokens are in, int ``[G]``.
    """

    mixture: Mixture
    share: np.ndarray
    mean: np.ndarray
    stream: np.ndarray

    @classmethod
    def of(cls, mixture: Mixture, sizes: Sequence[np.ndarray]) -> _Groups:
        weights = np.array(mixture.weights)
        tokens = weights[:, None] * np.array([s.mean(axis=0) for s in sizes])
        share = np.array([weights[list(members)].sum() for members in mixture.groups])
        mean = np.array([tokens[list(members)].sum(axis=0) for members in mixture.groups])
        return cls(mixture, share, mean / share[:, None], mean.argmax(axis=1))

    def weighed(self, samples: np.ndarray) -> Mixture:
        """The mixture with so many samples of each group, in any unit."""
        weights = np.array(self.mixture.weights)
        for members, factor in zip(self.mixture.groups, samples / self.share, strict=True):
            weights[list(members)] *= factor
        mixture = self.mixture.with_weights(weights)
        told = [
            f"{', '.join(dict.fromkeys(mixture.keys[k].task for k in members))} {100 * was:.0f} -> {100 * now:.0f} %"
            for members, was, now in zip(
                self.mixture.groups, self.share, samples / samples.sum(), strict=True
            )
        ]
        if self.moved(samples) > _NOTABLE:
            note = f"shares of the recipe were moved so that rows fill: {'; '.join(told)}"
            mixture = dataclasses.replace(mixture, notes=(*mixture.notes, note))
        return mixture

    def moved(self, samples: np.ndarray) -> float:
        """How far shares of so many samples lie from the recipe's: the largest logarithm of a ratio."""
        return float(np.abs(np.log(samples / samples.sum() / self.share)).max())

    def filling(self, stream: int, tokens: float) -> np.ndarray:
        """How many samples of each group that belongs to a stream fill ``tokens`` of it, ``[G]``."""
        share = np.where(self.stream == stream, self.share, 0.0)
        needed = (share * self.mean[:, stream]).sum()
        return share * (tokens / needed) if needed else share


def balance(
    mixture: Mixture,
    sizes: Sequence[np.ndarray],
    tokens_per_row: int,
    seed: int,
    window: int,
    capacities: Sizes | None = None,
) -> tuple[Mixture, Capacities]:
    """Chooses capacities, and moves the weights of a mixture's groups so that the three fill together.

    A group belongs to the stream that most of its tokens are in. For each pair of capacities of the image
    streams, what fills them says how many samples of their groups a row gets; words get the rest. Of all
    pairs the best few are tried in full, each with weights that are corrected after each trial. Full rows
    are worth moving weights for, but no more than ``_ENOUGH`` is asked for, and shares move as little as
    they can. Where most tokens are words, as with a small model's small pictures, nothing moves: words
    fill any gap.

    Args:
      mixture, sizes, tokens_per_row, seed, window: as in ``derive_capacities``.
      capacities: given ones; then only weights move.
    """
    groups = _Groups.of(mixture, sizes)
    total = (groups.share[:, None] * groups.mean).sum(axis=0)
    pictures = {k for k in (1, 2) if total[k]}
    if total[0] > 0.5 * total.sum() or len(groups.share) == 1 or not pictures <= set(groups.stream.tolist()):
        if capacities is None:
            return mixture, derive_capacities(mixture, sizes, tokens_per_row, seed, window)
        return mixture, try_capacities(mixture, sizes, capacities, seed, window)

    best = (-math.inf, mixture, Sizes(0, 0, 0))
    for room, samples in _promising(groups, _Trial(mixture, sizes, tokens_per_row, seed, window), capacities):
        for _ in range(_CORRECTIONS):
            weighed = groups.weighed(samples)
            tried = _Trial(weighed, sizes, tokens_per_row, seed, window).run(room)
            score = min(tried.fill, _ENOUGH) - _RELUCTANCE * groups.moved(samples)
            best = max(best, (score, weighed, room), key=lambda option: option[0])
            # what ran out first ended the rows: less of it
            emptiness = [n / max(used, 1e-9) if n else 1.0 for n, used in zip(room, tried.used, strict=True)]
            samples = samples * np.array(emptiness)[groups.stream] ** 0.7
    _, mixture, room = best
    return mixture, try_capacities(mixture, sizes, room, seed + 1, window)


def _promising(groups: _Groups, trial: _Trial, capacities: Sizes | None) -> list[tuple[Sizes, np.ndarray]]:
    """Capacities worth a trial, and samples of each group in a row that should fill them, best first."""
    low, high, unit = LOW * trial.tokens, HIGH * trial.tokens, trial.unit
    words = groups.stream == 0
    per_picture = groups.share[words].sum() / groups.share[~words].sum()

    def options(stream: int) -> list[tuple[int, float]]:
        """Capacities of an image stream, and how many tokens its pictures fill of each."""
        if not trial.largest[stream]:
            return [(capacities[stream] if capacities else 0, 0.0)]
        grid = [capacities[stream]] if capacities else trial.grid(stream)
        return [(room, room * trial.full(stream, room)) for room in grid]

    found: list[tuple[float, Sizes, np.ndarray]] = []
    for vit, looked_at in options(1):
        for latent, drawn in options(2):
            samples = groups.filling(1, looked_at) + groups.filling(2, drawn)
            captions = float((samples * groups.mean[:, 0]).sum())
            if capacities:
                text = capacities.text
            else:
                spoken = (
                    groups.share
                    * words
                    * (per_picture * samples.sum() / max(groups.share[words].sum(), 1e-9))
                )
                wanted = (captions + (spoken * groups.mean[:, 0]).sum()) / _WORDS_FILL
                least = max(trial.largest[0], low - vit - latent)
                text = align(min(max(wanted, least), high - vit - latent - unit), unit)
                if text < least:
                    continue
            left = _WORDS_FILL * text - captions
            samples = samples + groups.filling(0, max(left, 0.0))
            if left <= 0 or samples.min() <= 0:
                continue
            room = Sizes(text, vit, latent)
            used = (captions + (samples * words * groups.mean[:, 0]).sum() + looked_at + drawn) / room.total
            score = min(0.98 * used, _ENOUGH) - _RELUCTANCE * groups.moved(samples)
            found.append((score, room, samples))
    found.sort(key=lambda option: -option[0])
    kept: list[tuple[Sizes, np.ndarray]] = []
    for _, room, samples in found:
        apart = (abs(room.vit - other.vit) + abs(room.latent - other.latent) for other, _ in kept)
        if all(distance >= 0.015 * trial.tokens for distance in apart):
            kept.append((room, samples))
        if len(kept) == _TRIED:
            break
    return kept


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

    def full(self, stream: int, capacity: int) -> float:
        """How full an image stream gets on its own."""
        return float(self.volume[self.draws_in(stream, capacity), stream] / (capacity * self.rows))

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

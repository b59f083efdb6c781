"""Which samples share a packed sequence: planned ahead from sizes alone, three budgets at once.

The order of draws is cut into windows, each filling a fixed number of sequences. A window takes the
longest run of draws that fits into them and packs all of it, so no sample is left over, none is
dropped, none waits longer than a window, and frequencies are those of the order. ``pack`` is best-fit
decreasing in three dimensions. ``derive_capacities`` chooses the budgets: some capacities suit the
sizes of the pictures at hand (4096 + 1024 tokens fill 5120) and others do not, so it tries many.

Nothing here loads a sample; a plan is a pure function of the schedule, the sizes and the capacities.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import Draw, Mixture, Schedule

_SPREADS = (2.0, 0.2)
"""Pictures that take more of a row than this go to the emptiest row, smaller ones to the fullest that
holds them: first plain best-fit decreasing, then rows made alike, which leaves words even room."""


def pack(
    sizes: np.ndarray, capacities: Sequence[int], rows: int, spread: float = _SPREADS[0]
) -> np.ndarray | None:
    """Puts every sample into one of ``rows`` rows, the largest pictures first.

    Args:
      sizes: int ``[N, 3]``.
      capacities: of a row.
      spread: part of a row; larger pictures are spread over the rows, smaller ones fill rows up.

    Returns:
      The row of each sample, int ``[N]``; None if no place is found for one.
    """
    free = np.tile(np.asarray(capacities), (rows, 1))
    scale = 1 / np.maximum(np.asarray(capacities, float), 1)
    pictures = (sizes[:, 1:] * scale[1:]).max(axis=1)
    main = 1 + (sizes[:, 1:] * scale[1:]).argmax(axis=1)
    where = np.empty(len(sizes), int)
    order = np.lexsort((-sizes[:, 0], -pictures))
    cut = int((pictures > 0).sum())
    for n, i in enumerate(order[:cut]):
        fits = (free >= sizes[i]).all(axis=1)
        if not fits.any():
            row = _make_room(sizes, order[:n], where, free, sizes[i])
            if row is None:
                return None
            free[row] -= sizes[i]
            where[i] = row
            continue
        score = free[:, main[i]] * scale[main[i]]
        # the fullest row or the emptiest one; among equals, the one with most room for words
        score = (score if pictures[i] <= spread else -score) - 0.05 * scale[0] * free[:, 0]
        row = np.where(fits, score, np.inf).argmin()
        free[row] -= sizes[i]
        where[i] = row
    placed = _best_fit(sizes[order[cut:], 0].tolist(), free[:, 0].tolist())
    if placed is None:
        return None
    where[order[cut:]] = placed
    return where


def _make_room(
    sizes: np.ndarray, placed: np.ndarray, where: np.ndarray, free: np.ndarray, need: np.ndarray
) -> int | None:
    """Exchanges two placed samples, or moves one, so that a row has room for ``need``.

    Changes ``where`` and ``free``. Returns that row, or None if no exchange helps.
    """
    rows = len(free)
    # what can leave a row, and what can come in its place: another sample, or nothing
    out = placed[(free[where[placed]] + sizes[placed] >= need).all(axis=1)]
    into = np.concatenate([sizes[placed], np.zeros((rows, 3), int)])
    into_row = np.concatenate([where[placed], np.arange(rows)])
    room_here = free[where[out]] + sizes[out] - need
    room_there = free[into_row] + into
    good = where[out][:, None] != into_row
    for k in range(3):
        good &= into[None, :, k] <= room_here[:, None, k]
        good &= sizes[out][:, None, k] <= room_there[None, :, k]
    if not good.any():
        return None
    # the exchange after which the other row is fullest keeps the free space together
    left = room_there[None, :, 1:].sum(axis=-1) - sizes[out][:, None, 1:].sum(axis=-1)
    a, b = np.unravel_index(np.where(good, left, np.iinfo(int).max).argmin(), good.shape)
    here, there = where[out[a]], into_row[b]
    change = sizes[out[a]] - into[b]
    free[here] += change
    free[there] -= change
    where[out[a]] = there
    if b < len(placed):
        where[placed[b]] = here
    return int(here)


def _best_fit(values: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """Puts each value, in the given order, where it leaves least; None if one fits nowhere."""
    rows = sorted((room, row) for row, room in enumerate(free))
    where = []
    for value in values:
        at = bisect.bisect_left(rows, (value, 0))
        if at == len(rows):
            return None
        room, row = rows.pop(at)
        bisect.insort(rows, (room - value, row))
        where.append(row)
    return where


def longest_fit(
    sizes: np.ndarray, capacities: Sequence[int], rows: int, tolerance: float = 0.003
) -> tuple[int, np.ndarray]:
    """The longest prefix of the samples that is found to pack into ``rows`` rows, and their rows.

    The search stops at ``tolerance``: the part of the samples that is not worth another attempt.
    """
    volume = np.asarray(capacities) * rows
    bound = int((np.cumsum(sizes, axis=0) <= volume).all(axis=1).sum())
    enough = 1 + int(tolerance * bound)
    low, best = 0, np.empty(0, int)
    for spread in _SPREADS:
        high, step, probe = bound + 1, max(1, bound // 50), bound
        while high - low > enough:
            found = pack(sizes[:probe], capacities, rows, spread)
            if found is None:
                high, step = probe, step * 2
                # down from the bound in growing steps; then between what fits and what does not
                probe = max(high - step, (low + high) // 2)
            else:
                low, best = probe, found
                probe = (low + high) // 2
            probe = max(probe, low + 1)
        if low >= 0.98 * bound:
            break
    return low, best


# -- plans ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Window:
    rows: tuple[tuple[Draw, ...], ...]
    position: tuple[int, ...]
    after: tuple[int, ...]


class Planner:
    """The samples of packed sequence n, for any n.

    Windows follow each other, so a far sequence costs the planning of all windows before it, unless
    ``seek`` is given a ``cursor`` that was taken near it. Safe to use from several threads.

    Args:
      schedule: order of draws.
      sizes: int ``[n, 3]``, tokens of each source's samples.
      capacities: of a row.
      window: sequences per window.
    """

    def __init__(self, schedule: Schedule, sizes: Sequence[np.ndarray], capacities: Sizes, window: int):
        self.schedule, self.sizes = schedule, sizes
        self.capacities, self.window = capacities, window
        self._positions = {0: schedule.start}
        self._windows: dict[int, _Window] = {}
        self._guess = 8 * window
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_windows": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def sequence(self, n: int) -> tuple[Draw, ...]:
        """The draws of packed sequence ``n``."""
        window, row = divmod(n, self.window)
        with self._lock:
            return self._window(window).rows[row]

    def cursor(self, n: int) -> dict[str, Any]:
        """Where the window of sequence ``n`` begins in the order of draws, as JSON."""
        window = n // self.window
        with self._lock:
            return {"window": window, "counts": list(self._position(window))}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Makes sequences from ``cursor`` on cheap."""
        with self._lock:
            self._positions[int(cursor["window"])] = tuple(cursor["counts"])

    def _position(self, window: int) -> tuple[int, ...]:
        nearest = max(w for w in self._positions if w <= window)
        for w in range(nearest, window):
            self._positions[w + 1] = self._window(w).after
            for old in [o for o in self._positions if 0 < o < w - 16]:
                del self._positions[old]
        return self._positions[window]

    def _window(self, window: int) -> _Window:
        if window not in self._windows:
            planned = self._plan(window, self._position(window))
            while len(self._windows) > 4:
                del self._windows[next(iter(self._windows))]
            self._windows[window] = planned
        return self._windows[window]

    def _plan(self, window: int, position: tuple[int, ...]) -> _Window:
        draws, sizes = self._enough(position)
        taken, where = longest_fit(sizes, self.capacities, self.window)
        rows: list[list[Draw]] = [[] for _ in range(self.window)]
        for draw, row in zip(draws, where.tolist(), strict=False):
            rows[row].append(draw)
        # packing fills rows in a typical order: undo that, so that no row number is special
        order = np.random.default_rng([self.schedule.seed, 3, window]).permutation(self.window)
        after = self.schedule.after(position, draws[:taken])
        return _Window(tuple(tuple(rows[i]) for i in order), position, after)

    def _enough(self, position: tuple[int, ...]) -> tuple[list[Draw], np.ndarray]:
        """Draws that are more than a window can hold, and their sizes."""
        volume = np.asarray(self.capacities) * self.window
        while True:
            draws = self.schedule.draws(position, self._guess)
            sizes = np.array([self.sizes[draw.source][draw.sample] for draw in draws])
            total = sizes.sum(axis=0)
            if (total > volume).any():
                self._guess = int(self._guess * 1.2 * (volume / np.maximum(total, 1)).min()) + 8
                return draws, sizes
            self._guess *= 2


# -- capacities ----------------------------------------------------------------------------------


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
_LEEWAY = 0.15
"""How far a stream's share may move from the recipe's nominal one."""


def align(value: float, to: int) -> int:
    return math.ceil(value / to) * to


def derive_capacities(
    mixture: Mixture, sizes: Sequence[np.ndarray], tokens_per_row: int, seed: int, window: int
) -> Capacities:
    """Chooses the three capacities that a mixture fills best.

    Each holds the largest sample and is zero for a stream that the mixture lacks. Candidates for the
    image streams are judged by how many draws they can take, which is cheap to find for one stream;
    text gets what those draws need. The best few are tried in full, and the best of these returned.

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
    candidates = {Sizes(*(align(n, unit) for n in trial.largest)): 0.0}
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
    ranked = sorted(candidates, key=lambda c: (-candidates[c], c))
    best = max((trial.run(c) for c in ranked[:5]), key=lambda c: c.fill)
    for more in (1.04,):  # words rarely spread evenly over rows
        capacities = best.sizes._replace(text=align(best.sizes.text * more, unit))
        if capacities.total <= high:
            best = max(best, trial.run(capacities), key=lambda c: c.fill)
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


def follow_budgets(
    mixture: Mixture,
    sizes: Sequence[np.ndarray],
    tokens_per_row: int,
    seed: int,
    window: int,
    capacities: Sizes | None = None,
) -> Mixture:
    """Moves the weights of a mixture's groups so that the budgets fill together.

    A group belongs to the stream that most of its tokens are in. Without ``capacities``, each image
    stream gets the capacity, within ``_LEEWAY`` of its nominal share of the row, that its pictures fill
    best. The group's weight is then what fits into it; words get the rest of the row. Where most tokens
    are words, as with a small model's small pictures, nothing moves: words fill any gap.
    """
    means = np.array([s.mean(axis=0) for s in sizes])
    weights = np.array(mixture.weights)
    tokens = weights[:, None] * means
    shares = tokens.sum(axis=0) / tokens.sum()
    if shares[0] > 0.5:
        return mixture
    stream = np.empty(len(weights), int)
    for members in mixture.groups:
        stream[list(members)] = tokens[list(members)].sum(axis=0).argmax()
    trial = _Trial(mixture, sizes, tokens_per_row, seed, window)
    near = shares * tokens_per_row

    def options(k: int) -> list[tuple[int, float]]:
        """Capacities of an image stream, and how many tokens its pictures fill of each."""
        if not (stream == k).any():
            return [(capacities[k] if capacities else 0, 0.0)]
        grid = trial.grid(k)
        grid = [c for c in grid if abs(c / near[k] - 1) <= _LEEWAY] or grid[:1]
        return [(c, c * trial.full(k, c)) for c in ([capacities[k]] if capacities else grid)]

    best = (-2.0, near)
    for vit, looked_at in options(1):
        for latent, drawn in options(2):
            left = tokens_per_row - vit - latent
            text = capacities.text if capacities else min(max(left, 0.9 * near[0]), 1.3 * near[0])
            total = text + vit + latent
            used = np.array([0.98 * text, looked_at, drawn])
            # a total out of bounds only where no other is possible: the largest samples decide then
            outside = not LOW <= total / tokens_per_row <= HIGH
            best = max(best, (used.sum() / total - outside, used), key=lambda option: option[0])
    used = best[1]
    for k in (1, 2, 0):  # words last: they get what pictures' captions leave
        inside = stream == k
        if inside.any():
            captions = (weights * means[:, k])[~inside].sum()
            weights[inside] *= max(used[k] - captions, 0.1 * near[k]) / tokens[inside, k].sum()
    return mixture.with_weights(weights)


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
        if _best_fit(sorted(values[:middle].tolist(), reverse=True), [capacity] * rows) is not None:
            low = middle
        else:
            high = middle - 1
        if high - low <= 0.01 * high and low:
            break
        middle = max(int(0.95 * high), (low + high + 1) // 2)
    return low

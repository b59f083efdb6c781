"""Which samples share a packed sequence: planned ahead from sizes alone, three budgets at once.

The order of draws is cut into windows, each filling a fixed number of sequences. A window takes the
longest run of draws that fits into them and packs all of it, so no sample is left over, none is
dropped, none waits longer than a window, and frequencies are those of the order. ``pack`` is best-fit
decreasing in three dimensions. The budgets are chosen in ``capacities.py``.

Nothing here loads a sample; a plan is a pure function of the schedule, the sizes and the capacities.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import Draw, Schedule

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
    placed = best_fit(sizes[order[cut:], 0].tolist(), free[:, 0].tolist())
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


def best_fit(values: Sequence[int], free: Sequence[int]) -> list[int] | None:
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

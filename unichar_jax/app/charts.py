"""Line charts and interval marks as small SVG texts, coloured by the page's style.

Enough for training curves: axes with round numbers, every series twice, as it is (faint) and smoothed. Spikes
beyond the bulk of the values are cut off rather than flattening everything else. No library, no script.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 400
SERIES_COLOURS = 4
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 258, 52, 12, 10, 38


@dataclass(frozen=True)
class Series:
    """One line: a name, and its points in order of x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name}: {len(self.x)} x and {len(self.y)} y")


@dataclass(frozen=True)
class Chart:
    """A chart: its title, lines, and what x counts."""

    title: str
    series: tuple[Series, ...]
    x_name: str = "step"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about so many."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(y: np.ndarray) -> np.ndarray:
    """A running mean over about a twentieth of the points, the same on both sides."""
    width = max(1, len(y) // 20) | 1
    padded = np.pad(y, width // 2, mode="reflect") if len(y) > width else y
    return np.convolve(padded, np.full(width, 1 / width), mode="valid") if len(y) > width else y


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MAX_POINTS`` points: means of runs of neighbours."""
    run = -(-len(x) // MAX_POINTS)
    if run <= 1:
        return x, y
    whole = len(x) // run * run
    return x[:whole].reshape(-1, run).mean(axis=1), y[:whole].reshape(-1, run).mean(axis=1)


def line_chart(chart: Chart) -> str:
    """The chart as an ``<svg>``; points that are not finite are left out."""
    lines = []
    for series in chart.series[:SERIES_COLOURS]:
        x, y = np.asarray(series.x, float), np.asarray(series.y, float)
        finite = np.isfinite(x) & np.isfinite(y)
        lines.append(thin(x[finite], y[finite]))
    every_x = np.concatenate([x for x, _ in lines] or [np.zeros(0)])
    every_y = np.concatenate([y for _, y in lines] or [np.zeros(0)])
    if not every_x.size:
        return '<p class="none">No points.</p>'
    x_low, x_high = _range(every_x.min(), every_x.max())
    y_low, y_high = _range(*np.quantile(every_y, [0.01, 0.99]), margin=0.08)

    def across(x: Any) -> Any:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: Any) -> Any:
        share = np.clip((y - y_low) / (y_high - y_low), -0.02, 1.02)
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y_low, y_high):
        at = float(down(value))
        parts.append(f'<path class="axis" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high):
        at = float(across(value))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{value:.6g}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{html.escape(chart.x_name)}</text>'
    )
    for number, (x, y) in enumerate(lines):
        if len(x) > 40:
            parts.append(f'<path class="raw s{number}" d="{_path(across(x), down(y))}"/>')
        if len(x):
            parts.append(f'<path class="smooth s{number}" d="{_path(across(x), down(smooth(y)))}"/>')
    title = html.escape(chart.title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 4}" role="img" aria-label="{title}"><title>{title}</title>'
        + "".join(parts)
        + "</svg>"
    )


def whisker(mean: float, low: float | None, high: float | None) -> str:
    """A mark for a share in [0, 1]: a dot on a track, and its interval."""
    place = lambda v: 100 * min(max(v, 0.0), 1.0)  # noqa: E731
    known = low is not None and high is not None
    span = f'<path class="range" d="M{place(low):.1f} 5H{place(high):.1f}"/>' if known else ""
    return (
        '<svg class="whisker" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="track" d="M0 5H100"/>{span}'
        f'<ellipse class="dot" cx="{place(mean):.1f}" cy="5" rx="2.6" ry="4"/></svg>'
    )


def _range(low: float, high: float, margin: float = 0.0) -> tuple[float, float]:
    if low == high:
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    pad = margin * (high - low)
    return low - pad, high + pad


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))

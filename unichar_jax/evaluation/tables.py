"""Results side by side: rows of metrics, columns of models, with intervals and paired differences.

The rows here are plain values; ``print_table`` shows them in a terminal and ``app.report`` in a page. A
metric that a model was trained to raise is marked wherever it appears, and what was not measured is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from unichar_jax.evaluation.items import TASKS
from unichar_jax.evaluation.results import ORIGINALS, PAPER, Metric, Results, difference, metric_of, rank
from unichar_jax.evaluation.stats import Interval

REWARD_MARK = "†"
REWARD_NOTE = f"{REWARD_MARK} this model was trained to raise the metric: it does not judge the model."
INTERVAL_NOTE = (
    "Intervals: 95 %, bootstrap over items; seeds of an item are averaged first, characters count alike."
)
PAPER_NOTE = (
    "Paper: what UniCharacter (arXiv 2605.08129) reports for its own model under its own protocol; quoted,"
    " not measured here."
)

_LOOK: dict[str, Any] = {"title_justify": "left", "header_style": "bold"}


@dataclass(frozen=True)
class Cell:
    """One number of a table; ``rewarded`` if the model was trained to raise it."""

    interval: Interval | None
    rewarded: bool = False


@dataclass(frozen=True)
class Row:
    """One metric of one task for all models.

    Attributes:
      task, name: what was measured.
      metric: what it means.
      cells: one for each model.
      change: paired difference of the two that are ``compared``.
      paper: the published number.
    """

    task: str
    name: str
    metric: Metric
    cells: tuple[Cell, ...]
    change: Interval | None = None
    paper: float | None = None


def rows(results: Sequence[Results], character: str | None = None) -> list[Row]:
    """Every metric that any of the results has, in the order of tasks and metrics."""
    tasks = {name: place for place, name in enumerate(TASKS)}
    measured = sorted(
        {pair for r in results for pair in r.measured},
        key=lambda p: (tasks.get(p[0], len(tasks)), p[0], rank(p[1])),
    )
    pair = compared(results)
    found = []
    for task, name in measured:
        cells = tuple(Cell(r.interval(task, name, character), name in r.rewarded) for r in results)
        if all(c.interval is None for c in cells):
            continue
        change = difference(*pair, task, name, character) if pair else None
        found.append(Row(task, name, metric_of(name), cells, change, PAPER.get((task, name))))
    return found


def compared(results: Sequence[Results]) -> tuple[Results, Results] | None:
    """The first model and the last, whose difference is of interest; None for one model. Originals are no model."""
    models = [r for r in results if r.fingerprint != ORIGINALS]
    return (models[0], models[-1]) if len(models) > 1 else None


def number(value: float, metric: Metric) -> str:
    """A value as readers see it."""
    if metric.shown == "percent":
        return f"{100 * value:.1f} %"
    if metric.shown == "exp":
        return f"{math.exp(min(value, 700)):.3g}"
    return f"{value:.3g}"


def bounds(interval: Interval, metric: Metric) -> str:
    """``[low, high]``, or nothing where it is unknown."""
    if interval.low is None or interval.high is None:
        return ""
    low, high = (number(v, metric).removesuffix(" %") for v in (interval.low, interval.high))
    return f"[{low}, {high}]"


def change_text(change: Interval | None, metric: Metric) -> str:
    """A difference with its sign; in points for percentages, as a factor for exponentials."""
    if change is None:
        return ""
    if metric.shown == "exp":
        ends = [math.exp(v) for v in (change.low, change.high) if v is not None]
        known = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""
        return f"×{math.exp(change.mean):.2f}{known}"
    scale, digits = (100, 1) if metric.shown == "percent" else (1, 3)
    ends = [v * scale for v in (change.low, change.high) if v is not None]
    known = f" [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]" if ends else ""
    return f"{change.mean * scale:+.{digits}f}{known}"


def verdict(row: Row) -> str:
    """ "better", "worse" or "" (no direction, no comparison, or the interval includes 0)."""
    if row.change is None or row.metric.better == "none" or not row.change.excludes_zero:
        return ""
    return "better" if (row.change.mean > 0) == (row.metric.better == "higher") else "worse"


def notes(results: Sequence[Results]) -> list[str]:
    """What must be said below a table of these results."""
    found = [INTERVAL_NOTE]
    if pair := compared(results):
        found.append(f"Change: {pair[1].label} against {pair[0].label}, paired by item and seed.")
    if any(r.rewarded for r in results):
        found.append(REWARD_NOTE)
    if any(pair in PAPER for r in results for pair in r.measured):
        found.append(PAPER_NOTE)
    left_out: dict[str, str] = {name: why for r in results for name, why in r.left_out.items()}
    found += [f"Not measured: {name} ({why})." for name, why in left_out.items()]
    return found


def print_table(results: Sequence[Results], console: Console, character: str | None = None) -> None:
    """One table of all metrics; columns are the results. Without intervals where the terminal is too narrow."""
    found = rows(results, character)
    table = _table(results, found, character)
    wanted = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    narrow = wanted > console.width
    console.print(_table(results, found, character, with_bounds=False) if narrow else table)
    if narrow:
        console.print(
            Text(f"Intervals are in the report; here they need a terminal of {wanted} columns.", "dim")
        )
    for note in notes(results):
        console.print(Text(note, "dim"))


def _table(
    results: Sequence[Results], found: Sequence[Row], character: str | None, with_bounds: bool = True
) -> Table:
    def shown(interval: Interval | None) -> Interval | None:
        return interval if with_bounds or interval is None else replace(interval, low=None, high=None)

    with_change, with_paper = compared(results) is not None, any(row.paper is not None for row in found)
    heads = [r.label for r in results] + ["change"] * with_change + ["paper"] * with_paper
    columns = [Column(head, justify="right") for head in heads]
    table = Table("task", "metric", *columns, title=character or _who(results), **_LOOK)
    last = ""
    for row in found:
        if last and row.task != last:
            table.add_section()
        cells = [_cell(replace(cell, interval=shown(cell.interval)), row.metric) for cell in row.cells]
        if with_change:
            style = {"better": "green", "worse": "red"}.get(verdict(row), "")
            cells.append(Text(change_text(shown(row.change), row.metric), style))
        if with_paper:
            cells.append(Text("" if row.paper is None else number(row.paper, row.metric), "dim"))
        arrow = {"higher": " ↑", "lower": " ↓", "none": ""}[row.metric.better]
        table.add_row("" if row.task == last else row.task, row.metric.title + arrow, *cells)
        last = row.task
    return table


def print_by_character(results: Results, console: Console) -> None:
    """One line for each character and one for their mean; the columns are the main metrics."""
    main = [(t, m) for t, m in results.measured if m in MAIN.get(t, ())]
    table = Table("character", title=f"{results.label}, by character", **_LOOK)
    for task, name in main:
        mark = f" {REWARD_MARK}" if name in results.rewarded else ""
        table.add_column(f"{task}\n{metric_of(name).title}{mark}", justify="right")
    for character in (*results.characters, None):
        found = [(name, results.interval(task, name, character)) for task, name in main]
        cells = ["" if known is None else number(known.mean, metric_of(name)) for name, known in found]
        if character is None:
            table.add_section()
        table.add_row(character or "mean", *cells)
    console.print(table)


MAIN: dict[str, tuple[str, ...]] = {
    "knowledge_mcq": ("accuracy",),
    "image_mcq": ("accuracy",),
    "unseen_image_mcq": ("accuracy",),
    "vqa": ("exact",),
    "reply_likelihood": ("nats_per_char",),
    "dialogue": ("voice",),
    "memorization": ("expected_words", "judged"),
    "personality": ("voice", "judged"),
    "t2i": ("clip_t", "clip_i", "dino", "apart", "copied", "identity", "prompt_following"),
    "t2t2i": ("clip_i", "dino", "identity", "consistency"),
}
"""The metrics of each task that a line by character has room for."""


def _cell(cell: Cell, metric: Metric) -> Text:
    if cell.interval is None:
        return Text("–", "dim")
    text = Text(number(cell.interval.mean, metric))
    if cell.rewarded:
        text.append(REWARD_MARK)
    known = bounds(cell.interval, metric)
    return text.append(f" {known}", "dim") if known else text


def _who(results: Sequence[Results]) -> str:
    names = results[0].characters if results else []
    return names[0] if len(names) == 1 else f"mean over {len(names)} characters"

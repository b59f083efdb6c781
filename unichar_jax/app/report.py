"""A report that can be sent to anybody: one HTML file with its pictures inside, without script or links.

``Report`` is plain data: what the page says and shows, in the order it does. ``render`` turns it into a page
with the pieces in ``html/``; ``write_report`` saves it, whole or not at all. Helpers below make parts from
what other floors have: results of evaluations, a run's metrics. A section without content is left out.
Whatever texts hold is shown as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from unichar_jax.app.charts import SERIES_COLOURS, Chart, Series, line_chart, whisker
from unichar_jax.data.images import open_image, to_rgb
from unichar_jax.errors import UserError
from unichar_jax.evaluation import tables
from unichar_jax.evaluation.items import TASKS
from unichar_jax.evaluation.results import METRICS, Results
from unichar_jax.files import write_text
from unichar_jax.sampling.session import RolePlay
from unichar_jax.training import metrics as metrics_log

LARGEST = 512
"""Longer side of a picture in the page; larger ones are shrunk."""

_LOSSLESS = 256
_COUNTS = "No One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve"


@dataclass(frozen=True)
class Picture:
    """A picture, or a file of one, with a caption (its text for those who cannot see it)."""

    image: Image.Image | str | Path
    caption: str = ""


@dataclass(frozen=True)
class Column:
    """What one model drew: for every prompt of the comparison, its pictures in the order of seeds."""

    label: str
    pictures: tuple[tuple[Picture, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The same prompts and seeds drawn by several models."""

    prompts: tuple[str, ...]
    columns: tuple[Column, ...]
    about: str = "The same held-out prompts and the same random draws for every model."

    def __post_init__(self) -> None:
        for column in self.columns:
            if len(column.pictures) != len(self.prompts):
                raise ValueError(
                    f"{column.label}: {len(column.pictures)} rows for {len(self.prompts)} prompts"
                )


@dataclass(frozen=True)
class Exchange:
    """One turn of a conversation."""

    user: str
    reply: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Conversation:
    """Role play: who speaks, the words it opens with, and the turns."""

    name: str
    turns: tuple[Exchange, ...]
    opening: str = ""


@dataclass(frozen=True)
class Measurements:
    """Results side by side; the last model is compared with the first. ``character``: of one, not the mean."""

    results: tuple[Results, ...]
    title: str = ""
    character: str | None = None


@dataclass(frozen=True)
class Command:
    """What to type next, and what it does."""

    command: str
    purpose: str


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
      title: of the page.
      summary: what happened, in plain words.
      kicker: a few words above the title.
      references: the training pictures.
      comparison: contact sheets side by side.
      conversation: a role-play transcript.
      measurements: tables of metrics.
      charts: training curves.
      making: how it was made, name and value (base, seeds, timings, versions).
      configs: name and text of configurations, folded away.
      commands: what to do next.
      footer: last line.
    """

    title: str
    summary: str
    kicker: str = "UniChar-JAX"
    references: tuple[Picture, ...] = ()
    comparison: Comparison | None = None
    conversation: Conversation | None = None
    measurements: tuple[Measurements, ...] = ()
    charts: tuple[Chart, ...] = ()
    making: tuple[tuple[str, str], ...] = ()
    configs: tuple[tuple[str, str], ...] = ()
    commands: tuple[Command, ...] = ()
    footer: str = "Made by UniChar-JAX. This file holds everything it shows and loads nothing."


def write_report(report: Report, path: str | Path) -> Path:
    """Saves the page, whole or not at all."""
    path = Path(path)
    page = render(report)
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error}); give another place.") from None
    return path


def render(report: Report) -> str:
    """The page as HTML."""
    made: list[tuple[str, str, str]] = []

    def add(name: str, title: str, body: str) -> None:
        if body:
            made.append((name, title, f'<section id="{name}"><h2>{title}</h2>{body}</section>'))

    count = len(report.references)
    add("pictures", f"{_count(count)} training picture{'s' * (count != 1)}", _gallery(report.references))
    add("sheets", "Held-out prompts", _comparison(report.comparison))
    add("conversation", "A conversation", _conversation(report.conversation))
    add("measurements", "Measurements", "".join(map(_measurements, report.measurements)))
    add("training", "Training", _charts(report.charts))
    add("making", "How it was made", _making(report))
    add("next", "What next", "".join(map(_command, report.commands)))
    return string.Template(_piece("page.html")).substitute(
        style=_piece("style.css"),
        kicker=_text(report.kicker),
        title=_text(report.title),
        summary=_text(report.summary),
        contents="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in made),
        sections="\n".join(body for _, _, body in made),
        footer=_text(report.footer),
    )


# -- sections -----------------------------------------------------------------------------------------------


def _gallery(pictures: Sequence[Picture]) -> str:
    return f'<div class="gallery">{"".join(_figure(p) for p in pictures)}</div>' if pictures else ""


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None or not comparison.prompts:
        return ""
    cards = []
    for place, prompt in enumerate(comparison.prompts):
        columns = []
        for column in comparison.columns:
            shown = column.pictures[place]
            note = f" <small>{_text(column.note)}</small>" if column.note else ""
            alt = f"{column.label}: {prompt}"
            drawn = "".join(_img(p, p.caption or alt) for p in shown) or '<span class="none">nothing</span>'
            columns.append(
                f'<div><p class="label">{_text(column.label)}{note}</p>'
                f'<div class="seeds" style="--seeds:{max(1, len(shown))}">{drawn}</div></div>'
            )
        cards.append(
            f'<article class="prompt"><h3>{_text(prompt)}</h3><div class="columns">{"".join(columns)}</div></article>'
        )
    return f'<p class="lead">{_text(comparison.about)}</p>{"".join(cards)}'


def _conversation(talk: Conversation | None) -> str:
    if talk is None or not (talk.turns or talk.opening):
        return ""

    def said(who: str, name: str, text: str) -> str:
        return f'<p class="who {who}">{_text(name)}</p><p class="said {who}">{_text(text)}</p>'

    turns = [f'<div class="turn">{said("character", talk.name, talk.opening)}</div>'] if talk.opening else []
    for turn in talk.turns:
        picture = _figure(turn.picture, f"{talk.name}: {turn.reply}") if turn.picture else ""
        turns.append(
            f'<div class="turn">{said("user", "You", turn.user)}{said("character", talk.name, turn.reply)}'
            f"{picture}</div>"
        )
    return f'<div class="chat">{"".join(turns)}</div>'


def _measurements(shown: Measurements) -> str:
    results = shown.results
    found = tables.rows(results, shown.character)
    if not found:
        return ""
    with_change, with_paper = tables.compared(results) is not None, any(r.paper is not None for r in found)
    heads = [_text(r.label) for r in results] + ["change"] * with_change + ["paper"] * with_paper
    head = "".join(f'<th scope="col">{h}</th>' for h in ["", *heads])
    bodies: dict[str, list[str]] = {}
    for row in found:
        cells = [_metric_cell(cell, row.metric) for cell in row.cells]
        if with_change:
            cells.append(_change_cell(row))
        if with_paper:
            quoted = "" if row.paper is None else tables.number(row.paper, row.metric)
            cells.append(f'<td class="none">{quoted}</td>')
        arrow = {"higher": "↑", "lower": "↓", "none": ""}[row.metric.better]
        name = f'<th scope="row" title="{_text(row.metric.about)}">{_text(row.metric.title)} {arrow}</th>'
        bodies.setdefault(row.task, []).append(f"<tr>{name}{''.join(cells)}</tr>")
    span = len(heads)
    grouped = "".join(
        f'<tbody><tr class="task"><th scope="rowgroup">{_text(task.replace("_", " "))}</th>'
        f'<td colspan="{span}">{_text(TASKS.get(task, ""))}</td></tr>{"".join(lines)}</tbody>'
        for task, lines in bodies.items()
    )
    title = f"<h3>{_text(shown.title)}</h3>" if shown.title else ""
    notes = "".join(f"<p>{_text(n)}</p>" for n in tables.notes(results))
    meanings = {row.name: row.metric for row in found if row.metric.about}
    order = [name for name in METRICS if name in meanings] + [n for n in meanings if n not in METRICS]
    told = "".join(f"<dt>{_text(meanings[n].title)}</dt><dd>{_text(meanings[n].about)}</dd>" for n in order)
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead>{grouped}</table></div>'
        f'<div class="notes">{notes}</div><details><summary>What each number means</summary><dl>{told}</dl></details>'
    )


def _metric_cell(cell: tables.Cell, metric: tables.Metric) -> str:
    if cell.interval is None:
        return '<td class="none">–</td>'
    mark = tables.REWARD_MARK if cell.rewarded else ""
    known = tables.bounds(cell.interval, metric)
    small = f"<small>{known}</small>" if known else ""
    i = cell.interval
    drawn = whisker(i.mean, i.low, i.high) if metric.shown == "percent" else ""
    return f"<td>{tables.number(i.mean, metric)}{mark}{small}{drawn}</td>"


def _change_cell(row: tables.Row) -> str:
    text = tables.change_text(row.change, row.metric)
    mean, _, known = text.partition(" ")
    small = f"<small>{known}</small>" if known else ""
    return f'<td class="{tables.verdict(row) or "none"}">{mean or "–"}{small}</td>'


def _charts(charts: Sequence[Chart]) -> str:
    made = []
    for chart in charts:
        names = [s.name for s in chart.series[:SERIES_COLOURS]]
        keys = "".join(f'<span class="l{i}"><i></i>{_text(n)}</span>' for i, n in enumerate(names))
        legend = f'<p class="legend">{keys}</p>' if len(names) > 1 else ""
        made.append(
            f'<figure class="chart"><h3>{_text(chart.title)}</h3>{legend}{line_chart(chart)}</figure>'
        )
    return f'<div class="charts">{"".join(made)}</div>' if made else ""


def _making(report: Report) -> str:
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in report.making)
    folded = "".join(
        f"<details><summary>{_text(name)}</summary><pre>{_text(text)}</pre></details>"
        for name, text in report.configs
    )
    return (f"<dl>{facts}</dl>" if facts else "") + folded


def _command(command: Command) -> str:
    return f'<div class="command"><p>{_text(command.purpose)}</p><pre><code>{_text(command.command)}</code></pre></div>'


# -- small things -------------------------------------------------------------------------------------------


def _piece(name: str) -> str:
    return resources.files("unichar_jax.app").joinpath(f"html/{name}").read_text(encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


def _count(n: int) -> str:
    words = _COUNTS.split()
    return words[n] if n < len(words) else str(n)


def _figure(picture: Picture, alt: str = "") -> str:
    told = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>{_img(picture, picture.caption or alt)}{told}</figure>"


def _img(picture: Picture, alt: str) -> str:
    image = picture.image
    image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small = max(image.size) <= _LOSSLESS
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, (width, height) = ("png" if small else "jpeg"), image.size
    return (
        f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{_text(alt)}"'
        ' loading="lazy">'
    )


# -- parts from what other floors have ----------------------------------------------------------------------


def conversation(played: RolePlay) -> Conversation:
    """A role play as it went."""
    turns = (Exchange(t.user, t.reply, None if t.image is None else Picture(t.image)) for t in played.turns)
    return Conversation(played.persona.name, tuple(turns), played.persona.opening)


def compare(
    results: Sequence[Results],
    task: str = "t2i",
    *,
    character: str | None = None,
    prompts: int = 6,
    notes: Sequence[str] = (),
) -> Comparison:
    """Contact sheets of one task from results whose pictures are still where they were.

    Args:
      results: the columns, from left to right.
      task: a drawing task.
      character: whose prompts; by default everybody's.
      prompts: at most so many rows, evenly chosen.
      notes: a few words for each column.
    """
    drawn: list[dict[str, list[tuple[int, str]]]] = []
    asked: dict[str, str] = {}
    for result in results:
        by_item: dict[str, list[tuple[int, str]]] = {}
        for r in result.records:
            if (
                r.task == task
                and character in (None, r.character)
                and r.picture
                and Path(r.picture).is_file()
            ):
                by_item.setdefault(r.item, []).append((r.seed, r.picture))
                asked.setdefault(r.item, r.question)
        drawn.append(by_item)
    every = list(asked)
    chosen = [every[i * len(every) // min(prompts, len(every))] for i in range(min(prompts, len(every)))]
    columns = tuple(
        Column(
            result.label,
            tuple(tuple(Picture(path) for _, path in sorted(by_item.get(item, []))) for item in chosen),
            notes[place] if place < len(notes) else "",
        )
        for place, (result, by_item) in enumerate(zip(results, drawn, strict=True))
    )
    return Comparison(tuple(asked[item] for item in chosen), columns)


def curves(
    path: str | Path, names: Sequence[str], titles: Mapping[str, str] | None = None
) -> tuple[Chart, ...]:
    """A chart for each metric of a run's ``metrics.jsonl`` that is named and there.

    Args:
      path: the file.
      names: of metrics; ``"a|b"`` puts several into one chart.
      titles: of charts, where the name will not do.
    """
    records = metrics_log.read(Path(path)) if Path(path).is_file() else []
    charts = []
    for name in names:
        lines = []
        for metric in name.split("|"):
            points = [(r["step"], r[metric]) for r in records if metric in r]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Series(metric, tuple(map(float, x)), tuple(map(float, y))))
        if lines:
            charts.append(Chart((titles or {}).get(name, name.replace("|", ", ")), tuple(lines)))
    return tuple(charts)

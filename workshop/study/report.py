"""The report of a study, made from saved results alone: a page in Markdown, its numbers, a sheet of pictures.

``write_report`` takes a study's folder, or a folder that already holds ``results.json``, and writes the same bytes
for the same numbers. What is missing is said; nothing is asked of a model.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unichar_jax.app.report import compare
from unichar_jax.app.sheet import contact_sheet
from unichar_jax.evaluation.results import Results
from unichar_jax.evaluation.stats import mean_interval
from unichar_jax.evaluation.tables import REWARD_MARK, bounds, change_text, number
from unichar_jax.files import write_text
from workshop.study import claims
from workshop.study.claims import CLAIMS, SOURCES, UNTESTABLE, Finding, Judged, metric_of
from workshop.study.design import (
    ALL_PICTURES,
    EARLY_STEPS,
    FEW_FREE,
    FEW_GENTLE,
    FEW_GUIDED,
    FEW_OURS,
    FEW_PICTURES,
    STAGE2,
    VARIANTS,
    Study,
)
from workshop.study.summary import KEPT, Summary, joined, summarise, title

PAGE, NUMBERS, SHEET = "README.md", "results.json", "sheet.png"

COLUMNS = (
    ("t2i", "identity"),
    ("t2i", "prompt_following"),
    ("t2t2i", "consistency"),
    ("knowledge_mcq", "answer_accuracy"),
    ("knowledge_mcq", "accuracy"),
    ("unseen_image_mcq", "accuracy"),
    ("vqa", "exact"),
    ("reply_likelihood", "nats_per_char"),
    ("dialogue", "voice"),
    ("t2i", "clip_t"),
    ("t2i", "dino"),
    ("t2i", "diversity"),
    ("t2i", "apart"),
    ("t2i", "copied"),
)
"""Of the table of all variants; the independent judge's come first."""


def write_report(sources: Path | Sequence[Path], to: Path) -> Path:
    """Writes ``README.md``, ``results.json`` and, where pictures are at hand, ``sheet.png``; returns the page.

    Args:
      sources: studies' folders, or folders with the ``results.json`` of an earlier report; several are one study
        that was run in parts, and count with what the later ones measured where parts overlap.
      to: gets the files.

    Raises:
      UserError: a folder is neither, or the parts were run with different settings.
    """
    folders = [sources] if isinstance(sources, Path) else list(sources)
    is_fresh = lambda source: (source / "study.json").is_file() or not (source / NUMBERS).is_file()  # noqa: E731
    summary = functools.reduce(
        joined, [summarise(s) if is_fresh(s) else Summary.load(s / NUMBERS) for s in folders]
    )
    to.mkdir(parents=True, exist_ok=True)
    drawn = _sheet([s for s in folders if is_fresh(s)], summary, to / SHEET) or (to / SHEET).is_file()
    _write(to / NUMBERS, summary.to_json())
    _write(to / PAGE, page(summary, with_sheet=drawn))
    return to / PAGE


def page(summary: Summary, *, with_sheet: bool = False) -> str:
    """The report in Markdown."""
    judged = [claims.judge(claim, summary) for claim in CLAIMS]
    sections = [
        "# Which claims show in the mini world",
        conclusion(judged, summary),
        "## What was run",
        _what_was_run(summary),
        "## Claims",
        _claims(judged),
        "## What the verdicts rest on",
        _findings(judged),
        "## What cannot be tested here",
        "\n".join(f"- **{what}**: {why}" for what, why in UNTESTABLE),
        "## All variants",
        _variants(summary),
        _stage2(summary),
        f"## Pictures\n\nThe same held-out captions and random draws for every variant.\n\n![pictures]({SHEET})"
        if with_sheet
        else "",
        "## Coverage",
        _coverage(summary),
        "## How to make it again",
        f"    {_command(summary)}\n    python -m workshop.study report runs/study --to docs/study",
        f"The second command needs saved results only. Without the folder of the runs, [{NUMBERS}]({NUMBERS}) is"
        " enough: `python -m workshop.study report docs/study --to docs/study`.",
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


# -- words --------------------------------------------------------------------------------------------------


def conclusion(judged: list[Judged], summary: Summary) -> str:
    """What it comes to, in plain words, from the verdicts and nothing else."""
    count = claims.counts(judged)
    told = [
        f"{len(judged)} claims: {count['shows']} borne out, {count['does not show']} not borne out,"
        f" {count['undecided']} undecided, {count['not measured']} not measured."
    ]
    for verdict, start in (
        ("shows", "Borne out"),
        ("does not show", "Not borne out"),
        ("undecided", "Undecided"),
    ):
        found = [f"- {j.claim.sentence}" for j in judged if j.verdict == verdict]
        if found:
            told.append("\n".join([f"**{start}:**", "", *found]))
    if summary.missing:
        planned = len(summary.planned)
        told.append(
            f"The study is incomplete: {planned - len(summary.missing)} of {planned} planned jobs are done."
        )
    return "\n\n".join(told)


def _command(summary: Summary) -> str:
    """What does it all: with what is planned, and the settings that are not the defaults."""
    told: dict[str, Any] = {
        "characters": summary.characters,
        "seeds": summary.seeds,
        "variants": summary.variants,
    }
    for field in dataclasses.fields(Study):
        usual = list(field.default) if isinstance(field.default, tuple) else field.default
        if summary.settings.get(field.name, usual) != usual:
            told[field.name] = summary.settings[field.name]
    words = ["python", "-m", "workshop.study", "run", "--out", "runs/study"]
    for name, value in told.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _ceiling(summary: Summary) -> list[str]:
    """What the judge makes of the drawings that everybody is compared with."""
    interval = mean_interval(summary.values("originals", "t2i", "identity"))
    if interval is None:
        return []
    return [
        f"The judge is a network and errs: it reads {number(interval.mean, metric_of('identity'))} of the characters'"
        " looks rightly from the held-out drawings themselves (the row of the originals). A variant near that figure"
        " draws the looks as well as this judge can tell."
    ]


def _what_was_run(summary: Summary) -> str:
    settings = summary.settings
    few, guided, gentle = VARIANTS[FEW_OURS].stage2, VARIANTS[FEW_GUIDED].stage2, VARIANTS[FEW_GENTLE]
    free = VARIANTS[FEW_FREE].stage2
    facts = [
        f"Characters of the mini world: {', '.join(summary.characters)}; training seeds:"
        f" {', '.join(map(str, summary.seeds))}; {len(summary.variants)} variants; {ALL_PICTURES} training"
        " pictures unless a variant says otherwise.",
        "A character's data are the same for all seeds and variants; fewer training pictures are the first of the ten,"
        " and every variant is measured on the same held-out items against all ten.",
        "Specialists take as many steps as Unified-SFT, all of them on their own kind of sample; prompts name the"
        " character and never tell its looks, except where the base is told the profile.",
        f"Base `{settings['base']}`, stage 1 `{settings['sft']}`, stage 2 `{settings['grpo']}`, published recipe"
        f" `{settings['published']}`"
        + "".join(f", {name} {settings[name]}" for name in ("steps", "rounds") if settings.get(name))
        + f"; {settings['repetitions']} repetitions of what is random, {settings['draw_steps']} drawing steps,"
        f" guidance {settings['guidance']:g}.",
        "At the end of stage 1 little is left to win: prompts are followed, and the pictures of a prompt hardly differ."
        f" So the recipes of stage 2 are also compared from a stage 1 of {EARLY_STEPS} steps, where looks are half"
        " learned. Diversity is then for the most part that of wrong looks, and falls as they are mended; and from a"
        f" stage 1 that saw {FEW_PICTURES} pictures only, which draws them again whatever is asked for.",
        f"From that stage 1 nft takes {few['rounds']} rounds and divides by a group's own deviation, because groups"
        " hardly differ; with more rounds (tried on Pip's first seed) prompts gained no more and looks fell.",
        f"Where half of each group is drawn with guidance (scale {max(guided['nft.scales']):g}; the other half and the"
        f" held-out pictures without), groups differ, and there are gains for {guided['rounds']} rounds; looks weigh"
        " twice as much there, and diversity two and a half times (chosen on the first seeds of Pip, Bruno and Hazel;"
        " the others of the cast were never looked at before).",
        "The published reward asks for a similarity to the training pictures between 0.5 and 0.9, which lets looks go"
        " here; so flow_grpo also gets our reward, with a learning rate a third as large,"
        f" {gentle.stage2['rounds']} rounds, and diversity at {gentle.weights['diversity']:g} (0.5 let it fall on"
        " Bruno).",
        "flow_grpo without guidance starts where nft does, from copies, and its stochastic steps make a group differ:"
        f" {free['rollout.solver']} steps, because those of the published recipe leave noise in pictures; our reward,"
        f" weighed as for the guided nft; adapters and {free['rounds']} rounds, because blots grow where the whole"
        " expert learns or rounds go on (chosen on the first seeds of Hazel and Bruno, who are not among those"
        " measured).",
        "Diversity is rewarded and measured by an encoder that knows a character's looks, which should not vary here;"
        " so claims ask that the pictures of a prompt vary more in their pixels, which is never a reward. Runs from"
        " before this was measured have no number for it.",
        "Each recipe's held-out pictures are drawn as it learns to draw: nft, and flow_grpo on adapters, without"
        " guidance; the published recipe with (scale 4, two evaluations a step), which the text-image term of the"
        " reward favours. Its learning rate is raised from the published 1e-5 to 3e-4, because this model is two"
        " thousand times smaller.",
        "Intervals: 95 %, paired bootstrap over held-out items; an item's repetitions and seeds are averaged first,"
        " characters count alike. They say what other items would change; what another training seed changes is shown"
        " seed by seed.",
        *_ceiling(summary),
        "Identity, prompt following and consistency are read by the independent judge, which is never a reward."
        f" {REWARD_MARK} marks a metric that the model was trained to raise: it does not decide a claim.",
    ]
    if "base_sha256" in settings:
        facts.append(f"Base weights: sha256 `{settings['base_sha256']}`.")
    versions = ", ".join(f"{name} {v}" for name, v in settings.get("versions", {}).items())
    facts.append(f"Versions: {versions}.")
    facts += [f"Not measured: {name} ({why})." for name, why in sorted(summary.left_out.items())]
    return "\n".join(f"- {fact}" for fact in facts)


# -- tables -------------------------------------------------------------------------------------------------


def _claims(judged: Sequence[Judged]) -> str:
    rows = [(str(n), j.claim.sentence, j.claim.source, f"**{j.verdict}**") for n, j in enumerate(judged, 1)]
    sources = "; ".join(f"*{name}*: {about}" for name, about in SOURCES.items())
    return f"{_table(('', 'claim', 'source', 'verdict'), rows)}\n\nSources: {sources}."


def _findings(judged: Sequence[Judged]) -> str:
    """What each verdict rests on."""
    told = [
        "A claim shows if all of its lines do. Differences are in points of a percentage, factors of a perplexity, or"
        " the metric's own unit."
    ]
    heads = ("measured", "of", "against", "characters", "asked for", "found", "seed by seed", "verdict")
    for place, one in enumerate(judged, 1):
        why = f" ({one.why})" if one.why else ""
        told.append(f"**{place}. {one.claim.sentence}** – {one.verdict}{why}.")
        told.append(_table(heads, [_finding_cells(f) for f in one.findings]))
    return "\n\n".join(told)


def _finding_cells(finding: Finding) -> tuple[str, ...]:
    check, metric = finding.check, metric_of(finding.check.metric)
    mark = REWARD_MARK if finding.rewarded else ""
    first = title(check.first) if check.first else ""
    whose = _whose(finding.characters)
    asked = (f"{check.task}: {metric.title}{mark}", title(check.second), first, whose, check.asked)
    if finding.interval is None:
        return *asked, "–", "", finding.verdict
    if check.first:
        found = change_text(finding.interval, metric)
        alone = dataclasses.replace(finding.interval, low=None, high=None)
        seeds = [change_text(dataclasses.replace(alone, mean=mean), metric) for mean in finding.by_seed]
    else:
        found = f"{number(finding.interval.mean, metric)} {bounds(finding.interval, metric)}".strip()
        seeds = [number(mean, metric) for mean in finding.by_seed]
    why = f": {finding.why}" if finding.why else ""
    return *asked, found, ", ".join(seeds), f"{finding.verdict}{why}"


def _whose(characters: Sequence[str]) -> str:
    return characters[0] if len(characters) == 1 else str(len(characters) or "–")


def _variants(summary: Summary) -> str:
    heads = [f"{task}: {metric_of(name).title}{_arrow(name)}" for task, name in COLUMNS]
    rows = []
    for variant in summary.variants:
        if variant in summary.numbers:
            cells = [_cell(summary, variant, task, name) for task, name in COLUMNS]
            characters = {c for by_character in summary.numbers[variant].values() for c in by_character}
            rows.append((VARIANTS[variant].title, _whose(sorted(characters)), *cells))
    return _table(("variant", "characters", *heads), rows) if rows else "No results yet."


def _stage2(summary: Summary) -> str:
    rows = []
    for variant in summary.variants:
        for done in summary.rounds(variant):
            subject = f"{variant}@{done}"
            cells = [_cell(summary, subject, STAGE2, name) for name in KEPT[STAGE2]]
            rows.append((title(variant), str(done), f"{summary.evaluations[subject]:,.0f}", *cells))
    if not rows:
        return ""
    heads = [f"{metric_of(name).title}{_arrow(name)}" for name in KEPT[STAGE2]]
    about = (
        "## Stage 2 while it trains\n\nOn prompts that it never trains on, mean over characters and seeds. The"
        " published reward weighs the terms as the published recipe does, so that recipes can be compared."
    )
    return f"{about}\n\n{_table(('variant', 'round', 'model evaluations', *heads), rows)}"


def _coverage(summary: Summary) -> str:
    rows = []
    for variant in summary.variants:
        done, planned = summary.coverage(variant)
        absent = [place.partition("/")[2] for place in summary.missing if place.startswith(f"{variant}/")]
        shown = ", ".join(absent[:6]) + (f" and {len(absent) - 6} more" if len(absent) > 6 else "")
        rows.append((VARIANTS[variant].title, f"{done} of {planned}", shown))
    return _table(("variant", "jobs done", "missing"), rows)


def _cell(summary: Summary, subject: str, task: str, name: str) -> str:
    interval = mean_interval(summary.values(subject, task, name))
    if interval is None:
        return "–"
    metric = metric_of(name)
    mark = REWARD_MARK if summary.was_rewarded(subject, name) else ""
    return f"{number(interval.mean, metric)}{mark} {bounds(interval, metric)}".strip()


def _arrow(name: str) -> str:
    return {"higher": " ↑", "lower": " ↓", "none": ""}[metric_of(name).better]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- pictures -----------------------------------------------------------------------------------------------


def _sheet(folders: Sequence[Path], summary: Summary, path: Path) -> bool:
    """The first character and seed of whom most variants have pictures; False without any picture."""
    homes = {
        job.place: home
        for job in summary.planned
        for home in (folder / "jobs" / job.place for folder in folders)
        if (home / "results.json").is_file()
    }
    done = [job for job in summary.planned if job.place in homes]
    shown = {
        (character, seed): [j for j in done if j.character == character and j.seed in (None, seed)]
        for character in summary.characters
        for seed in summary.seeds
    }
    best = max(shown.values(), key=len, default=[])
    order = list(VARIANTS)
    results = []
    for job in sorted(best, key=lambda j: order.index(j.variant.name)):
        home = homes[job.place]
        found = Results.load(home / "results.json")
        records = tuple(
            dataclasses.replace(r, picture=str(home / r.picture)) for r in found.records if r.picture
        )
        if records:
            results.append(dataclasses.replace(found, label=job.variant.name, records=records))
    drawn = compare(results, prompts=4)
    if not drawn.prompts:
        return False
    contact_sheet(drawn).save(path)
    return True


def _write(path: Path, text: str) -> None:
    write_text(path, text)

"""What is claimed, and whether the numbers of a study show it.

A ``Claim`` is a sentence and its ``Check``s. A check asks for a gain of one subject over another (or for a level) in
one metric; its 95 % interval lies above the bound ("shows"), below it ("does not show"), or holds it
("undecided"). A claim shows if all of its checks do. What a model was trained to raise may be a check, and is
marked, but never decides: without a check by an independent measure a claim stays undecided.

Intervals are ``evaluation.stats``: over items, paired, an item's seeds averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unichar_jax.evaluation.results import METRICS, Metric
from unichar_jax.evaluation.stats import Interval, Values, mean_interval, paired_difference
from workshop.study.design import (
    FEW_FREE,
    FEW_GENTLE,
    FEW_GUIDED,
    FEW_OURS,
    FEW_PUBLISHED,
    OURS,
    PUBLISHED,
    RECIPES,
    STAGE2,
)
from workshop.study.summary import COST, WITHIN_A_THIRD, Summary, title

Verdict = Literal["shows", "does not show", "undecided", "not measured"]

_METRICS: Mapping[str, Metric] = METRICS | {
    "reward": Metric("own reward", shown="number"),
    "published_reward": Metric("published reward", shown="number"),
    WITHIN_A_THIRD: Metric("runs that reach it within a third"),
}


def metric_of(name: str) -> Metric:
    return _METRICS.get(name, Metric(name, shown="number"))


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      second: the subject that is judged.
      task, metric: in what.
      first: the subject it is compared with; empty asks for a level.
      least: bound of the gain or of the level, in the metric's own unit, where more is always better (a
        metric whose lower values are better is turned around); below 0: not worse by more than that.
    """

    second: str
    task: str
    metric: str
    first: str = ""
    least: float = 0.0

    @property
    def asked(self) -> str:
        """The bound, for readers."""
        percent = metric_of(self.metric).shown == "percent"
        unit = (" points" if self.first else " %") if percent else ""
        bound = f"{abs(self.least) * (100 if percent else 1):g}{unit}"
        if not self.first:
            return f"at least {bound}"
        return (
            f"at least {bound} better"
            if self.least > 0
            else f"at most {bound} worse"
            if self.least < 0
            else "better"
        )


@dataclass(frozen=True)
class Finding:
    """What came of a check.

    Attributes:
      interval: of the difference or the level, in the metric's own direction; None if it was not measured.
      by_seed: the same for every training seed alone.
      characters: of whom both were measured.
      rewarded: one of the two was trained to raise the metric.
      why: what is absent.
    """

    check: Check
    verdict: Verdict
    interval: Interval | None = None
    by_seed: tuple[float, ...] = ()
    characters: tuple[str, ...] = ()
    rewarded: bool = False
    why: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that numbers can bear out; ``source`` says whose it is (see ``SOURCES``)."""

    source: str
    sentence: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Judged:
    """A claim, its verdict, and what that rests on."""

    claim: Claim
    verdict: Verdict
    findings: tuple[Finding, ...]
    why: str = ""


def examine(check: Check, summary: Summary) -> Finding:
    """The verdict on one check."""
    values = {
        name: summary.values(name, check.task, check.metric) for name in (check.first, check.second) if name
    }
    absent = [title(name) for name, found in values.items() if not found]
    rewarded = any(summary.was_rewarded(name, check.metric) for name in values)
    if absent:
        return Finding(check, "not measured", rewarded=rewarded, why=f"no numbers of {' and '.join(absent)}")
    interval = _interval(check, values)
    if interval is None:
        return Finding(
            check, "not measured", rewarded=rewarded, why="the two have no item and seed in common"
        )
    by_seed = []
    for seed in summary.seeds:
        alone = _interval(check, {name: _of_seed(found, seed) for name, found in values.items()})
        by_seed += [] if alone is None else [alone.mean]
    verdict, why = _verdict(check, interval)
    shared = tuple(c for c in summary.characters if all(c in found for found in values.values()))
    return Finding(check, verdict, interval, tuple(by_seed), shared, rewarded, why)


def _interval(check: Check, values: Mapping[str, Values]) -> Interval | None:
    if not check.first:
        return mean_interval(values[check.second])
    return paired_difference(values[check.first], values[check.second])


def _of_seed(values: Values, seed: int) -> Values:
    return {
        character: {item: {seed: seeds[seed]} for item, seeds in items.items() if seed in seeds}
        for character, items in values.items()
        if any(seed in seeds for seeds in items.values())
    }


def _verdict(check: Check, interval: Interval) -> tuple[Verdict, str]:
    if interval.low is None or interval.high is None:
        return "undecided", "a single item has no interval"
    ends = [interval.low, interval.high]
    if metric_of(check.metric).better == "lower":
        ends = [-interval.high, -interval.low]
    # A bound of 0 asks for a gain, any other is itself enough.
    if ends[0] > check.least or ends[0] == check.least != 0:
        return "shows", ""
    if ends[1] < check.least:
        return "does not show", ""
    return "undecided", "the interval holds the bound"


def judge(claim: Claim, summary: Summary) -> Judged:
    """The verdict on a claim."""
    findings = tuple(examine(check, summary) for check in claim.checks)
    verdicts = [f.verdict for f in findings]
    measured = [f for f in findings if f.verdict != "not measured"]
    if not measured:
        return Judged(claim, "not measured", findings, findings[0].why)
    if all(f.rewarded for f in measured):
        return Judged(claim, "undecided", findings, "only what was trained for says anything of it")
    if "does not show" in verdicts:
        return Judged(claim, "does not show", findings)
    if len(measured) < len(findings):
        absent = next(f.why for f in findings if f.verdict == "not measured")
        return Judged(claim, "undecided", findings, f"a part of it was not measured: {absent}")
    if "undecided" in verdicts:
        return Judged(claim, "undecided", findings)
    return Judged(claim, "shows", findings)


# -- the claims ---------------------------------------------------------------------------------------------

_MINI, _PAPER = "mini world", "UniCharacter"
_STAGE2, _ABLATION = "stage 2", "ablation"
SOURCES: Mapping[str, str] = {
    _MINI: "what the mini world is there to show of Unified-SFT",
    _PAPER: "what the paper (arXiv 2605.08129) says of its method, in our words",
    _STAGE2: "what Character-GRPO is to do on prompts it never trains on",
    _ABLATION: "a choice whose worth is in question",
}

_NEAR = -0.05
"""What counts as not worse: five points."""


def _drawing(second: str, first: str, metric: str = "identity", least: float = 0.0) -> Check:
    return Check(second, "t2i", metric, first, least)


def _stage2(variant: str, name: str) -> Claim:
    first, last = f"{variant}@first", f"{variant}@last"
    checks = [
        ("reward", 0.0),
        ("identity", _NEAR),
        ("prompt_following", 0.0),
        ("varied", 0.0),
        ("apart", 0.0),
    ]
    return Claim(
        _STAGE2,
        f"{name}: on held-out prompts the reward rises, identity does not fall, prompt following rises, the"
        " pictures of a prompt vary more, and they move away from the training pictures.",
        tuple(Check(last, STAGE2, metric, first, least) for metric, least in checks),
    )


def _cost(ours: str, when: str) -> Claim:
    last, published = f"{ours}@last", f"{RECIPES[ours]}@last"
    return Claim(
        _STAGE2,
        f"{when}, nft reaches the published recipe's last held-out reward with a third of the model evaluations, in"
        " more than half of the runs, and its pictures are no worse.",
        (
            Check(ours, COST, WITHIN_A_THIRD, least=0.5),
            Check(last, STAGE2, "identity", published, _NEAR),
            Check(last, STAGE2, "prompt_following", published, _NEAR),
        ),
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        _MINI,
        "Unified-SFT draws the character from its name alone, where the base cannot.",
        (_drawing("sft", "base", least=0.2),),
    ),
    Claim(
        _MINI,
        "Unified-SFT still draws what the prompt asks for: not more than 5 points below the base, whether that is"
        " told the name only or everything.",
        (
            _drawing("sft", "base", "prompt_following", _NEAR),
            _drawing("sft", "profile", "prompt_following", _NEAR),
        ),
    ),
    Claim(
        _MINI,
        "Unified-SFT's words and pictures agree better than those of two specialists in a row.",
        (Check("sft", "t2t2i", "consistency", "piped"),),
    ),
    Claim(
        _MINI,
        "Unified-SFT knows the character's facts: at least 70 % of multiple choice (chance: 25 %), answered in own"
        " words.",
        (Check("sft", "knowledge_mcq", "answer_accuracy", least=0.7),),
    ),
    Claim(
        _MINI,
        "Unified-SFT names the letter of the right option: at least 70 % of multiple choice on facts (chance: 25 %).",
        (Check("sft", "knowledge_mcq", "accuracy", least=0.7),),
    ),
    Claim(
        _MINI,
        "Unified-SFT answers questions about pictures it never saw: at least 80 %.",
        (Check("sft", "vqa", "exact", least=0.8),),
    ),
    Claim(
        _MINI,
        "Unified-SFT makes the character's held-out replies likelier.",
        (Check("sft", "reply_likelihood", "nats_per_char", "base"),),
    ),
    Claim(
        _ABLATION,
        "Customisation beats prompting: better than the base with the profile and a picture in the prompt.",
        (
            _drawing("sft", "profile_picture"),
            Check("sft", "reply_likelihood", "nats_per_char", "profile_picture"),
            Check("sft", "dialogue", "voice", "profile_picture"),
        ),
    ),
    Claim(
        _PAPER,
        "One model for words and pictures is better in words than training on words only.",
        (
            Check("sft", "knowledge_mcq", "answer_accuracy", "text_only"),
            Check("sft", "reply_likelihood", "nats_per_char", "text_only"),
        ),
    ),
    Claim(
        _PAPER,
        "One model for words and pictures is better in pictures than training on drawings only.",
        (_drawing("sft", "image_only"), _drawing("sft", "image_only", "prompt_following")),
    ),
    Claim(
        _PAPER,
        "More pictures of the character help its looks.",
        (_drawing("sft", "pictures_1"), _drawing("sft", "pictures_3")),
    ),
    Claim(
        _PAPER,
        "More pictures of the character help to draw what is asked for, not what was seen.",
        tuple(
            _drawing("sft", fewer, metric)
            for fewer in ("pictures_1", "pictures_3")
            for metric in ("prompt_following", "apart")
        ),
    ),
    Claim(
        _PAPER,
        "Character-GRPO improves on Unified-SFT: prompt following and consistency rise, identity does not fall.",
        (
            _drawing("grpo", "sft", "prompt_following"),
            Check("grpo", "t2t2i", "consistency", "sft"),
            _drawing("grpo", "sft", "identity", _NEAR),
        ),
    ),
    Claim(
        _ABLATION,
        "Every term of the reward does its part: without it, what it is for is worse.",
        (
            Check(f"{FEW_OURS}@last", STAGE2, "prompt_following", "no_visual_questions@last"),
            Check(f"{FEW_OURS}@last", STAGE2, "prompt_following", "no_text_image_match@last"),
            Check(f"{FEW_OURS}@last", STAGE2, "identity", "no_identity_band@last"),
            Check(f"{FEW_OURS}@last", STAGE2, "varied", "no_diversity@last"),
        ),
    ),
    _stage2(FEW_OURS, "nft, after a stage 1 with three pictures"),
    _stage2(
        FEW_GUIDED, "nft with half of each group drawn with guidance, after a stage 1 with three pictures"
    ),
    _stage2(FEW_PUBLISHED, "The published recipe (flow_grpo), after a stage 1 with three pictures"),
    _stage2(FEW_GENTLE, "flow_grpo with our reward and smaller steps, after a stage 1 with three pictures"),
    _stage2(
        FEW_FREE,
        "flow_grpo with our reward, without guidance, on adapters, after a stage 1 with three pictures",
    ),
    _stage2(OURS, "nft, after a short stage 1"),
    _stage2(PUBLISHED, "The published recipe (flow_grpo), after a short stage 1"),
    _stage2("grpo", "nft, after the whole of stage 1"),
    _cost(FEW_OURS, "After a stage 1 with three pictures"),
    _cost(FEW_GUIDED, "After a stage 1 with three pictures and with half of each group guided"),
    _cost(OURS, "After a short stage 1"),
    Claim(
        _ABLATION,
        "Adapters are as good as training all weights.",
        (
            _drawing("lora", "sft", "identity", _NEAR),
            _drawing("lora", "sft", "prompt_following", _NEAR),
            Check("lora", "knowledge_mcq", "answer_accuracy", "sft", _NEAR),
        ),
    ),
)

UNTESTABLE: tuple[tuple[str, str], ...] = (
    (
        "The published numbers (knowledge 77 %, visual questions 84 %, CLIP-I 0.88 and 0.86, memorization 5.45 of 7)",
        "they are of a 7-billion-parameter base (14 billion with both experts) and RoleScape-20 under an unpublished"
        " protocol; neither these weights nor its judge are here.",
    ),
    (
        "Real and published characters: faces, costumes, film stills",
        "the mini world is drawn by code, and its encoders and its judge know nothing else.",
    ),
    (
        "What people prefer, and marks from 1 to 7 for memory and personality",
        "there are no human raters here, and no large judge was asked; voice and facts are read by rule instead.",
    ),
    (
        "Long role play, open-ended talk and knowledge of the world",
        "a model of a few million parameters speaks in the short sentences of its picture-book world.",
    ),
    (
        "Resolutions of 512 and 1024 pixels, and about 100 GPU hours for stage 2",
        "everything here is 96 pixels wide; costs at real size are computed, not measured, and not in this study.",
    ),
)
"""What of the paper this study cannot test, and why."""


def counts(judged: list[Judged]) -> dict[Verdict, int]:
    """How many claims have which verdict."""
    verdicts: tuple[Verdict, ...] = ("shows", "does not show", "undecided", "not measured")
    return {v: int(np.sum([j.verdict == v for j in judged])) for v in verdicts}

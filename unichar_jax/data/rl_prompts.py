"""Drawing prompts for Character-GRPO, with the visual questions that score the pictures.

The files are ``<root>/personalized_t2i/<NAME>/<NAME>_pure_t2i_with_vqa.jsonl`` (``NAME`` with
underscores for spaces); the same prompts without questions stand in ``<NAME>_pure_t2i.jsonl`` and
serve where the former is absent. Published files repeat some prompts and about half of all questions,
which would silently count double in the reward: both are merged here, and a question that is asked
twice with contradicting answers keeps the one that is not marked negative.

No picture is opened here; the reference pictures of a character are ``Character.images``.

Source: UniCharacter (arXiv 2605.08129), flow_grpo data.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from unichar_jax.data import words
from unichar_jax.data.files import read_jsonl
from unichar_jax.records import DataError, Finding, Findings, Record, shown

WITH_QUESTIONS = "_pure_t2i_with_vqa.jsonl"
WITHOUT_QUESTIONS = "_pure_t2i.jsonl"
QUESTION_TYPES = ("yes_no", "multiple_choice", "open_ended")


@dataclasses.dataclass(frozen=True)
class RLQuestion:
    """A visual question that a picture of the prompt should answer as ``answer`` says.

    ``weight`` in [0, 1] is the question's share in the reward; ``is_negative`` marks a question about
    something that should not be seen.
    """

    question: str
    answer: str
    type: str
    category: str
    weight: float
    is_negative: bool
    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RLPrompt:
    """A drawing prompt, its questions without repeats, and how often the file has the prompt."""

    text: str
    character: str
    scene_id: str
    questions: tuple[RLQuestion, ...]
    count: int


def read_rl_prompts(path: Path) -> tuple[RLPrompt, ...]:
    """Reads a prompt file, or the prompt file of a character's folder.

    Raises:
      DataError: all faults of the file together, or there is no such file.
    """
    prompts, findings = scan_rl_prompts(path)
    if any(f.severity == "error" for f in findings):
        raise DataError(path, findings, "Correct the file, or leave it out to train stage 1 only.")
    return prompts


def scan_rl_prompts(path: Path) -> tuple[tuple[RLPrompt, ...], tuple[Finding, ...]]:
    """As :func:`read_rl_prompts`, but returns the findings instead of raising."""
    found = Findings(words.gate)
    name = _prompt_file(path)
    if name is None:
        found.error(
            path.name,
            "",
            "",
            f"a file <NAME>{WITH_QUESTIONS}",
            "none",
            "add it or correct the path",
        )
        return (), found.all
    folder = path if path.is_dir() else path.parent
    lines = read_jsonl(found, folder, name)
    if not lines and not found.failed:
        found.error(name, "", "", "at least one prompt", "none", "add prompts")
    merged: dict[str, RLPrompt] = {}
    ids: set[str] = set()
    for line in lines:
        prompt = _prompt(line)
        if not prompt:
            continue
        if prompt.scene_id in ids:
            line.error("scene_id", "each id once", f"{shown(prompt.scene_id)} again", "renumber")
        ids.add(prompt.scene_id)
        first = merged.get(prompt.text)
        if first:
            line.note("text", "each prompt once", "a repeat", f"merged into {shown(first.scene_id)}")
            prompt = dataclasses.replace(
                first,
                questions=_distinct(line, first.questions + prompt.questions),
                count=first.count + 1,
            )
        merged[prompt.text] = prompt
    return tuple(merged.values()), found.all


def _prompt_file(path: Path) -> str | None:
    if path.is_file():
        return path.name
    for suffix in (WITH_QUESTIONS, WITHOUT_QUESTIONS):
        names = sorted(p.name for p in path.glob(f"*{suffix}")) if path.is_dir() else []
        if names:
            return names[0]
    return None


def _prompt(line: Record) -> RLPrompt | None:
    line.expect("text", "character", "scene_id", "reference_images_path", "vqa_questions")
    if not line.ok:
        return None
    reference = line.text("reference_images_path", required=False)
    if reference.startswith(("/", "\\")) or ".." in PurePosixPath(reference).parts:
        line.error("reference_images_path", "a path relative to the data", shown(reference), "correct it")
    questions = []
    for item in line.records("vqa_questions"):
        item.expect(*(field.name for field in dataclasses.fields(RLQuestion)))
        if not item.ok:
            continue
        kind = item.text("type")
        if kind and kind not in QUESTION_TYPES:
            item.error("type", f"one of {', '.join(QUESTION_TYPES)}", shown(kind), "correct it")
        questions.append(
            RLQuestion(
                item.text("question"),
                item.text("answer"),
                kind,
                item.text("category", required=False),
                item.number("weight", 1.0, 0.0, 1.0),
                item.flag("is_negative"),
                item.texts("choices"),
            )
        )
    return RLPrompt(
        line.text("text"),
        line.text("character", required=False),
        line.text("scene_id"),
        _distinct(line, tuple(questions)),
        count=1,
    )


def _distinct(line: Record, questions: tuple[RLQuestion, ...]) -> tuple[RLQuestion, ...]:
    """Each question once, in order of first appearance."""
    kept: dict[str, RLQuestion] = {}
    contradictions = 0
    for question in questions:
        key = " ".join(question.question.lower().split())
        first = kept.setdefault(key, question)
        if first.answer.strip().lower() != question.answer.strip().lower():
            contradictions += 1
            if first.is_negative and not question.is_negative:
                kept[key] = question
    repeats = len(questions) - len(kept) - contradictions
    if repeats:
        line.note("vqa_questions", "each question once", f"{repeats} repeats", "they are dropped")
    if contradictions:
        line.note(
            "vqa_questions",
            "one answer to a question",
            f"{contradictions} contradictions",
            "the answer that is not marked negative is kept",
        )
    return tuple(kept.values())

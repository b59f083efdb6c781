"""Checks a data folder and says everything that is wrong with it, at once.

The reader already collects its findings; this module adds what only the pixels show (truncated
files, real transparency, a picture used for both training and test), runs over any number of
characters and prompt files, and prints the result. It changes nothing and reads nothing outside of
the folder it is given.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from unichar_jax.data.character import Character
from unichar_jax.data.images import ImageError, image_header, open_image
from unichar_jax.data.rl_prompts import WITH_QUESTIONS, WITHOUT_QUESTIONS, scan_rl_prompts
from unichar_jax.data.rolescape import find_characters, scan_character
from unichar_jax.data.tasks import TASKS, TEST_SETS, eval_items, samples
from unichar_jax.errors import UserError
from unichar_jax.files import digest
from unichar_jax.records import Finding, Findings


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """The findings about one character's folder or prompt file, and what it offers.

    ``counts`` maps tasks and test sets (``test: <name>``) to their numbers of samples; it is empty if
    there are errors.
    """

    name: str
    findings: tuple[Finding, ...]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings under one path."""

    path: Path
    folders: tuple[FolderReport, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self._all("error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        return self._all("note")

    @property
    def ok(self) -> bool:
        return not self.errors

    def _all(self, severity: str) -> tuple[Finding, ...]:
        return tuple(f for part in self.folders for f in part.findings if f.severity == severity)


def check(path: Path) -> Report:
    """Checks one character's folder, a whole data root, or a folder of RL prompts.

    Raises:
      UserError: there is no such path.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a character's folder or a data root.")
    path = path.absolute()
    if path.is_file() and path.suffix != ".jsonl":
        raise UserError(
            f"{path}: one file cannot be checked alone; give the folder it belongs to, or a .jsonl of RL prompts."
        )
    if path.is_file() or _holds_prompts(path):
        return Report(path, (_check_prompts(path, path.name),))
    if not any((path / part).is_dir() for part in ("train", "test", "personalized_data")):
        inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        asked = [p for p in inside if _holds_prompts(p)]
        characters = [p for p in inside if (p / "annotation.json").is_file() and p not in asked]
        if (asked or characters) and not any(path.glob("*.json")):  # a folder of folders
            parts = [_check_character(p, f"{path.name}/{p.name}")[0] for p in characters]
            return Report(path, (*parts, *(_check_prompts(p, f"{path.name}/{p.name}") for p in asked)))
        return Report(path, (_check_character(path, path.name)[0],))
    parts = []
    seen: dict[str, Character] = {}
    for folder in find_characters(path):
        part, character = _check_character(folder, f"{folder.parent.name}/{folder.name}")
        if character and character.split == "train":
            seen[character.dir_name] = character
        elif character and character.dir_name in seen:
            more = _compare_splits(seen[character.dir_name], character)
            part = dataclasses.replace(part, findings=part.findings + more)
        parts.append(part)
    prompts = path / "personalized_t2i"
    for folder in sorted(prompts.iterdir()) if prompts.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            parts.append(_check_prompts(folder, f"personalized_t2i/{folder.name}"))
    return Report(path, tuple(parts))


def _holds_prompts(folder: Path) -> bool:
    return any(any(folder.glob(f"*{suffix}")) for suffix in (WITH_QUESTIONS, WITHOUT_QUESTIONS))


def _check_character(folder: Path, name: str) -> tuple[FolderReport, Character | None]:
    character, findings = scan_character(folder)
    findings += _check_pixels(folder)
    counts = {}
    if character:
        counts = {task: len(samples(character, task)) for task in TASKS}
        counts |= {f"test: {test}": len(eval_items(character, test)) for test in TEST_SETS}
    return FolderReport(name, findings, counts), character


def _check_pixels(folder: Path) -> tuple[Finding, ...]:
    """Decodes every picture. What its header shows, the reader has reported already."""
    found = Findings()
    for path in sorted(folder.glob("*.png")):
        try:
            image_header(path.name, folder)
        except ImageError:
            continue
        try:
            image = open_image(path.name, folder, alpha=True)
        except ImageError as error:
            found.picture(path.name, folder, error)
            continue
        if _transparent(image):
            found.note(path.name, "", "", "an opaque picture", "transparency", "it is composited on white")
    return found.all


def _transparent(image: Image.Image) -> bool:
    lowest = image.getchannel("A").getextrema()[0] if image.mode == "RGBA" else 255
    return isinstance(lowest, int | float) and lowest < 255


def _compare_splits(train: Character, test: Character) -> tuple[Finding, ...]:
    findings = []
    for field in ("description", "opening"):
        if getattr(train, field) != getattr(test, field):
            findings.append(
                Finding(
                    "error",
                    "annotation.json",
                    "",
                    field,
                    "the same as in the train folder",
                    "another",
                    "use one text in both folders",
                )
            )
    known = {_digest(image.path): image.id for image in train.images}
    for image in test.images:
        twin = known.get(_digest(image.path))
        if twin is not None:
            findings.append(
                Finding(
                    "error",
                    f"{image.id}.png",
                    "",
                    "",
                    "a picture that training does not see",
                    f"train/{twin}.png again",
                    "test with another picture",
                )
            )
    return tuple(findings)


def _digest(path: Path) -> str:
    return digest(path.read_bytes())


def _check_prompts(path: Path, name: str) -> FolderReport:
    prompts, findings = scan_rl_prompts(path)
    counts = {"rl prompts": len(prompts), "rl questions": sum(len(p.questions) for p in prompts)}
    return FolderReport(name, findings, counts)


def main_check(path: Path, console: Console | None = None) -> int:
    """Checks ``path``, prints the report, and returns the exit code: 1 if there is an error."""
    console = console or Console()
    report = check(path)
    for part in report.folders:
        for line in _lines(part):
            console.print(line, soft_wrap=True)  # whole file names, whatever the terminal's width
    errors, notes = len(report.errors), len(report.notes)
    summary = f"{_number(len(report.folders), 'folder')} checked, {_number(errors, 'error')}, "
    summary += f"{_number(notes, 'note')}: "
    usable = any(any(part.counts.values()) for part in report.folders)
    verdict = "ready to train on." if usable else "nothing is wrong, but nothing to train on either."
    console.print(
        Text(
            summary + (verdict if report.ok else "mend the errors, then check again."),
            style="green" if report.ok else "red",
        ),
        soft_wrap=True,
    )
    return 0 if report.ok else 1


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _lines(part: FolderReport) -> Iterator[Text]:
    yield Text(part.name, style="bold")
    for what, prefix in (("train on", ""), ("test with", "test: ")):
        known = {
            n.removeprefix("test: "): c
            for n, c in part.counts.items()
            if n.startswith("test: ") == bool(prefix)
        }
        offered = ", ".join(f"{name} {count}" for name, count in known.items() if count)
        if offered:
            yield Text(f"  to {what}: {offered}", style="dim")
    yield from (_as_text("error", (f,)) for f in part.findings if f.severity == "error")
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for f in part.findings:
        if f.severity == "note":
            alike.setdefault((f.field, f.expected, f.remedy, re.sub(r"\d+", "", f.got)), []).append(f)
    yield from (_as_text("note", tuple(found)) for found in alike.values())


def _as_text(severity: str, found: tuple[Finding, ...]) -> Text:
    """One error, or notes that differ only in their place, as a line."""
    first = found[0]
    places = [": ".join(text for text in (f.file, f.record) if text) for f in found]
    if len({f.file for f in found}) == 1 and first.record:
        places = [f"{first.file}: {first.record}", *(f.record for f in found[1:])]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    got = first.got if len({f.got for f in found}) == 1 else f"{first.got}, ..."
    line = Text(f"  {severity:<6}", style="red" if severity == "error" else "yellow")
    line.append(f"{'this folder' if shown == '.' else shown}: ", style="default")
    line.append(f"{first.field}: " if first.field else "", style="default")
    line.append(f"expected {first.expected}, got {got}; ", style="default")
    return line.append(first.remedy, style="cyan" if severity == "error" else "dim")

"""Starts a new character: a folder in RoleScape-20's format from pictures, a profile and dialogue.

What follows from the user's own words without a model is written; what does not is named, with the
task that misses it. Nothing is invented about the character. The folder appears complete or not at
all: everything is written beside its place, read back by the same reader that training uses, and
then moved. An existing character is never touched.

What the user's files look like is said in ``user_files.py``. A profile's ``Key: value`` lines become questions
about facts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from unichar_jax.data import words
from unichar_jax.data.images import (
    OTHER_NAMES,
    READ_NAMES,
    ImageError,
    image_header,
    open_image,
    readable,
    remedy,
)
from unichar_jax.data.rl_prompts import WITH_QUESTIONS, read_rl_prompts
from unichar_jax.data.rolescape import read_character
from unichar_jax.data.tasks import TASKS, TEST_SETS, eval_items, samples
from unichar_jax.data.user_files import (
    Exchange,
    Profile,
    find_picture,
    read_captions,
    read_dialogues,
    read_profile,
)
from unichar_jax.errors import UserError
from unichar_jax.records import DataError, Finding, Findings, shown

DESCRIPTION_CHARS = 600
"""Longest description; it is part of every prompt, so it must stay short."""

NEEDS = {
    "pure_t2i": "pictures",
    "t2i": "exchanges with an Image: line",
    "t2i_with_thinking": "'thinking_process' and 'generation_instruction' in {name}_with_image.json",
    "t2i_generation_instruction_only": "'generation_instruction' in {name}_with_image.json",
    "vlm": "exchanges with an Image: line",
    "vlm_extension": "exchanges in the dialogue file (about 180 in RoleScape-20)",
    "vlm_thinking": "'thinking_process' and 'generation_instruction' in {name}_with_image.json",
    "knowledge_qa": "'Key: value' lines in the profile, or items in {name}_knowledge_qa.json",
    "vqa": "'qa_pairs' for each scene in {name}_with_image.json",
    "test dialogue": "exchanges to hold out, in {name}_dialogue_text_extension_test.json",
    "test memorization": "questions in {name}_memorization_test.json",
    "test personality": "questions in {name}_personality_test.json",
    "test knowledge_mcq": "items in {name}_knowledge_qa_test.json",
    "test image_mcq": "'mcq_items' for each scene in {name}_with_image.json",
    "test t2i": "pictures that training does not see, as a folder test/{name}",
}
"""What each task or test set is made of, for the list of what is missing."""

SITUATIONS = (
    ("reading a book", "on a park bench"),
    ("drinking tea", "in a cozy kitchen"),
    ("holding an umbrella", "on a rainy street"),
    ("riding a bicycle", "along a beach"),
    ("playing the piano", "on a stage"),
    ("watering flowers", "in a garden"),
    ("looking at the stars", "on a rooftop"),
    ("eating ice cream", "at a fair"),
    ("building a snowman", "in a snowy field"),
    ("taking a photograph", "on a mountain"),
    ("painting a picture", "in a bright studio"),
    ("waiting for a train", "on a platform"),
    ("sleeping", "in a hammock"),
    ("dancing", "under colorful lanterns"),
    ("carrying a basket of fruit", "through a market"),
    ("sitting by a campfire", "in a forest"),
)
"""What a new character is asked to be drawn doing, and where, in stage 2."""


@dataclasses.dataclass(frozen=True)
class NewCharacter:
    """What was written.

    Attributes:
      folder: the character's ``train`` folder.
      prompts: the file of drawing prompts for stage 2.
      counts: samples for each task that has some; test sets as ``test <name>``.
      missing: what the other tasks and test sets need, by the same names.
      placeholders: what stands in for something that only the user knows.
      unread: files of the pictures' folder that look like pictures but are of no format that is read.
      notes: what was put right, or is worth knowing.
    """

    folder: Path
    prompts: Path
    counts: dict[str, int]
    missing: dict[str, str]
    placeholders: tuple[str, ...]
    unread: tuple[str, ...] = ()
    notes: tuple[Finding, ...] = ()


def new_character(
    name: str,
    images_dir: Path,
    profile: Path | None = None,
    dialogues: Path | None = None,
    out: Path = Path("data"),
    user: str = words.USER,
) -> NewCharacter:
    """Writes ``<out>/personalized_data/train/<name>`` and ``<out>/personalized_t2i/<name>``.

    Raises:
      UserError: a faulty name, picture, profile or dialogue file, or the character exists. Nothing
        is left behind.
    """
    name = unicodedata.normalize("NFC", name)
    _check_name(name)
    folder = out / "personalized_data" / "train" / name
    prompts = out / "personalized_t2i" / name.replace(" ", "_")
    for place in (folder, prompts):
        if place.exists():
            raise UserError(f"{place} exists already; choose another name or remove it first.")
    found = Findings()
    opening, exchanges = read_dialogues(dialogues, name, user, found) if dialogues else ("", ())
    told = read_profile(profile, name, user, found) if profile else Profile()
    opening, exchanges = opening or told.opening, (*exchanges, *told.exchanges)
    exchanges, names = _shown(images_dir, exchanges)
    captions = read_captions(images_dir, names, name, user, found)
    captions = {image: captions.get(image) or f"A picture of {name}" for image in names}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as draft:
        draft_folder = Path(draft) / "train" / name
        draft_prompts = Path(draft) / "prompts" / prompts.name
        draft_folder.mkdir(parents=True)
        draft_prompts.mkdir(parents=True)
        _write_pictures(found, images_dir, names, draft_folder)
        placeholders = _write_texts(draft_folder, name, told.text, opening, exchanges, names, captions)
        _write_prompts(draft_prompts, name)
        read_rl_prompts(draft_prompts)
        counts, missing = _account(draft_folder, name)
        for source, target in ((draft_prompts, prompts), (draft_folder, folder)):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                source.rename(target)
            except OSError:
                shutil.rmtree(prompts, ignore_errors=True)
                raise
    file = prompts / f"{prompts.name}{WITH_QUESTIONS}"
    return NewCharacter(
        folder, file, counts, missing, placeholders, tuple(_listed(images_dir)[1]), found.notes
    )


def summary(new: NewCharacter) -> str:
    """What was written, what stands in, and what is missing for which task, as lines of text."""
    lines = [f"Wrote {new.folder}", f"Wrote {new.prompts}", "Ready:"]
    lines += [f"  {task}: {count}" for task, count in new.counts.items()]
    if new.unread:
        plugin = any(Path(name).suffix.lower() in (".heic", ".heif") for name in new.unread)
        mend = remedy("HEIC" if plugin else "").replace("it", "them", 1)
        lines.append(f"Left out: {', '.join(new.unread)}; {mend} and start again")
    lines += [f"  note: {note}" for note in new.notes]
    if new.placeholders:
        lines += ["Stand-ins to replace by your own words:"]
        lines += [f"  {placeholder}" for placeholder in new.placeholders]
    if new.missing:
        lines += ["Not yet possible, and what it needs:"]
        lines += [f"  {task}: {need}" for task, need in new.missing.items()]
    return "\n".join([*lines, f'Next: unichar data check "{new.folder}"'])


def _check_name(name: str) -> None:
    if reason := words.faulty_name(name):
        raise UserError(f"The name {shown(name)} cannot be a folder's; expected {reason}.")
    if words.same(name) in ("user", "image", "opening"):
        raise UserError(f"The name {shown(name)} has a meaning in dialogue files; choose another.")


# -- pictures ------------------------------------------------------------------------------------


def _shown(images_dir: Path, exchanges: Iterable[Exchange]) -> tuple[tuple[Exchange, ...], list[str]]:
    """The exchanges with their pictures as the files are called, and the pictures to copy: theirs first."""
    if not images_dir.is_dir():
        raise UserError(f"{images_dir}: no such folder of pictures; give it with --images DIR.")
    present, unread = _listed(images_dir)
    if not present:
        raise UserError(
            f"{images_dir}: no picture found; expected about ten files {', '.join(READ_NAMES)}."
            + (f" Not read: {', '.join(unread)}; {remedy('HEIC')}." if unread else "")
        )
    named = {e.image: find_picture(e.image, present) for e in exchanges if e.image}
    exchanges = tuple(dataclasses.replace(e, image=named.get(e.image) or e.image) for e in exchanges)
    told = [exchange.image for exchange in exchanges if exchange.image]
    for image in told:
        if image not in present:
            raise UserError(
                f"The dialogue names the picture {shown(image)}, which is not in {images_dir}; "
                f"expected one of {', '.join(present[:12])}."
            )
        if told.count(image) > 1:
            raise UserError(
                f"The dialogue shows {shown(image)} in more than one exchange; keep the Image: line "
                "in one of them."
            )
    return exchanges, told + [image for image in present if image not in told]


def _listed(images_dir: Path) -> tuple[list[str], list[str]]:
    """The names of the pictures in a folder, by number, and of those that cannot be read here."""
    names = sorted(
        (p.name for p in images_dir.iterdir() if p.name[0] != "."),
        key=lambda n: [int(x) if x.isdecimal() else x for x in re.split(r"([0-9]+)", n.lower())],
    )
    kinds = {name: Path(name).suffix.lower() for name in names}
    wanted = [name for name, kind in kinds.items() if kind in READ_NAMES]
    unread = [name for name in wanted if not readable(kinds[name])]
    unread += [name for name, kind in kinds.items() if kind in OTHER_NAMES]
    return [name for name in wanted if name not in unread], sorted(unread)


# -- writing -------------------------------------------------------------------------------------


def _write_pictures(found: Findings, images_dir: Path, names: list[str], folder: Path) -> None:
    """Writes ``0.png``, ``1.png``, ... upright and without metadata."""
    for number, image in enumerate(names):
        try:
            picture = open_image(image, images_dir, alpha=True)
            for told in image_header(image, images_dir).notes:
                found.note(image, "", "", *told)
        except ImageError as error:
            found.picture(image, images_dir, error)
            continue
        clean = Image.frombytes(picture.mode, picture.size, picture.tobytes())
        clean.save(folder / f"{number}.png")
    if found.failed:
        raise DataError(images_dir, found.all, "Replace or remove these pictures and try again.")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_texts(
    folder: Path,
    name: str,
    profile: str,
    opening: str,
    exchanges: Iterable[Exchange],
    names: list[str],
    captions: dict[str, str],
) -> tuple[str, ...]:
    """Writes the JSON and text files; returns what is only a stand-in."""
    placeholders = []
    description = describe(profile)
    if not description:
        description = f"{name} is the character in these pictures."
        placeholders.append("the description: give a --profile FILE")
    meta = {"description": description, "opening": opening}
    scenes, spoken = [], []
    for exchange in exchanges:
        said = {"role": "user", "text": exchange.user}
        replied = {"role": "machine", "text": exchange.reply}
        if exchange.image:
            replied["image"] = str(names.index(exchange.image))
            scenes.append([said, replied])
        else:
            spoken.append([said, replied])
    _write_json(folder / "annotation.json", meta | {"scenes": scenes})
    told = [
        {"image_id": str(number), "t2i_instruction": captions[image]} for number, image in enumerate(names)
    ]
    _write_json(folder / f"{name}_t2i_instruction.json", meta | {"t2i_instructions": told})
    plain = sum(caption == f"A picture of {name}" for caption in captions.values())
    if plain:
        placeholders.append(f"{plain} captions: write <picture>.txt beside each picture")
    if spoken or scenes:
        path = folder / f"{name}_dialogue_text_extension_train.json"
        _write_json(path, meta | {"scenes": spoken + scenes})
    if profile.strip():
        (folder / f"{name}_full_profile.txt").write_text(profile, encoding="utf-8")
        facts = _facts(profile, name)
        if facts:
            _write_json(folder / f"{name}_knowledge_qa.json", meta | {"qa_items": facts})
    return tuple(placeholders)


def describe(profile: str) -> str:
    """The profile's prose without markup, cut after the last sentence that fits a prompt."""
    plain = re.sub(r"^#+.*$", "", profile, flags=re.MULTILINE)
    plain = " ".join(re.sub(r"[*_`>]+|^\s*[-+]\s+", "", plain, flags=re.MULTILINE).split())
    if len(plain) <= DESCRIPTION_CHARS:
        return plain
    cut = plain[:DESCRIPTION_CHARS]
    ends = [match.end() for match in re.finditer(r"[.!?。！？](?=\s|$)", cut)]
    return cut[: ends[-1]] if ends else cut.rsplit(" ", 1)[0]


def _facts(profile: str, name: str) -> list[dict[str, Any]]:
    """Questions about the profile's ``Key: value`` lines."""
    facts: list[dict[str, Any]] = []
    for line in profile.splitlines():
        plain = re.sub(r"[*_`]+", "", line).strip().lstrip("-+ ")
        key, colon, value = re.match(r"([^:：]*)([:：]?)(.*)", plain).groups()  # type: ignore[union-attr]
        named = 1 < len(key) <= 41 and not key[0].isdecimal() and words.is_word(key[0])
        if not (colon and value.strip() and named and all(words.is_word(c) or c in " '-" for c in key)):
            continue
        facts.append(
            {
                "id": f"qa_{len(facts) + 1:03d}",
                "question": f"What is {name}'s {key.strip().lower()}?",
                "answer": value.strip(),
                "evidence": plain,
                "type": "fact",
                "difficulty": "easy",
                "reasoning_steps": [],
                "confidence": 1.0,
            }
        )
    return facts


def _write_prompts(folder: Path, name: str) -> None:
    """Everyday situations to draw the character in, each with three questions that score it."""

    def question(text: str, answer: str, category: str, weight: float) -> dict[str, Any]:
        return {
            "question": text,
            "type": "yes_no",
            "category": category,
            "answer": answer,
            "weight": weight,
            "is_negative": answer == "no",
        }

    lines = []
    for number, (activity, place) in enumerate(SITUATIONS):
        other = SITUATIONS[(number + 5) % len(SITUATIONS)][0]
        row = {
            "text": f"A picture of {name} {activity} {place}",
            "character": name,
            "scene_id": str(number),
            "vqa_questions": [
                question(f"Is {name} {activity}?", "yes", "action", 1.0),
                question(f"Is {name} {place}?", "yes", "scene", 1.0),
                question(f"Is {name} {other}?", "no", "action", 0.5),
            ],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    path = folder / f"{folder.name}{WITH_QUESTIONS}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _account(folder: Path, name: str) -> tuple[dict[str, int], dict[str, str]]:
    """Reads the draft back; numbers of samples, and what the empty tasks need."""
    character = read_character(folder)
    counts = {task: len(samples(character, task)) for task in TASKS}
    counts |= {f"test {name}": len(eval_items(character, name)) for name in TEST_SETS}
    missing = {task: NEEDS[task].format(name=name) for task, count in counts.items() if not count}
    return {task: count for task, count in counts.items() if count}, missing

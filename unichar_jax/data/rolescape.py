"""The RoleScape-20 format: the one reader for a character's folder on disk.

A character lives in ``<root>/train/<DIR>`` and ``<root>/test/<DIR>``; files inside are named after
its short name, which is ``DIR`` without a series prefix (``Friends-Joey`` -> ``Joey``). The raw JSON
files are the single source: the published ``processed/`` rows are derived from them (``tasks.py``),
never read. Any file may be absent except the description and either a scene or a picture, so the
same reader serves the published characters and one that a user has just started.

Irregularities of the published data are put right and kept as notes; real faults are collected and
raised together. Nothing outside of the folder is read, and no pixel is decoded here.

Source: UniCharacter (arXiv 2605.08129), dataset RoleScape-20.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from unichar_jax.data import files, words
from unichar_jax.data.character import (
    Caption,
    Character,
    ChoiceQuestion,
    Dialogue,
    ImageFile,
    KnowledgeQuestion,
    Scene,
    Split,
    VisualQuestion,
)
from unichar_jax.data.images import OTHER_NAMES, READ_NAMES, ImageError, image_header
from unichar_jax.errors import UserError
from unichar_jax.records import DataError, Finding, Findings, Record, shown

SERIES = ("Friends-", "Genshin-", "Harry Potter-", "Mahjong Soul-", "Pokemon-")
"""Prefixes of folder names that are not part of a character's name."""

_CHECK = "Run `unichar data check` on the folder for the full list."


def short_name(folder: Path) -> str:
    """The character's name: the folder's, without a series prefix unless its files carry it."""
    full = folder.name
    for series in SERIES:
        if full.startswith(series) and full != series:
            whole = any(p.name.startswith(f"{full}_") for p in _listing(folder))
            return full if whole else full.removeprefix(series)
    return full


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda p: (len(p.name), p.name)) if folder.is_dir() else []


def find_characters(root: Path, split: Split | None = None) -> tuple[Path, ...]:
    """Character folders under ``root`` (which holds ``train/`` and ``test/``), train first, sorted.

    ``root`` may also be the folder that holds ``personalized_data``.

    Raises:
      UserError: there is no such folder, or no character in it.
    """
    base = root / "personalized_data" if (root / "personalized_data").is_dir() else root
    found = [
        folder
        for part in ("train", "test")
        if split in (None, part) and (base / part).is_dir()
        for folder in sorted((base / part).iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not found:
        raise UserError(
            f"{root}: no character found; expected folders {split or 'train'}/<NAME>/. "
            "Give the folder that holds train/ and test/, or start one: "
            "unichar data new NAME --images DIR."
        )
    return tuple(found)


def read_character(folder: Path) -> Character:
    """Reads one character from ``<root>/train/<DIR>`` or ``<root>/test/<DIR>``.

    Raises:
      DataError: all faults of the folder together.
    """
    character, findings = scan_character(folder)
    if character is None:
        raise DataError(folder, findings, _CHECK)
    return character


def scan_character(folder: Path) -> tuple[Character | None, tuple[Finding, ...]]:
    """As :func:`read_character`, but returns the findings; no character if one is an error."""
    found = Findings()
    if not folder.is_dir():
        found.error(folder.name, "", "", "a character's folder", "no such folder", "correct the path")
        return None, found.all
    character = _Folder(Path(folder).absolute(), found).read()
    return (None if found.failed else character), found.all


_META = ("description", "opening")
_TURN = ("role", "text", "image")
_SCENE_TURN = (*_TURN, "thinking_process", "generation_instruction", "qa_pairs", "mcq_items")
_NOMINAL = {"qa_pairs": 20, "mcq_items": 5, "qa_items": 100, "test_questions": 20}


class _Folder:
    """Reads the files of one folder into one found."""

    def __init__(self, folder: Path, found: Findings) -> None:
        self.folder, self.found = folder, found
        self.name = unicodedata.normalize("NFC", short_name(folder))
        self.files = {words.same(p.name): p.name for p in _listing(folder)}
        found.gate = functools.partial(words.gate, name=self.name)
        self.images: dict[str, ImageFile] = {}
        self.meta: dict[str, tuple[str, str]] = {}  # field -> (value, file that said so first)
        self.known: set[str] = set()

    def read(self) -> Character:
        self._read_images()
        plain = self._json("annotation.json", "scenes")
        rich = self._json(f"{self.name}_with_image.json", "scenes")
        plain_scenes = self._scenes(plain)
        scenes = self._scenes(rich) if rich else plain_scenes
        if plain and rich:
            self._compare(plain, plain_scenes, scenes)
        character = Character(
            name=self.name,
            dir_name=self.folder.name,
            split="test" if self.folder.parent.name == "test" else "train",
            folder=self.folder,
            captions=self._captions(),
            extension_train=self._dialogues("dialogue_text_extension_train"),
            extension_test=self._dialogues("dialogue_text_extension_test"),
            knowledge_qa=self._knowledge(),
            knowledge_mcq=self._choices(
                self._json(f"{self.name}_knowledge_qa_test.json", "mcq_items"), evidence=True
            ),
            memorization=self._questions("memorization_test"),
            personality=self._questions("personality_test"),
            full_profile=self._text("full_profile"),
            simplified_profile=self._text("personality_simplified_profile"),
            attributes=self._attributes(),
            description=self.meta.get("description", ("", ""))[0],
            opening=self.meta.get("opening", ("", ""))[0],
            images=tuple(self.images.values()),
            scenes=scenes,
            notes=(),
        )
        self._overall(character)
        return dataclasses.replace(character, notes=self.found.notes)

    def _json(self, name: str, *keys: str) -> Record | None:
        """One of the folder's JSON objects; its description and opening must be everybody's."""
        name = self._file(name)
        self.known.add(name)
        record = files.read_json(self.found, self.folder, name)
        if record is None:
            return None
        record.expect(*_META, *keys)
        for field in _META:
            if field not in record.data:
                continue
            value = record.text(field, required=field == "description")
            first, origin = self.meta.setdefault(field, (value, name))
            if value != first:
                record.error(field, f"the same as in {origin}", shown(value), "use one text in all files")
        return record

    def _text(self, kind: str) -> str:
        name = self._file(f"{self.name}_{kind}.txt")
        text, remarks = words.gate(files.read_text(self.found, self.folder, name) or "", self.name)
        for severity, *told in remarks:
            (self.found.error if severity == "error" else self.found.note)(name, "", "", *told)
        return text

    def _file(self, name: str) -> str:
        """The name that a file has here: names are one in any form of their letters."""
        return self.files.get(words.same(name), name) if not (self.folder / name).exists() else name

    def _read_images(self) -> None:
        for path in _listing(self.folder):
            if path.suffix == ".png" and not path.name.startswith("."):
                image = self._image(path.name)
                if image:
                    self.images[image.id] = image
            elif path.suffix.lower() in (*READ_NAMES, *OTHER_NAMES):
                self.found.note(
                    path.name,
                    "",
                    "",
                    "pictures named <id>.png",
                    f"'{path.suffix}'",
                    "it is ignored; rename it to <id>.png to use it",
                )
        ids = [image_id for image_id in self.images if image_id.isdigit()]
        missing = [str(i) for i in range(len(ids)) if str(i) not in self.images]
        if missing:
            self.found.note(
                ".",
                "",
                "",
                "pictures numbered from 0 without gaps",
                f"no {', '.join(missing[:5])}.png",
                "nothing to do",
            )

    def _image(self, name: str) -> ImageFile | None:
        try:
            header = image_header(name, self.folder)
        except ImageError as error:
            self.found.picture(name, self.folder, error)
            return None
        if header.format != "PNG":
            self.found.note(name, "", "", "PNG content", header.format, "read as what it is; nothing to do")
        for told in header.notes:
            self.found.note(name, "", "", *told)
        kind, mode, width, height = header.format, header.mode, header.width, header.height
        return ImageFile(name.removesuffix(".png"), self.folder / name, width, height, kind, mode)

    def _image_of(self, record: Record, field: str, seen: set[str]) -> ImageFile | None:
        """The picture that a record names; each may be named once in a list."""
        image_id = record.text(field)
        if not image_id.strip():
            return None
        image_id = self._known_image(image_id)
        if not (words.is_word(image_id[0]) and all(words.is_word(c) or c in " .-" for c in image_id)):
            record.error(
                field,
                "a picture's id such as '0'",
                shown(image_id),
                "copy the picture into this folder as <id>.png and give its id",
            )
        elif image_id in seen:
            record.error(field, "each picture once", f"{shown(image_id)} again", "drop one record")
        elif image_id not in self.images:
            record.error(
                field,
                f"a picture {image_id}.png in this folder",
                "none that can be read",
                "add the picture or drop the record",
            )
        else:
            seen.add(image_id)
            return self.images[image_id]
        return None

    def _known_image(self, image_id: str) -> str:
        """The id as the file spells it: in any case, and any form of its letters, if that is one picture's."""
        alike = [known for known in self.images if words.same(known) == words.same(image_id)]
        return alike[0] if image_id not in self.images and len(alike) == 1 else image_id

    def _scenes(self, record: Record | None) -> tuple[Scene, ...]:
        scenes: list[Scene] = []
        seen: set[str] = set()
        for pair in record.turns("scenes", required=True) if record else ():
            if pair is None:
                continue
            user, machine = pair[0].expect(*_TURN), pair[1].expect(*_SCENE_TURN)
            image = self._image_of(machine, "image", seen)
            scene = (
                user.text("text"),
                machine.text("text"),
                machine.text("thinking_process", required=False),
                machine.text("generation_instruction", required=False),
                tuple(
                    VisualQuestion(q.text("question"), q.text("answer"), q.text("type"))
                    for q in machine.records("qa_pairs")
                    if q.expect("question", "answer", "type").ok
                ),
                self._choices(machine, evidence=False),
            )
            self._nominal(machine, "qa_pairs")
            if image:
                said, reply, thinking, instruction, questions, choices = scene
                scenes.append(Scene(said, reply, image, thinking, instruction, questions, choices))
        return tuple(scenes)

    def _compare(self, plain: Record, scenes: tuple[Scene, ...], rich: tuple[Scene, ...]) -> None:
        """Two files tell the scenes; a contradiction is worth knowing."""

        def essence(scene: Scene) -> tuple[str, str, str]:
            return scene.user, scene.reply, scene.image.id

        if list(map(essence, scenes)) != list(map(essence, rich)) and not self.found.failed:
            plain.note(
                "scenes",
                f"the dialogues of {self.name}_with_image.json",
                "others",
                "those of the other file are used; make both tell the same scenes",
            )

    def _captions(self) -> tuple[Caption, ...]:
        record = self._json(f"{self.name}_t2i_instruction.json", "t2i_instructions")
        captions = []
        seen: set[str] = set()
        for item in record.records("t2i_instructions", required=True) if record else ():
            item.expect("image_id", "t2i_instruction")
            image, text = self._image_of(item, "image_id", seen), item.text("t2i_instruction")
            if image:
                captions.append(Caption(text, image))
        return tuple(captions)

    def _dialogues(self, kind: str) -> tuple[Dialogue, ...]:
        record = self._json(f"{self.name}_{kind}.json", "scenes")
        if record is None:
            return ()
        pairs = [pair for pair in record.turns("scenes", required=True) if pair]
        stray = sum("image" in turn.data for _, turn in pairs)
        if stray:
            record.note(
                "scenes",
                "dialogues without pictures",
                f"{stray} with an 'image' id",
                "the ids are ignored",
            )
        return tuple(
            Dialogue(user.expect(*_TURN).text("text"), reply.expect(*_TURN).text("text"))
            for user, reply in pairs
        )

    def _knowledge(self) -> tuple[KnowledgeQuestion, ...]:
        record = self._json(f"{self.name}_knowledge_qa.json", "qa_items")
        items = record.records("qa_items", required=True) if record else []
        keys = tuple(field.name for field in dataclasses.fields(KnowledgeQuestion))
        questions = tuple(
            KnowledgeQuestion(
                item.text("id"),
                item.text("question"),
                item.text("answer"),
                item.text("evidence", required=False),
                item.text("type", required=False),
                item.text("difficulty", required=False),
                item.texts("reasoning_steps", blank=True),
                item.number("confidence", 1.0, 0.0, 100.0),
            )
            for item in items
            if item.expect(*keys).ok
        )
        if record:
            _unique(record, "qa_items", [q.id for q in questions])
            self._nominal(record, "qa_items")
        return questions

    def _choices(self, record: Record | None, *, evidence: bool) -> tuple[ChoiceQuestion, ...]:
        keys = ["id", "question", "options", "answer_key", "difficulty", "rationale"]
        questions = []
        for item in record.records("mcq_items", required=evidence) if record else ():
            if not item.expect(*keys, *(["evidence"] if evidence else [])).ok:
                continue
            options = Record(item.found, item.file, f"{item.place}.options", item.data.get("options"))
            texts = {key: options.text(key) for key in options.data}
            answer = item.text("answer_key")
            if options.ok and len(texts) < 2:
                item.error("options", "at least two options", str(len(texts)), "add options")
            elif options.ok and answer not in texts:
                item.error(
                    "answer_key",
                    f"one of {', '.join(map(shown, texts))}",
                    shown(answer),
                    "correct it",
                )
            questions.append(
                ChoiceQuestion(
                    item.text("id"),
                    item.text("question"),
                    texts,
                    answer,
                    item.text("difficulty", required=False),
                    item.text("rationale", required=False),
                    item.text("evidence", required=False),
                )
            )
        if record:
            _unique(record, "mcq_items", [q.id for q in questions])
            self._nominal(record, "mcq_items", 10 if evidence else 5)
        return tuple(questions)

    def _questions(self, kind: str) -> tuple[str, ...]:
        record = self._json(f"{self.name}_{kind}.json", "test_questions")
        if record is None:
            return ()
        asked = record.texts("test_questions", required=True)
        bare = tuple(_unquoted(text) for text in asked)
        if bare != asked:
            wrapped = sum(a != b for a, b in zip(asked, bare, strict=True))
            record.note(
                "test_questions",
                "questions without quotation marks",
                f"{wrapped} wrapped in them",
                "the marks are dropped",
            )
        self._nominal(record, "test_questions")
        return bare

    def _attributes(self) -> dict[str, Any]:
        name = self._file(f"{self.name}_attributes.json")
        self.known.add(name)
        record = files.read_json(self.found, self.folder, name)
        return record.data if record else {}

    def _nominal(self, record: Record, field: str, nominal: int | None = None) -> None:
        nominal = _NOMINAL[field] if nominal is None else nominal
        count = len(value) if isinstance(value := record.data.get(field), list) else 0
        if count not in (0, nominal):
            record.note(field, f"{nominal} as in RoleScape-20", str(count), "nothing to do")

    def _overall(self, character: Character) -> None:
        """What only the whole folder shows."""
        if " " in self.folder.name:
            self.found.note(
                ".", "", "", "a name without spaces", shown(self.folder.name), "quote it in a shell"
            )
        found, main = self.found, "annotation.json"
        if not (character.images or character.extension_train) and not found.failed:
            found.error(
                ".",
                "",
                "",
                "pictures <id>.png or dialogues",
                "an empty character",
                "start it with: unichar data new NAME --images DIR",
            )
        if not character.description and not found.failed:
            found.error(main, "", "description", "a description of the character", "none", "write it")
        used = {s.image.id for s in character.scenes} | {c.image.id for c in character.captions}
        for field in ("thinking", "generation_instruction", "qa_pairs", "mcq_items"):
            lacking = [scene.image.id for scene in character.scenes if not getattr(scene, field)]
            if 0 < len(lacking) < len(character.scenes):
                name = "thinking_process" if field == "thinking" else field
                got = f"none for {', '.join(f'{i}.png' for i in lacking)}"
                remedy = "what needs it leaves these scenes out; annotate them"
                found.note(f"{self.name}_with_image.json", "", name, "one in every scene", got, remedy)
        unused = [image_id for image_id in self.images if image_id not in used]
        if unused and not found.failed:
            found.note(
                ".",
                "",
                "",
                "every picture in a scene or a caption",
                f"unused {', '.join(f'{i}.png' for i in unused[:5])}",
                "caption it to train on it",
            )
        for path in _listing(self.folder):
            if path.name == ".DS_Store":
                found.note(path.name, "", "", "no such file", "one", "it is ignored; delete it")
            elif path.suffix == ".json" and path.name not in self.known:
                found.note(
                    path.name,
                    "",
                    "",
                    f"files named {self.name}_<kind>.json",
                    "another name",
                    "it is ignored; rename it if it belongs here",
                )


def _unique(record: Record, field: str, ids: list[str]) -> None:
    for name, count in Counter(ids).items():
        if name and count > 1:
            record.error(f"{field}.id", "each id once", f"{shown(name)} {count} times", "renumber")


def _unquoted(text: str) -> str:
    bare = text.strip()
    wrapped = len(bare) > 2 and bare[0] == bare[-1] == '"' and '"' not in bare[1:-1]
    return bare[1:-1] if wrapped else text

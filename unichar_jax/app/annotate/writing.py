"""From items to folders: RoleScape-20's layout, written as a whole or not at all.

What the user wrote comes first and stays as it is; accepted items fill what is missing. Decisions of the
review drop items or replace their values. Written folders are read back by the reader that training uses
before they take their place, and are never put over something that was not written here or was changed since.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unichar_jax.app.annotate.annotation import (
    Annotation,
    balanced_letters,
    captions_of,
    shuffled,
    stand_in_caption,
)
from unichar_jax.app.annotate.asking import Item
from unichar_jax.app.annotate.kinds import KINDS, Facts, Reject, Value
from unichar_jax.data.character import Character, ChoiceQuestion, ImageFile, Scene
from unichar_jax.data.rl_prompts import WITH_QUESTIONS, WITHOUT_QUESTIONS, read_rl_prompts
from unichar_jax.data.rolescape import read_character
from unichar_jax.errors import UserError
from unichar_jax.files import digest

WRITTEN = "written.json"


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What a person decided about items, by their ids."""

    drop: frozenset[str] = frozenset()
    edit: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Decisions:
        """The file that the review page saves.

        Raises:
          UserError: it is not such a file.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            drop, edit = record["drop"], record["edit"]
            if not all(isinstance(x, str) for x in drop) or not all(
                isinstance(x, dict) for x in edit.values()
            ):
                raise TypeError("drop: expected ids; edit: expected values by id")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; save it from the review page.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not decisions of a review ({type(error).__name__}: {error}).") from None
        return cls(frozenset(drop), edit)


def decide(found: Annotation, decisions: Decisions) -> Annotation:
    """The annotation without what was dropped, and with what was edited.

    Raises:
      UserError: an edited item is not valid; all of them together.
    """
    faults: list[str] = []
    collected = {}
    for key, got in found.collected.items():
        items = [
            _decided(item, decisions, found.facts, faults)
            for item in got.items
            if item.id not in decisions.drop
        ]
        collected[key] = dataclasses.replace(got, items=items)
    if faults:
        raise UserError("The review has items that are not valid:\n" + "\n".join(faults))
    return dataclasses.replace(found, collected=collected)


def _decided(item: Item, decisions: Decisions, facts: Facts, faults: list[str]) -> Item:
    if item.id not in decisions.edit:
        return item
    try:
        value = KINDS[item.kind].check(item.value | decisions.edit[item.id], facts)
    except Reject as error:
        faults.append(f"  {item.id}: {error}")
        return item
    return dataclasses.replace(item, value=value)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the parts of a character go under a root."""

    train: Path
    test: Path
    prompts: Path
    work: Path

    @classmethod
    def of(cls, root: Path, character: Character) -> Places:
        """For the character's folder name and short name."""
        data = root / "personalized_data"
        return cls(
            data / "train" / character.dir_name,
            data / "test" / character.dir_name,
            root / "personalized_t2i" / character.name.replace(" ", "_"),
            root / "annotation" / character.dir_name,
        )


def check_free(places: Places) -> None:
    """Only what was written here and is still as it was may be replaced.

    Raises:
      UserError: something else is there.
    """
    try:
        written = json.loads((places.work / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = {}
    for name in ("train", "test", "prompts"):
        place = getattr(places, name)
        if place.exists() and written.get(name) != _digest(place):
            raise UserError(
                f"{place}: it was not written by this command, or was changed since. Name another place with"
                " --out, or move it away; changes belong into the review page, which keeps them."
            )


def write(found: Annotation, places: Places) -> None:
    """Writes the folders."""
    check_free(places)
    places.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=places.work) as temporary:
        draft = {
            name: Path(temporary) / name / getattr(places, name).name for name in ("train", "test", "prompts")
        }
        writer = _Writer(found)
        train = [i for i in found.character.images if i not in found.held_out]
        writer.split(draft["train"], train, "train")
        writer.texts(draft["train"])
        if found.held_out:
            writer.split(draft["test"], found.held_out, "test")
        writer.prompts(draft["prompts"], train)
        for name, folder in draft.items():
            if folder.is_dir() and name != "prompts":
                read_character(folder)
        if draft["prompts"].is_dir():
            read_rl_prompts(draft["prompts"])
        for name, folder in draft.items():
            place = getattr(places, name)
            if place.exists():
                shutil.rmtree(place)
            if folder.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(place)
    record = {n: _digest(p) for n in ("train", "test", "prompts") if (p := getattr(places, n)).exists()}
    (places.work / WRITTEN).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _digest(folder: Path) -> str:
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    told = (f"{p.relative_to(folder)}\0".encode() + bytes.fromhex(digest(p.read_bytes())) for p in inside)
    return digest(*told)


class _Writer:
    def __init__(self, found: Annotation):
        self.found, self.who = found, found.character
        self.meta = {"description": found.description, "opening": self.who.opening}
        self.captions = captions_of(found)
        self.base: list[list[Value]] = []

    def _json(self, folder: Path, kind: str, content: Value) -> None:
        name = kind if kind == "annotation" else f"{self.who.name}_{kind}"
        text = json.dumps(self.meta | content, ensure_ascii=False, indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")

    # -- pictures -------------------------------------------------------------------------------------------

    def split(self, folder: Path, images: Sequence[ImageFile], split: str) -> None:
        """Pictures, numbered anew, and what belongs to them."""
        folder.mkdir(parents=True)
        rich: list[list[Value]] = []
        captions = []
        scenes = {s.image.id: s for s in self.who.scenes}
        letters = iter(self._letters(images))
        for number, image in enumerate(images):
            shutil.copyfile(image.path, folder / f"{number}.png")
            caption = self.captions[image.id] or stand_in_caption(self.who.name)
            captions.append({"image_id": str(number), "t2i_instruction": caption})
            turns = self._scene(image, scenes.get(image.id), str(number), letters, split)
            if turns:
                rich.append(turns)
        plain = [[user, {k: machine[k] for k in ("role", "text", "image")}] for user, machine in rich]
        self._json(folder, "annotation", {"scenes": plain})
        self._json(folder, "with_image", {"scenes": rich})
        self._json(folder, "t2i_instruction", {"t2i_instructions": captions})
        (folder / f"{self.who.name}_full_profile.txt").write_text(self.who.full_profile, encoding="utf-8")
        if split == "train":
            self.base = plain

    def _letters(self, images: Sequence[ImageFile]) -> list[str]:
        return balanced_letters(
            sum(len(self.found.items("image_mcq", i.id)) for i in images), f"{self.who.name} images"
        )

    def _scene(
        self, image: ImageFile, scene: Scene | None, number: str, letters: Any, split: str
    ) -> list[Value] | None:
        said = self.found.first("exchange", image.id)
        if scene is None and said is None:
            return None
        spoken = {"user": scene.user, "reply": scene.reply} if scene else said
        assert spoken is not None
        machine: Value = {"role": "machine", "text": spoken["reply"], "image": number}
        plan = self.found.first("plan", image.id) or {
            "thinking": scene.thinking if scene else "",
            "instruction": scene.generation_instruction if scene else "",
        }
        if plan["thinking"] and plan["instruction"]:
            machine |= {"thinking_process": plan["thinking"], "generation_instruction": plan["instruction"]}
        if split == "train":
            pairs = [dataclasses.asdict(q) for q in scene.qa_pairs] if scene else []
            machine["qa_pairs"] = pairs + [i.value for i in self.found.items("vqa", image.id)]
        items = [_given_choice(q) for q in scene.mcq_items] if scene else []
        for item in self.found.items("image_mcq", image.id):
            items.append(_choice(item, f"q{len(items) + 1}", next(letters)))
        machine["mcq_items"] = items
        return [{"role": "user", "text": spoken["user"]}, machine]

    # -- texts ----------------------------------------------------------------------------------------------

    def texts(self, folder: Path) -> None:
        """Dialogues, knowledge and the test sets."""
        who, found = self.who, self.found
        base = {(user["text"], machine["text"]) for user, machine in self.base}
        own = [(d.user, d.reply) for d in who.extension_train if (d.user, d.reply) not in base]
        # What is said in held-out scenes is not for training.
        held = {(s.user, s.reply) for s in who.scenes if s.image in found.held_out}
        made = [(i.value["user"], i.value["reply"]) for i in found.items("dialogue")]
        spoken = [_turns(*pair) for pair in dict.fromkeys(p for p in (*own, *made) if p not in held)]
        bare = [[user, {k: machine[k] for k in ("role", "text")}] for user, machine in self.base]
        self._list(folder, "dialogue_text_extension_train", "scenes", spoken + bare)
        test = [(d.user, d.reply) for d in who.extension_test]
        test += [(i.value["user"], i.value["reply"]) for i in found.items("dialogue_test")]
        self._list(folder, "dialogue_text_extension_test", "scenes", [_turns(*pair) for pair in test])

        facts = [dataclasses.asdict(q) for q in who.knowledge_qa] + [
            i.value for i in found.items("knowledge")
        ]
        numbered = [fact | {"id": f"qa_{n:03d}"} for n, fact in enumerate(facts, 1)]
        self._list(folder, "knowledge_qa", "qa_items", numbered)
        choices = [_given_choice(q) | {"evidence": q.evidence} for q in who.knowledge_mcq]
        items = found.items("knowledge_mcq")
        for item, letter in zip(items, balanced_letters(len(items), f"{who.name} knowledge"), strict=True):
            choice = _choice(item, f"mcq_{len(choices) + 1:03d}", letter)
            choices.append(choice | {"difficulty": item.part, "evidence": item.value["evidence"]})
        self._list(folder, "knowledge_qa_test", "mcq_items", choices)

        for kind, given in (("memorization", who.memorization), ("personality", who.personality)):
            asked = [*given, *(i.value["question"] for i in found.items(kind))]
            self._list(folder, f"{kind}_test", "test_questions", asked)
        manner = found.first("manner")
        text = f"{manner['profile']}\n" if manner else who.simplified_profile
        if text.strip():
            path = folder / f"{who.name}_personality_simplified_profile.txt"
            path.write_text(text, encoding="utf-8")

    def _list(self, folder: Path, kind: str, key: str, values: list[Any]) -> None:
        if values:
            self._json(folder, kind, {key: values})

    # -- prompts --------------------------------------------------------------------------------------------

    def prompts(self, folder: Path, images: Sequence[ImageFile]) -> None:
        """Drawing prompts with and without their questions, and the pictures they refer to."""
        items = self.found.items("rl_prompts")
        if not items:
            return
        folder.mkdir(parents=True)
        rows = [
            {
                "text": item.value["text"],
                "character": self.who.name,
                "scene_id": str(number),
                "reference_images_path": f"dataset/personalized_t2i/{folder.name}",
            }
            for number, item in enumerate(items)
        ]
        asked = [row | {"vqa_questions": i.value["questions"]} for row, i in zip(rows, items, strict=True)]
        for suffix, lines in ((WITHOUT_QUESTIONS, rows), (WITH_QUESTIONS, asked)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{folder.name}{suffix}").write_text(text, encoding="utf-8")
        profile = folder / f"{folder.name}_full_profile.txt"
        profile.write_text(self.who.full_profile, encoding="utf-8")
        for number, image in enumerate(images):
            shutil.copyfile(image.path, folder / f"{number}.png")


def _turns(user: str, reply: str) -> list[Value]:
    return [{"role": "user", "text": user}, {"role": "machine", "text": reply}]


def _given_choice(question: ChoiceQuestion) -> Value:
    value = dataclasses.asdict(question)
    value.pop("evidence")
    return value


def _choice(item: Item, name: str, letter: str) -> Value:
    """The item with its answers under letters, the right one under ``letter``."""
    value = item.value
    wrong = iter(shuffled(value["wrong"], item.id))
    options = {x: value["answer"] if x == letter else next(wrong) for x in "ABCD"}
    return {
        "id": name,
        "question": value["question"],
        "options": options,
        "answer_key": letter,
        "difficulty": value.get("difficulty", "easy"),
        "rationale": value["rationale"],
    }

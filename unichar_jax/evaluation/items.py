"""From characters to the items of every evaluation task: what is asked, and what is known of the answer.

The questions are RoleScape-20's test sets as ``data.tasks`` reads them, and what a character's ``test``
folder adds: pictures, dialogues and questions that no training saw. Prompts name the character as training
did. For a model without training they can carry the description instead (``context``): the full profile
takes the place of the short one, and an accurate caption that of the plain one, where the folder has such.

Items hold paths and texts; nothing is opened or asked here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unichar_jax.data import rolescape, templates
from unichar_jax.data.character import Character, Scene
from unichar_jax.data.tasks import EvalItem, eval_items
from unichar_jax.errors import UserError, did_you_mean, require_known
from unichar_jax.evaluation.subject import Prompt

Context = Literal["name", "profile", "profile+picture"]
CONTEXTS = ("name", "profile", "profile+picture")


@dataclass(frozen=True)
class Case:
    """One character to evaluate: its training folder, and its test folder if it has one."""

    train: Character
    test: Character | None = None

    @property
    def name(self) -> str:
        return self.train.name


@dataclass(frozen=True)
class Item:
    """One question of one task.

    Attributes:
      task: one of ``TASKS``.
      key: unique over all characters and splits.
      character: short name.
      prompt: what the model is asked (for a choice: without its options).
      question: the bare question, user line or caption inside the prompt.
      reference: the published answer or reply; for a choice the letter; empty where there is none.
      options: letters and texts of a choice.
      picture: the real picture of a drawing task, to compare with.
      described_by: the description in the prompts; a drawing of the model's own reply needs it.
    """

    task: str
    key: str
    character: str
    prompt: Prompt
    question: str
    reference: str = ""
    options: tuple[tuple[str, str], ...] = ()
    picture: Path | None = None
    described_by: str = ""


def read_cases(root: Path, names: Sequence[str] = ()) -> list[Case]:
    """The characters below ``root`` (which holds ``train/`` and ``test/``), all of them or those named.

    Args:
      root: the data folder.
      names: short names or folder names; empty for all.
    """
    folders = {f.name: f for f in rolescape.find_characters(root, "train")}
    by_short = {rolescape.short_name(f): f for f in folders.values()}
    for name in names:
        if name not in folders and name not in by_short:
            known = sorted(by_short)
            raise UserError(
                f"{root}: no character '{name}'{did_you_mean(name, known)}; expected one of"
                f" {', '.join(known)}."
            )
    chosen = [folders.get(n) or by_short[n] for n in names] or list(folders.values())
    return [read_case(folder) for folder in dict.fromkeys(chosen)]


def read_case(folder: Path) -> Case:
    """One character from its training folder ``<root>/train/<NAME>``."""
    test = folder.parent.parent / "test" / folder.name
    held_out = rolescape.read_character(test) if test.is_dir() else None
    return Case(rolescape.read_character(folder), held_out)


def items(case: Case, task: str, context: Context = "name") -> list[Item]:
    """The items of a task; empty if the character's folders have none.

    Raises:
      UserError: no such task or context.
    """
    for name, known, what in ((task, TASKS, "task"), (context, CONTEXTS, "context")):
        require_known(what, name, known)
    found = list(_SOURCES[task](_described(case, context)))
    if context == "profile+picture" and case.train.images:
        shown = case.train.images[0].path
        # A question about a picture keeps its own.
        found = [
            i if i.prompt.image else dataclasses.replace(i, prompt=Prompt(i.prompt.text, shown))
            for i in found
        ]
    return found


# -- how prompts tell of the character ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """A case, its characters with the description that prompts are to use."""

    train: Character
    test: Character | None
    by_name: bool

    def about(self, text: str) -> str:
        """A prompt that has no place for a description."""
        return text if self.by_name else f"{self.train.description}\n\n{text}"


def _described(case: Case, context: Context) -> _Described:
    if context == "name":
        return _Described(case.train, case.test, True)
    train, test = case.train, case.test
    told = str(train.attributes.get("full_description") or train.full_profile or train.description).strip()
    describe: Callable[[Character], Character] = lambda c: dataclasses.replace(c, description=told)  # noqa: E731
    return _Described(describe(train), None if test is None else describe(test), False)


# -- tasks --------------------------------------------------------------------------------------------------


def _published(task: str, test_set: str) -> Callable[[_Described], Iterator[Item]]:
    """A test set whose prompts have the description in them."""

    def source(told: _Described) -> Iterator[Item]:
        for character in (told.train, told.test):
            for item in eval_items(character, test_set) if character else ():
                yield _item(task, item, Prompt(item.prompt))

    return source


def _choices(task: str, test_set: str, split: str) -> Callable[[_Described], Iterator[Item]]:
    def source(told: _Described) -> Iterator[Item]:
        character: Character | None = getattr(told, split)
        for item in eval_items(character, test_set) if character else ():
            shown = item.image.path if item.image else None
            yield _item(task, item, Prompt(told.about(item.question), shown))

    return source


def _visual_questions(told: _Described) -> Iterator[Item]:
    """Free questions about pictures that training never saw."""
    if told.test is None:
        return
    for scene in told.test.scenes:
        for number, pair in enumerate(scene.qa_pairs):
            yield Item(
                "vqa",
                f"test/{told.test.dir_name}/vqa/{scene.image.id}_{number}",
                told.test.name,
                Prompt(told.about(pair.question), scene.image.path),
                pair.question,
                pair.answer,
            )


def _captions(told: _Described) -> Iterator[Item]:
    if told.test is None:
        return
    truth: dict[str, Any] = told.test.attributes.get("images", {})
    for caption in told.test.captions:
        full = truth.get(caption.image.id, {}).get("full_caption")
        text = caption.text if told.by_name else full or told.about(caption.text)
        yield Item(
            "t2i",
            f"test/{told.test.dir_name}/t2i/{caption.image.id}",
            told.test.name,
            Prompt(text),
            caption.text,
            picture=caption.image.path,
        )


def _scenes(task: str, prompt: Callable[[Character, Scene], str]) -> Callable[[_Described], Iterator[Item]]:
    def source(told: _Described) -> Iterator[Item]:
        for scene in told.test.scenes if told.test else ():
            assert told.test is not None
            yield Item(
                task,
                f"test/{told.test.dir_name}/{task}/{scene.image.id}",
                told.test.name,
                Prompt(prompt(told.test, scene)),
                scene.user,
                scene.reply,
                picture=scene.image.path,
                described_by=told.test.description,
            )

    return source


def _item(task: str, item: EvalItem, prompt: Prompt) -> Item:
    return Item(task, item.key, item.character, prompt, item.question, item.reference, item.options)


def _drawn(character: Character, scene: Scene) -> str:
    return templates.t2i(character.description, scene.user, scene.reply)


def _asked(character: Character, scene: Scene) -> str:
    return templates.dialogue(character.name, character.description, character.opening, scene.user)


_SOURCES: dict[str, Callable[[_Described], Iterator[Item]]] = {
    "knowledge_mcq": _choices("knowledge_mcq", "knowledge_mcq", "train"),
    "image_mcq": _choices("image_mcq", "image_mcq", "train"),
    "unseen_image_mcq": _choices("unseen_image_mcq", "image_mcq", "test"),
    "vqa": _visual_questions,
    "reply_likelihood": _published("reply_likelihood", "dialogue"),
    "dialogue": _published("dialogue", "dialogue"),
    "memorization": _published("memorization", "memorization"),
    "personality": _published("personality", "personality"),
    "t2i": _captions,
    "scene_t2i": _scenes("scene_t2i", _drawn),
    "t2t2i": _scenes("t2t2i", _asked),
}

TASKS: dict[str, str] = {
    "knowledge_mcq": "multiple choice on the character's facts",
    "image_mcq": "multiple choice on training pictures, new questions",
    "unseen_image_mcq": "multiple choice on held-out pictures",
    "vqa": "free questions on held-out pictures",
    "reply_likelihood": "held-out dialogues: how likely the published reply is",
    "dialogue": "held-out user lines: style of own replies",
    "memorization": "open questions on the character's facts",
    "personality": "open questions on the character's manner",
    "t2i": "held-out captions to pictures",
    "scene_t2i": "held-out dialogues to pictures",
    "t2t2i": "held-out user lines to own replies to pictures",
}
"""Task to what it asks, in the order of tables."""

DEFAULT_TASKS = tuple(name for name in TASKS if name != "scene_t2i")

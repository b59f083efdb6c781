"""From a character to training samples and test items, task by task.

Two views of the same derivation, both from the raw JSON and the templates:

* :func:`samples` gives what training needs: a :class:`Sample` is a plan of text and image parts, each
  saying whether it carries a loss and whether guidance dropout may omit it.
* :func:`eval_items` gives the questions of the test sets, with what is known of their answers.

A record that lacks what a task needs (a scene without its thinking) yields nothing for that task.
The ``_full`` files of the publication hold rows of an earlier generation run, which nothing shipped
uses (``Bo_t2i_full`` too: its thoughts are others); a mixture of the tasks below replaces them.

Source: UniCharacter (arXiv 2605.08129), data preparation and SFT loaders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from unichar_jax.data import templates
from unichar_jax.data.character import Character, ChoiceQuestion, Dialogue, ImageFile, Scene
from unichar_jax.errors import require_known

T2I_TASKS = ("pure_t2i", "t2i", "t2i_with_thinking", "t2i_generation_instruction_only")
VLM_TASKS = ("vlm", "vlm_extension", "vlm_thinking", "knowledge_qa", "vqa")
TASKS = T2I_TASKS + VLM_TASKS
"""Training tasks, by the published names."""

TEST_SETS = ("dialogue", "memorization", "personality", "knowledge_mcq", "image_mcq", "t2i")
"""Test sets; ``t2i`` and part of ``dialogue`` come from a character's ``test`` folder."""

PartKind = Literal["text", "vit_image", "latent_image"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a sample.

    Attributes:
      kind: text, an image to look at (vision tower), or an image to draw (autoencoder).
      loss: the model learns to produce this part.
      text: the text, for a text part.
      image: the picture, for an image part.
      droppable: may be left out at random, which teaches the model to draw without a condition.
    """

    kind: PartKind
    loss: bool
    text: str = ""
    image: ImageFile | None = None
    droppable: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample: ``key`` is unique over all characters, splits and tasks."""

    key: str
    task: str
    character: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class EvalItem:
    """One question of a test set.

    Attributes:
      key: unique over all characters, splits and test sets.
      test_set: one of ``TEST_SETS``.
      character: short name.
      prompt: what the model is asked, ready to tokenise; starts with ``<image>`` if it has a picture
        to look at.
      question: the bare question or user line inside the prompt.
      image: the picture to look at (``image_mcq``), or the real one to compare with (``t2i``).
      reference: the published answer; empty where there is none.
      options: letters and texts of a multiple-choice question.
    """

    key: str
    test_set: str
    character: str
    prompt: str
    question: str
    image: ImageFile | None = None
    reference: str = ""
    options: tuple[tuple[str, str], ...] = ()


# -- drawings and exchanges --------------------------------------------------------------------


def _drawings(character: Character, task: str) -> Iterator[tuple[int | str, ImageFile, str]]:
    """Scene id (the picture's id for plain captions), picture and prompt of a drawing task."""
    if task == "pure_t2i":
        yield from ((caption.image.id, caption.image, caption.text) for caption in character.captions)
        return
    for index, scene in enumerate(character.scenes):
        text = _drawing_prompt(character, scene, task)
        if text:
            yield index, scene.image, text


def _drawing_prompt(character: Character, scene: Scene, task: str) -> str:
    told = (character.description, scene.user, scene.reply)
    if task == "t2i":
        return templates.t2i(*told)
    if task == "t2i_generation_instruction_only":
        return scene.generation_instruction
    if not (scene.thinking and scene.generation_instruction):
        return ""
    return templates.t2i_with_thinking(*told, scene.thinking, scene.generation_instruction)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """One question and answer of a text task, perhaps about a picture."""

    id: int | str
    human: str
    reply: str
    image: ImageFile | None = None
    qa_type: str = ""


def _exchanges(character: Character, task: str) -> Iterator[_Exchange]:
    if task == "vlm":
        for index, scene in enumerate(character.scenes):
            yield _Exchange(index, _dialogue(character, scene), scene.reply)
    elif task == "vlm_extension":
        for index, spoken in enumerate(character.extension_train):
            yield _Exchange(index, _dialogue(character, spoken), spoken.reply)
    elif task == "vlm_thinking":
        for index, scene in enumerate(character.scenes):
            if scene.thinking and scene.generation_instruction:
                yield _Exchange(
                    index,
                    templates.thinking_prompt(character.description, scene.user, scene.reply),
                    templates.thinking_reply(scene.thinking, scene.generation_instruction),
                )
    elif task == "knowledge_qa":
        for index, item in enumerate(character.knowledge_qa):
            yield _Exchange(index, item.question, item.answer)
    else:
        for index, scene in enumerate(character.scenes):
            for number, pair in enumerate(scene.qa_pairs):
                yield _Exchange(
                    f"{index}_{number}",
                    templates.vqa(pair.question),
                    pair.answer,
                    scene.image,
                    pair.type,
                )


def _dialogue(character: Character, spoken: Scene | Dialogue) -> str:
    return templates.dialogue(character.name, character.description, character.opening, spoken.user)


# -- training samples ----------------------------------------------------------------------------


def samples(character: Character, task: str) -> list[Sample]:
    """The training samples of a task; empty if the character lacks what it needs.

    Drawing tasks: the prompt (droppable, no loss), then the picture to draw (loss). Text tasks: the
    human side split at ``<image>`` (no loss), then the answer (loss).

    Raises:
      UserError: no such task.
    """
    require_known("task", task, TASKS)
    if task in T2I_TASKS:
        plans = [
            (
                scene_id,
                (Part("text", False, text, droppable=True), Part("latent_image", True, image=i)),
            )
            for scene_id, i, text in _drawings(character, task)
        ]
    else:
        plans = [
            (exchange.id, (*_human_parts(exchange), Part("text", True, exchange.reply)))
            for exchange in _exchanges(character, task)
        ]
    prefix = f"{character.split}/{character.dir_name}/{task}"
    return [Sample(f"{prefix}/{i}", task, character.name, parts) for i, parts in plans]


def _human_parts(exchange: _Exchange) -> Iterator[Part]:
    """Text and pictures in reading order; only text around a placeholder is stripped."""
    pieces = exchange.human.split(templates.IMAGE_PLACEHOLDER)
    if len(pieces) == 1:
        yield Part("text", False, exchange.human)
        return
    images = [exchange.image] if exchange.image else []
    for number, piece in enumerate(pieces):
        if number and images:
            yield Part("vit_image", False, image=images.pop(0))
        if piece.strip():
            yield Part("text", False, piece.strip())


# -- test items ----------------------------------------------------------------------------------


def eval_items(character: Character, test_set: str) -> list[EvalItem]:
    """The items of a test set; empty if this folder of the character has none.

    Raises:
      UserError: no such test set.
    """
    require_known("test set", test_set, TEST_SETS)
    prefix = f"{character.split}/{character.dir_name}/{test_set}"
    items = _TEST_SETS[test_set](character)
    return [
        EvalItem(f"{prefix}/{number}", test_set, character.name, *item) for number, item in enumerate(items)
    ]


_Item = tuple[str, str, ImageFile | None, str, tuple[tuple[str, str], ...]]


def _test_dialogues(character: Character) -> Iterator[_Item]:
    held_out = character.scenes if character.split == "test" else ()
    exchanges: tuple[Scene | Dialogue, ...] = (*character.extension_test, *held_out)
    for spoken in exchanges:
        yield _dialogue(character, spoken), spoken.user, None, spoken.reply, ()


def _test_asked(character: Character, asked: tuple[str, ...]) -> Iterator[_Item]:
    for question in asked:
        yield _dialogue(character, Dialogue(question, "")), question, None, "", ()


def _test_choices(questions: tuple[ChoiceQuestion, ...], image: ImageFile | None = None) -> Iterator[_Item]:
    for item in questions:
        prompt = templates.multiple_choice(item.question, item.options)
        prompt = templates.vqa(prompt) if image else prompt
        yield prompt, item.question, image, item.answer_key, tuple(item.options.items())


def _test_images(character: Character) -> Iterator[_Item]:
    for scene in character.scenes:
        yield from _test_choices(scene.mcq_items, scene.image)


def _test_drawings(character: Character) -> Iterator[_Item]:
    if character.split == "test":
        for caption in character.captions:
            yield caption.text, caption.text, caption.image, "", ()
        for scene in character.scenes:
            prompt = _drawing_prompt(character, scene, "t2i")
            yield prompt, scene.user, scene.image, scene.reply, ()


_TEST_SETS = {
    "dialogue": _test_dialogues,
    "memorization": lambda character: _test_asked(character, character.memorization),
    "personality": lambda character: _test_asked(character, character.personality),
    "knowledge_mcq": lambda character: _test_choices(character.knowledge_mcq),
    "image_mcq": _test_images,
    "t2i": _test_drawings,
}

"""What is known of a character: plain immutable values, as read from RoleScape-20's format.

These types are what the rest of the package sees; where the values come from on disk is the business
of ``rolescape.py``. They hold paths of pictures and what the headers say, never pixels.

Source: UniCharacter (arXiv 2605.08129), dataset RoleScape-20.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from unichar_jax.records import Finding

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A picture of a character: its id, absolute path, and what its header says."""

    id: str
    path: Path
    width: int
    height: int
    format: str
    mode: str


@dataclasses.dataclass(frozen=True)
class VisualQuestion:
    """A question about one scene's picture; ``type`` is ``objective`` or ``subjective``."""

    question: str
    answer: str
    type: str


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question; ``options`` maps letters to texts, ``answer_key`` is a letter."""

    id: str
    question: str
    options: dict[str, str]
    answer_key: str
    difficulty: str
    rationale: str
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class KnowledgeQuestion:
    """A question about the character's facts, with a free-text answer."""

    id: str
    question: str
    answer: str
    evidence: str
    type: str
    difficulty: str
    reasoning_steps: tuple[str, ...]
    confidence: float


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One exchange in text: what the user says and what the character answers."""

    user: str
    reply: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """One exchange with its picture; ``thinking`` and ``instruction`` are empty if not annotated."""

    user: str
    reply: str
    image: ImageFile
    thinking: str = ""
    generation_instruction: str = ""
    qa_pairs: tuple[VisualQuestion, ...] = ()
    mcq_items: tuple[ChoiceQuestion, ...] = ()


@dataclasses.dataclass(frozen=True)
class Caption:
    """A plain description of one picture."""

    text: str
    image: ImageFile


@dataclasses.dataclass(frozen=True)
class Character:
    """Everything that one folder says of a character. What the folder lacks is empty.

    ``extension_train`` and ``extension_test`` are dialogues without pictures; the published training
    ones end with the scenes' dialogues. ``notes`` lists what was put right while reading.
    """

    name: str
    dir_name: str
    split: Split
    folder: Path
    description: str
    opening: str
    images: tuple[ImageFile, ...]
    scenes: tuple[Scene, ...]
    captions: tuple[Caption, ...]
    extension_train: tuple[Dialogue, ...]
    extension_test: tuple[Dialogue, ...]
    knowledge_qa: tuple[KnowledgeQuestion, ...]
    knowledge_mcq: tuple[ChoiceQuestion, ...]
    memorization: tuple[str, ...]
    personality: tuple[str, ...]
    full_profile: str
    simplified_profile: str
    attributes: dict[str, Any]
    notes: tuple[Finding, ...]

"""Every prompt that the model is trained on or asked with, in one place.

The strings are an interface, not prose: the tuned weights know them letter by letter, including the
trailing space after an empty ``Opening:``. They come from UniCharacter (arXiv 2605.08129), whose
training files and inference code they reproduce exactly; the two generic ``<think>`` system prompts
come from BAGEL (arXiv 2505.14683). Each prompt is a small pure function of its fields, so training
rows, role play, evaluation and rewards cannot drift apart.

This module never reads a file, never tokenises, and never strips or "improves" a field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

IMAGE_PLACEHOLDER = "<image>"
"""Marks, in a question's text, the place where an image is inserted."""

VLM_THINK = (
    "You should first think about the reasoning process in the mind and then provide the user with "
    "the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process "
    "here </think> answer here"
)
"""System prompt of BAGEL for answering a question about an image with reasoning first."""

GEN_THINK = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process "
    "here </think> image here"
)
"""System prompt of BAGEL for drawing with planning first (plain text to image, no character)."""

THINKING_INSTRUCTION = (
    "You should first think about the planning process in the mind and then generate the image.\n"
    "The planning process must be enclosed within <think></think>.\n"
    "Then provide a concise, standardized generation instruction enclosed within <gen></gen> that "
    "can be fed to a text-to-image model.\n"
    "The <gen> instruction should be a single descriptive sentence or a short list of "
    "comma-separated attributes, focusing on character, pose/expression, scene context, "
    "composition, style, and quality words.\n"
    "Output format (no additional text):\n"
    "<think>...your planning process...</think>\n"
    "<gen>...your generation instruction...</gen>\n"
)
"""How a character is told to plan a picture: a thought, then one drawing instruction."""


class Thinking(NamedTuple):
    """A parsed planning reply; a missing part is the empty string."""

    thinking: str
    instruction: str


def _scene(description: str, user: str, reply: str) -> str:
    """The three fields that every picture prompt of a scene opens with."""
    return f"Character Description: {description}\n\nUser Input: {user}\n\nCharacter Response: {reply}"


def history_block(history: Iterable[tuple[str, str]]) -> str:
    """Past turns as ``(role, text)`` pairs, for the dialogue prompt; empty without history.

    Training data has no turn with a history; role play has.
    """
    turns = "".join(f"{role}: {text}\n" for role, text in history)
    return f"Conversation History:\n{turns}\n" if turns else ""


def dialogue(
    name: str,
    description: str,
    opening: str,
    user: str,
    history: Iterable[tuple[str, str]] = (),
) -> str:
    """Asks ``name`` (the short name) for the next line in its own voice."""
    return (
        f"Character Description: {description}\n\nOpening: {opening}\n\n{history_block(history)}"
        f"User Input: {user}\n\n"
        "Based on the character description, opening, conversation history, current user input, "
        f"and the reference image, please generate {name}'s response."
    )


def t2i(description: str, user: str, reply: str) -> str:
    """Asks for the picture of a scene."""
    return (
        f"{_scene(description, user, reply)}\n\n"
        "Please generate an image that visualizes this scene with the character responding to the "
        "user's input based on the character description."
    )


def t2i_with_thinking(description: str, user: str, reply: str, thinking: str, instruction: str) -> str:
    """Asks for the picture of a scene that was planned with :func:`thinking_prompt`."""
    return (
        f"{_scene(description, user, reply)}\n\nThinking Process: {thinking}\n\n"
        f"Generation Instruction: {instruction}\n\n"
        "Please generate an image that visualizes this scene with the character responding to the "
        "user's input based on the character description, thinking process, and generation "
        "instruction."
    )


def plan_first(prompt: str) -> str:
    """Asks a tuned character to plan the picture of any drawing prompt before it is drawn."""
    return f"{prompt}\n\nSystem Instruction for Thinking and Generation:\n{THINKING_INSTRUCTION}"


def thinking_prompt(description: str, user: str, reply: str) -> str:
    """Asks the character to plan the picture of a scene, as in training (the default)."""
    return plan_first(t2i(description, user, reply))


def thinking_prompt_as_shipped(description: str, user: str, reply: str) -> str:
    """The planning prompt of the reference's inference code, which differs from its training data.

    Only for comparing with results made by that code; :func:`thinking_prompt` is what weights know.
    """
    return (
        f"{THINKING_INSTRUCTION}\n\n{_scene(description, user, reply)}\n\n"
        "Please think about how to generate an image for this scene."
    )


def thinking_reply(thinking: str, instruction: str) -> str:
    """The planning reply as trained; :func:`parse_thinking` is its inverse up to outer spaces."""
    return f"<think>{thinking}</think>\n<gen>{instruction}</gen>"


def vqa(question: str) -> str:
    """A question about one image: the placeholder, then the question without a separator."""
    return f"{IMAGE_PLACEHOLDER}{question}"


def multiple_choice(question: str, options: Mapping[str, str]) -> str:
    """A question with lettered options. Ours: the reference ships test questions but no prompt."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"{question}\n{listed}\nAnswer with the letter of the correct option only."


def parse_thinking(text: str) -> Thinking:
    """Takes the first ``<think>`` and the first ``<gen>`` part of a reply, stripped."""

    def first(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return found.group(1).strip() if found else ""

    return Thinking(first("think"), first("gen"))

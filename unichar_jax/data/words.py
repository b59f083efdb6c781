"""The one gate for words: what a person wrote, as a model may read it.

Whoever takes text from outside (training folders, dialogue files, character cards, prompts, annotation, the
page) sends it through ``gate``. The rules are the same everywhere:

* The model's delimiters never come out of a text: ``<|name|>`` becomes ``<name>``.
* Every line end is LF; other control characters, except tabs, are left out.
* ``{{char}}`` is the character's name where it is known, ``{{user}}`` is "User" unless a name is given.
* A line ``<START>``, which separates the examples of a character card, is left out.
* ``<image>`` marks a picture's place. Our prompts put it there; in a person's text it is an error.

Names are one if they are one in NFC and without regard to case. Nothing here opens a file or knows a tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from unichar_jax.data.templates import IMAGE_PLACEHOLDER
from unichar_jax.errors import UserError

USER = "User"
"""What the person is called who talks to a character."""

_DELIMITER = re.compile(r"<\|([^<>|\s]{1,60})\|>")
_START = re.compile(r"^[ \t]*<START>[ \t]*(?:\n|$)", re.MULTILINE | re.IGNORECASE)
_FORBIDDEN = frozenset('/\\:*?"<>|')


class Remark(NamedTuple):
    """What the gate did, or cannot do, as a finding says it; ``severity`` is ``error`` or ``note``."""

    severity: str
    expected: str
    got: str
    remedy: str


def gate(text: str, name: str = "", user: str = USER) -> tuple[str, tuple[Remark, ...]]:
    """The text as a model may read it, and what there is to tell of it.

    Args:
      text: what somebody wrote.
      name: of the character, for ``{{char}}``; empty leaves it.
      user: for ``{{user}}``.
    """
    remarks = []
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if found := _DELIMITER.findall(text):
        marks = ", ".join(dict.fromkeys(f"<|{mark}|>" for mark in found))
        remarks.append(Remark("note", "no delimiter of the model", marks, "read as plain words"))
        text = _DELIMITER.sub(r"<\1>", text)
    if controls := [c for c in text if c not in "\n\t" and unicodedata.category(c) == "Cc"]:
        codes = ", ".join(dict.fromkeys(f"U+{ord(c):04X}" for c in controls))
        remarks.append(Remark("note", "words", f"control characters ({codes})", "they are left out"))
        text = "".join(c for c in text if c not in controls)
    for mark, meant in (("{{char}}", name), ("{{user}}", user)):
        if meant and re.search(re.escape(mark), text, re.IGNORECASE):
            remarks.append(Remark("note", "a name", mark, f"read as {meant!r}"))
            text = re.sub(re.escape(mark), lambda _, meant=meant: meant, text, flags=re.IGNORECASE)
    if _START.search(text):
        remarks.append(Remark("note", "what is said", "<START>", "the line is left out"))
        text = _START.sub("", text)
    if IMAGE_PLACEHOLDER in text:
        remedy = "take it out, or write what the picture shows"
        remarks.append(Remark("error", "words only", f"{IMAGE_PLACEHOLDER}, a picture's place", remedy))
    return text, tuple(remarks)


def clean(text: str, name: str = "", user: str = USER) -> str:
    """As ``gate``, for words of this moment; what is an error there is one here.

    Raises:
      UserError: the text holds ``<image>``, or half a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode at character {error.start} ({error.reason}); remove it."
        ) from None
    text, remarks = gate(text, name, user)
    for severity, expected, got, remedy in remarks:
        if severity == "error":
            raise UserError(f"the text: expected {expected}, got {got}; {remedy}.")
    return text


# -- names --------------------------------------------------------------------------------------------------


def same(name: str) -> str:
    """What is equal for names that are one."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def is_word(char: str) -> bool:
    """Part of a word in any script: a letter, a digit, a mark that combines with one, or an underscore."""
    return char == "_" or char.isalnum() or unicodedata.category(char)[0] == "M"


def faulty_name(name: str) -> str:
    """Why a name cannot be a character's, which is also a folder's; empty if it can."""
    if not name or not (name[0].isalnum()) or name != name.strip():
        return "a letter or a digit first, and no space around it"
    if bad := [
        c for c in name if c in _FORBIDDEN or not (c.isprintable() or unicodedata.category(c) == "Cf")
    ]:
        return f"no {bad[0]!r} in it"
    if len(name) > 64 or len(name.encode("utf-8", "replace")) > 200:
        return "at most 64 characters"
    return ""

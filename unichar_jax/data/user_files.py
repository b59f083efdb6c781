"""What a user brings for a new character: dialogues, a profile or a character card, captions.

All text goes through the gate (``data.words``); what it did is noted with the file and the line.

Dialogue file, as text: exchanges separated by an empty line, an optional opening line first. Colons may be
full-width. An ``Image:`` line before the first speaker names the picture that shows the exchange; after a
speaker it does so only if what follows ends as the name of a picture, else it is part of what is said.

    Opening: The shop bell rings; Nova looks up.

    Image: waving.jpg
    User: Good morning!
    Nova: Morning. Mind the wet paint.

As JSON: ``{"opening": "...", "dialogues": [{"user": "...", "reply": "...", "image": "..."}]}``, or what other
tools write: ShareGPT's ``conversations`` and OpenAI's ``messages``, one object, a list, or a line each. Each
reply with the user's words before it is one exchange; training shows no earlier turns.

Profile: plain text, or a character card (V1 to V3, as JSON): its first message becomes the opening, its
example messages become exchanges.

Captions: a text file beside a picture (``waving.txt`` or ``waving.caption``), or ``metadata.jsonl`` with
``file_name`` and ``text``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unichar_jax.data import words
from unichar_jax.data.files import read_jsonl, read_text
from unichar_jax.data.images import OTHER_NAMES, READ_NAMES
from unichar_jax.errors import UserError
from unichar_jax.records import DataError, Findings, Record, parse, shown

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "reply",
    "assistant": "reply",
    "bot": "reply",
    "char": "reply",
}
"""Who speaks, in the words of other tools."""

_CARD_FIELDS = ("description", "personality", "scenario")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One user line and its reply; ``image`` names a picture of the user's folder, or is empty."""

    user: str
    reply: str
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a profile says; a plain text has neither opening nor exchanges."""

    text: str = ""
    opening: str = ""
    exchanges: tuple[Exchange, ...] = ()


@dataclasses.dataclass
class _Reader:
    """One file of the user's: where its findings go, and whose names its text is about."""

    found: Findings
    path: Path
    name: str
    user: str

    def text(self) -> str:
        """The file as it is.

        Raises:
          UserError: absent, or no UTF-8 text.
        """
        text = read_text(self.found, self.path.parent.resolve(), self.path.name)
        self.stop()
        if text is None:
            raise UserError(f"{self.path}: no such file.")
        return text

    def gated(self, text: str, place: str = "") -> str:
        """Text through the gate; line by line, so that what it tells has a line."""
        lines = text.replace("\r\n", "\n").split("\n")
        read = []
        for number, line in enumerate(lines, 1):
            clean, remarks = words.gate(line, self.name, self.user)
            for severity, *told in remarks:
                tell = self.found.error if severity == "error" else self.found.note
                tell(self.path.name, place or f"line {number}", "", *told)
            read.append(clean)
        return "\n".join(read)

    def stop(self) -> None:
        if self.found.failed:
            raise DataError(self.path, self.found.all, "The formats are described in docs/customise.md.")


# -- dialogues ----------------------------------------------------------------------------------------------


def read_dialogues(
    path: Path, name: str, user: str = words.USER, found: Findings | None = None
) -> tuple[str, tuple[Exchange, ...]]:
    """The opening and the exchanges of a dialogue file (see the module).

    Args:
      path: the file.
      name: of the character.
      user: what ``{{user}}`` stands for.
      found: takes the notes.

    Raises:
      UserError: the file is absent or not understood; all faults together.
    """
    reader = _Reader(Findings() if found is None else found, path, name, user)
    text = reader.text()
    if path.suffix.lower() in (".json", ".jsonl"):
        reader.found.gate = functools.partial(words.gate, name=name, user=user)
        opening, exchanges = _from_json(reader, text)
        reader.found.gate = None
    else:
        opening, exchanges = _from_text(reader, text)
    reader.stop()
    return opening, tuple(exchanges)


def _from_text(reader: _Reader, text: str) -> tuple[str, list[Exchange]]:
    opening, exchanges = "", []
    text = reader.gated(re.sub(r"(?im)^[ \t]*<START>[ \t]*$", "", text))
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        blocks[-1].append(line) if line.strip() else blocks.append([])
    for number, block in enumerate((block for block in blocks if block), 1):
        faults = len(reader.found.errors)
        fields = _fields(reader, f"exchange {number}", block)
        opening = fields.pop("opening", opening)
        if not fields:
            continue
        for kind, label in (("user", "User"), ("reply", reader.name)):
            if not fields.get(kind) and len(reader.found.errors) == faults:
                reader.found.error(
                    reader.path.name, f"exchange {number}", label, f"a line '{label}: ...'", "none", "add it"
                )
        exchanges.append(Exchange(fields.get("user", ""), fields.get("reply", ""), fields.get("image", "")))
    return opening, exchanges


def _fields(reader: _Reader, place: str, block: list[str]) -> dict[str, str]:
    """What each speaker of one exchange says, and its picture."""
    labels = {"opening": "opening", "image": "image", "user": "user"}
    labels |= {words.same(reader.user): "user", words.same(reader.name): "reply"}
    fields: dict[str, str] = {}
    current = ""
    for line in block:
        label, colon, rest = re.match(r"([^:：]*)([:：]?)(.*)", line).groups()  # type: ignore[union-attr]
        kind = labels.get(words.same(label), "") if colon else ""
        if kind == "image" and current in ("user", "reply") and not _names_picture(rest):
            told = ("a picture's name", shown(rest.strip()), "read as what is said")
            reader.found.note(reader.path.name, place, label.strip(), *told)
            kind = ""
        if kind and kind in fields:
            fault = ("one such line", "another", "put an empty line between exchanges")
            reader.found.error(reader.path.name, place, label.strip(), *fault)
        elif kind:
            fields[kind], current = rest.strip(), kind
        elif current:
            fields[current] = f"{fields[current]}\n{line.strip()}"
        else:
            wanted = f"a line 'User: ...' or '{reader.name}: ...'"
            reader.found.error(reader.path.name, place, "", wanted, shown(line), "add the speaker")
    return fields


def _names_picture(text: str) -> bool:
    return words.same(text).endswith((*READ_NAMES, *OTHER_NAMES))


def _from_json(reader: _Reader, text: str) -> tuple[str, list[Exchange]]:
    file = reader.path.name
    found = reader.found
    if reader.path.suffix.lower() == ".jsonl":
        lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        values = [value for good, value in (parse(found, file, *line) for line in lines) if good]
    else:
        good, value = parse(found, file, "", text)
        values = (value if isinstance(value, list) else [value]) if good else []
    whole = values[0] if len(values) == 1 and isinstance(values[0], dict) else {}
    if "dialogues" in whole or (whole and not whole.keys() & {"conversations", "messages"}):
        record = Record(found, file, "", whole).expect("opening", "dialogues")
        items = [item.expect("user", "reply", "image") for item in record.records("dialogues", required=True)]
        read = [Exchange(i.text("user"), i.text("reply"), i.text("image", required=False)) for i in items]
        return record.text("opening", required=False), read
    opening, exchanges = "", []
    for number, value in enumerate(values, 1):
        record = Record(found, file, f"conversation {number}" if len(values) > 1 else "", value)
        first, pairs = _conversation(record, reader)
        opening = opening or first
        exchanges += pairs
    if not exchanges and not found.failed:
        found.error(file, "", "", "dialogues, conversations or messages", "none", "see the formats")
    return opening, exchanges


def _conversation(record: Record, reader: _Reader) -> tuple[str, list[Exchange]]:
    """What a character says first, if it does, and each reply with the user's words before it."""
    key = "messages" if "messages" in record.data else "conversations"
    opening, said, pairs = "", "", []
    for turn in record.records(key, required=True):
        if isinstance(parts := turn.data.get("content"), list):  # OpenAI's parts of a message
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            turn.data = turn.data | {"content": texts}
        role = words.same(str(turn.data.get("from", turn.data.get("role", ""))))
        text = turn.text("value" if "value" in turn.data else "content")
        speaker = "reply" if role == words.same(reader.name) else _SPEAKERS.get(role, "")
        if not speaker:
            turn.note("role", "user or assistant", shown(role), "it is left out; a profile says who speaks")
        elif speaker == "user":
            said = f"{said}\n{text}".strip()
        elif said:
            pairs.append(Exchange(said, text))
            said = ""
        elif not pairs and not opening:
            opening = text
        else:
            turn.note("role", "the user's words before a reply", "none", "the reply is left out")
    return opening, pairs


# -- profiles and cards -------------------------------------------------------------------------------------


def read_profile(path: Path, name: str, user: str, found: Findings) -> Profile:
    """A profile, or what a character card says.

    Raises:
      UserError: the file is absent or not understood.
    """
    reader = _Reader(found, path, name, user)
    text = reader.text()
    if path.suffix.lower() != ".json":
        read = Profile(reader.gated(text))
    else:
        good, value = parse(found, path.name, "", text)
        read = _card(reader, value) if good else Profile()
    reader.stop()
    return read


def _card(reader: _Reader, value: Any) -> Profile:
    file, found = reader.path.name, reader.found
    data = value.get("data", value) if isinstance(value, dict) else value
    record = Record(found, file, "data" if data is not value else "", data)
    if record.ok and not record.data.keys() & {*_CARD_FIELDS, "first_mes", "mes_example"}:
        found.error(
            file, "", "", "a character card", "another JSON", "give a text file, or a card with a description"
        )
    told = {key: reader.gated(record.text(key, required=False), key).strip() for key in _CARD_FIELDS}
    opening = reader.gated(record.text("first_mes", required=False), "first_mes").strip()
    lines = [told["description"], *(f"{k.title()}: {told[k]}" for k in _CARD_FIELDS[1:] if told[k])]
    examples = re.sub(r"(?im)^(?=\{\{user\}\}\s*[:：])", "\n", record.text("mes_example", required=False))
    inner = dataclasses.replace(reader, path=reader.path.with_name(f"{file}: mes_example"))
    _, exchanges = _from_text(inner, examples) if examples.strip() else ("", [])
    return Profile("\n".join(line for line in lines if line), opening, tuple(exchanges))


# -- captions -----------------------------------------------------------------------------------------------


def read_captions(
    images_dir: Path, pictures: Iterable[str], name: str, user: str, found: Findings
) -> dict[str, str]:
    """Captions by picture, of those that have one.

    Raises:
      UserError: one caption is that of two pictures, or a file cannot be read.
    """
    pictures = list(pictures)
    of_stem: dict[str, list[str]] = {}
    for picture in pictures:
        of_stem.setdefault(words.same(Path(picture).stem), []).append(picture)
    captions: dict[str, str] = {}
    for path in sorted(images_dir.iterdir()):
        if path.suffix.lower() not in (".txt", ".caption") or path.name.startswith("."):
            continue
        owners = of_stem.get(words.same(path.stem), [])
        if len(owners) > 1:
            raise UserError(
                f"{images_dir}: {path.name} is the caption of {' and '.join(owners)}; expected one picture."
                " Rename one of the pictures, or remove it."
            )
        for owner in owners:
            reader = _Reader(found, path, name, user)
            text = reader.gated(reader.text()).strip()
            reader.stop()
            captions[owner] = captions.get(owner) or text
    listed = next((p for p in images_dir.iterdir() if p.name.lower() == "metadata.jsonl"), None)
    for line in read_jsonl(found, images_dir.resolve(), listed.name) if listed else ():
        reader = _Reader(found, images_dir / line.file, name, user)
        named = Path(line.text("file_name")).name
        key = next((key for key in ("text", "caption", "prompt") if key in line.data), "text")
        text = reader.gated(line.text(key), line.place).strip()
        owner = find_picture(named, pictures)
        if owner is None and named:
            line.note("file_name", "a picture of this folder", shown(named), "the line is ignored")
        elif owner:
            captions[owner] = captions.get(owner) or text
    if found.failed:
        raise DataError(images_dir, found.all, "The formats are described in docs/customise.md.")
    return captions


def find_picture(named: str, pictures: Iterable[str]) -> str | None:
    """The picture of that name: exactly, or else in any case and any form of its letters."""
    pictures = list(pictures)
    alike = [picture for picture in pictures if words.same(picture) == words.same(named)]
    return named if named in pictures else alike[0] if len(alike) == 1 else None

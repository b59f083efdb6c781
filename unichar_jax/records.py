"""Checking JSON that people, language models and other programs wrote: every fault found, none raised half-way.

A :class:`Record` is one JSON object that knows its file and place. Asking it for a field checks the
type and, where something is wrong, adds a :class:`Finding` to a shared list and returns a neutral
value, so that one pass over a folder reports all faults together. The caller raises
:class:`DataError` at the end if any finding is an error.

Character data, settings of models and headers of weights are all read through it. It knows nothing of
what they mean, and opens no file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from unichar_jax.errors import UserError, listed

LITERAL = ("role", "image", "image_id", "reference_images_path", "test_questions")
"""Fields that must be strings as they stand: names of files, of roles, and questions that are asked. In any
other field that is read as text, a number or true/false is the text that JSON spells it with, and a list of
texts is one text, a line each; a note tells of it."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a data file: an error stops its use, a note does not.

    Attributes:
      severity: ``"error"`` or ``"note"``.
      file: path relative to the checked folder.
      record: place in the file, such as ``scenes[3]``; empty for the whole file.
      field: name of the field; empty for the whole record.
      expected: what the format asks for.
      got: what is there.
      remedy: what to do.
    """

    severity: Literal["error", "note"]
    file: str
    record: str
    field: str
    expected: str
    got: str
    remedy: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, self.record, self.field) if part)
        return f"{place}: expected {self.expected}, got {self.got}; {self.remedy}"


class DataError(UserError):
    """A data folder with errors; the message lists them, ``findings`` holds them."""

    def __init__(self, where: Path, findings: Iterable[Finding], remedy: str) -> None:
        self.findings = tuple(f for f in findings if f.severity == "error")
        count = f"{len(self.findings)} error{'s' if len(self.findings) != 1 else ''}"
        super().__init__(f"{where}: {count} in the data.{listed(self.findings)}\n{remedy}")


Gate = Callable[[str], tuple[str, Iterable[tuple[str, str, str, str]]]]
"""A text to what is read of it, and what there is to tell: severity, expected, got, remedy."""


class Findings:
    """The findings about one folder, in the order of discovery.

    Attributes:
      gate: what every text that a record holds goes through, if anything.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self._all: list[Finding] = []
        self.gate = gate

    @property
    def all(self) -> tuple[Finding, ...]:
        return tuple(self._all)

    def error(self, file: str, record: str, field: str, expected: str, got: str, remedy: str) -> None:
        self._add("error", file, record, field, expected, got, remedy)

    def note(self, file: str, record: str, field: str, expected: str, got: str, remedy: str) -> None:
        self._add("note", file, record, field, expected, got, remedy)

    def _add(self, severity: Literal["error", "note"], *told: str) -> None:
        self._all.append(Finding(severity, *map(printable, told)))

    def picture(self, file: str, folder: Path, error: UserError) -> None:
        """An error about a picture in ``folder`` that was refused."""
        got, _, remedy = str(error).removeprefix(f"{folder}: ").partition("; ")
        remedy = remedy.rstrip(".") or "replace it by a picture"
        self.error(file, "", "", "a whole picture inside this folder", got.rstrip("."), remedy)

    @property
    def notes(self) -> tuple[Finding, ...]:
        return tuple(f for f in self._all if f.severity == "note")

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self._all if f.severity == "error")

    @property
    def failed(self) -> bool:
        return bool(self.errors)

    def refuse(self) -> None:
        """Raises one ``UserError`` with every error found, if there is one."""
        if self.failed:
            raise UserError("\n".join(f"{f}." for f in self._all if f.severity == "error"))


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A short, printable form of a value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"a number ({shown(value)})")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


class Record:
    """One JSON object at a known place; reading a field checks it."""

    def __init__(self, found: Findings, file: str, place: str, value: Any) -> None:
        self.found, self.file, self.place = found, file, place
        self.ok = isinstance(value, dict)
        self.data: dict[str, Any] = value if isinstance(value, dict) else {}
        if not self.ok:
            found.error(file, place, "", "an object {...}", _kind(value), "rewrite the record")

    def error(self, field: str, expected: str, got: str, remedy: str) -> None:
        self.found.error(self.file, self.place, field, expected, got, remedy)

    def note(self, field: str, expected: str, got: str, remedy: str) -> None:
        self.found.note(self.file, self.place, field, expected, got, remedy)

    def expect(self, *known: str) -> Record:
        """Notes unknown keys; a near miss of an absent known key is read as that key."""
        absent = [key for key in known if key not in self.data]
        for key in [key for key in self.data if key not in known]:
            close = difflib.get_close_matches(key, absent, n=1, cutoff=0.7)
            if close:
                absent.remove(close[0])
                self.data = {close[0] if k == key else k: v for k, v in self.data.items()}
                self.note(close[0], f"the key {close[0]!r}", shown(key), "read as meant; rename it")
            else:
                self.note(key if key.isidentifier() else shown(key), "no such key", "one", "it is ignored")
        return self

    def text(self, field: str, *, required: bool = True) -> str:
        """A text (see ``LITERAL``); without ``required`` it may be absent, null or empty."""
        value = self._spelled(field)
        if value is None:
            if required and self.ok:
                self.error(field, "a string", "nothing", f"add {field!r}")
            return ""
        if not isinstance(value, str):
            self.error(field, "a string", _kind(value), "put the value in quotes")
            return ""
        if _has_surrogate(value):
            self.error(field, "Unicode text", f"half a character in {shown(value)}", "retype it")
            return ""
        if self.found.gate is not None:
            value, remarks = self.found.gate(value)
            for severity, *told in remarks:
                (self.error if severity == "error" else self.note)(field, *told)
        if required and not value.strip():
            self.error(field, "a text", "an empty one", "fill it in or drop the record")
        return value

    def _spelled(self, field: str) -> Any:
        """The field's value, as text where it is a scalar or a list of them that can be read as one."""
        value = self.data.get(field)
        if value is None or isinstance(value, str) or field.partition("[")[0] in LITERAL:
            return value
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(p, str | int) or (isinstance(p, float) and math.isfinite(p)) for p in parts):
            return value
        text = "\n".join(p if isinstance(p, str) else json.dumps(p) for p in parts)
        self.note(field, "a string", _kind(value), f"read as {shown(text)}")
        return text

    def number(self, field: str, default: float | None, low: float, high: float) -> float:
        """A finite number within ``[low, high]``; without a default it must be there."""
        value = self.data.get(field, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        expected, instead = f"a number from {low:g} to {high:g}", low if default is None else default
        return float(self._held(field, value, expected, good and low <= value <= high, instead))

    def whole(self, field: str, default: int | None = None, low: int = 1, high: int = 2**24) -> int:
        """A whole number within ``[low, high]``; without a default it must be there."""
        value = self.data.get(field, default)
        expected, instead = f"a whole number from {low} to {high}", low if default is None else default
        return self._held(field, value, expected, type(value) is int and low <= value <= high, instead)

    def choice(self, field: str, *options: Any) -> Any:
        """One of some values; the first where the field is absent."""
        value = self.data.get(field, options[0])
        good = any(type(value) is type(option) and value == option for option in options)
        return self._held(field, value, " or ".join(map(repr, options)), good, options[0])

    def _held(self, field: str, value: Any, expected: str, good: bool, instead: Any) -> Any:
        """The value if it is good; else ``instead``, and an error."""
        if self.ok and not good:
            got = "nothing" if value is None and field not in self.data else shown(value)
            self.error(field, expected, got, "correct it")
        return value if good else instead

    def inner(self, field: str) -> Record | None:
        """The object in a field; ``None`` where it is absent or null."""
        value = self.data.get(field)
        if value is None:
            return None
        return Record(self.found, self.file, f"{self.place}.{field}" if self.place else field, value)

    def wholes(self, field: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers within ``[low, high]``, at least one."""
        value = self.data.get(field)
        values = value if isinstance(value, list) else []
        good = bool(values) and all(type(v) is int and low <= v <= high for v in values)
        return tuple(self._held(field, value, f"a list of whole numbers from {low} to {high}", good, (low,)))

    def numbers(self, field: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of ``count`` numbers within ``[low, high]``."""
        value = self.data.get(field)
        values = value if isinstance(value, list) else []
        good = len(values) == count and all(type(v) in (int, float) and low <= v <= high for v in values)
        expected = f"a list of {count} numbers from {low:g} to {high:g}"
        return tuple(map(float, self._held(field, value, expected, good, (low,) * count)))

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.data.get(field, default)
        if not isinstance(value, bool):
            self.error(field, "true or false", _kind(value), "correct it")
            return default
        return value

    def _list(self, field: str, required: bool) -> list[Any]:
        value = self.data.get(field)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            if self.ok:
                self.error(field, "a list [...]", "nothing" if value is None else _kind(value), "rewrite it")
            return []
        return value

    def _at(self, field: str, index: int) -> str:
        return f"{self.place}.{field}[{index}]" if self.place else f"{field}[{index}]"

    def records(self, field: str, *, required: bool = False) -> list[Record]:
        """The objects of a list."""
        return [
            Record(self.found, self.file, self._at(field, i), value)
            for i, value in enumerate(self._list(field, required))
        ]

    def turns(self, field: str, *, required: bool = False) -> list[tuple[Record, Record] | None]:
        """A list of two-turn dialogues; a dialogue of another shape is an error and ``None``."""
        pairs: list[tuple[Record, Record] | None] = []
        for i, value in enumerate(self._list(field, required)):
            place = self._at(field, i)
            if not isinstance(value, list) or len(value) != 2:
                got = f"{len(value)} turns" if isinstance(value, list) else _kind(value)
                self.found.error(
                    self.file, place, "", "two turns, user and machine", got, "rewrite the dialogue"
                )
                pairs.append(None)
                continue
            user, machine = (
                Record(self.found, self.file, f"{place}[{j}]", turn) for j, turn in enumerate(value)
            )
            for turn, role in ((user, "user"), (machine, "machine")):
                if turn.ok and turn.data.get("role") != role:
                    turn.error("role", f"'{role}'", shown(turn.data.get("role")), "correct it")
            pairs.append((user, machine))
        return pairs

    def texts(self, field: str, *, required: bool = False, blank: bool = False) -> tuple[str, ...]:
        """A list of texts (see ``LITERAL``); with ``blank`` they may be empty. One text is a list of one."""
        value = self.data.get(field)
        if isinstance(value, str) and field not in LITERAL:
            self.note(field, "a list [...]", "a string", "read as a list of one")
            self.data = self.data | {field: [value]}
        values = self._list(field, required)
        box = Record(self.found, self.file, self.place, {})
        good = []
        for i, value in enumerate(values):
            box.data[f"{field}[{i}]"] = value
            good.append(box.text(f"{field}[{i}]", required=not blank))
        return tuple(good)


def decode(found: Findings, name: str, raw: bytes) -> str | None:
    """The text of a UTF-8 file, without its byte order mark; ``None`` if it is none (then it is logged)."""
    if raw.startswith(b"\xef\xbb\xbf"):
        found.note(name, "", "", "UTF-8 without a byte order mark", "one", "it is ignored")
        raw = raw[3:]
    if b"\r\n" in raw:
        found.note(name, "", "", "line ends LF", "CRLF", "read as LF; nothing to do")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at {error.start}"
        found.error(name, "", "", "UTF-8 text", got, "save the file as UTF-8")
        return None


def parse(found: Findings, name: str, place: str, text: str) -> tuple[bool, Any]:
    """Whether the text is JSON with each key once, and its value; what is wrong is logged."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                repeated.append(key)
            seen[key] = value
        return seen

    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno}, column {error.colno}"
        found.error(name, place, "", "JSON", got, "correct the syntax there")
        return False, None
    except (ValueError, RecursionError) as error:  # huge integers, endless nesting
        found.error(name, place, "", "JSON", shown(str(error)), "rewrite the file")
        return False, None
    for key in dict.fromkeys(repeated):
        found.error(name, place, shown(key), "each key once", "the same key again", "keep one")
    return True, value


def impostor(head: bytes) -> tuple[str, str] | None:
    """What lies in the place of a downloaded file that begins with ``head``, and the remedy; mostly ``None``."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer", "fetch the file itself with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", "download the file itself; the page may say why it was not given"
    return None


def read_settings(found: Findings, path: Path, absent: str = "") -> Record:
    """The object in a file of settings, such as a model's; one without fields if there is none (then it is logged).

    Args:
      found: where faults go.
      path: the file.
      absent: what to do where there is no such file; without it, the file may be absent.
    """
    name = str(path)
    nothing = Record(found, name, "", {})
    nothing.ok = False
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if absent:
            found.error(name, "", "", "a file of settings", "file not found", absent)
        return nothing
    except OSError as error:
        got = error.strerror or "an error of the system"
        found.error(name, "", "", "a file that can be read", got, "change its permissions or its name")
        return nothing
    if (other := impostor(raw[:1024])) is not None:
        found.error(name, "", "", "JSON", *other)
        return nothing
    text = decode(found, name, raw)
    good, value = (False, None) if text is None else parse(found, name, "", text)
    return Record(found, name, "", value) if good else nothing

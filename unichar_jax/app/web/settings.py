"""Bounds of the web demo, and the one place where a request's fields are judged."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unichar_jax.data import words
from unichar_jax.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """A request that is not carried out: an HTTP status, and words for the person."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Settings:
    """How the demo is served.

    Attributes:
      host: address to listen on; everything but loopback is reachable by others.
      port: 0 takes a free one.
      users: names and passwords; empty means no login.
      max_sessions: visitors whose conversations are kept.
      idle_minutes: a conversation is safe from newcomers for so long after its last use.
      max_waiting: requests that wait for all visitors together.
      max_waiting_each: requests that wait for one visitor.
      workers: requests worked on at a time (the engine batches those that fit).
      max_listeners: open pages of one visitor; the oldest is let go.
      max_text: characters of a message.
      max_upload: bytes of a picture that is sent.
      max_pixels: of a picture that is sent.
      max_kept: bytes of pictures kept for one visitor; the oldest go first.
      max_entries: turns, sheets and answers kept for one visitor; the oldest go first.
      max_pictures: pictures of one sheet.
      max_steps: of drawing.
      max_reply: tokens of a reply.
      steps: of drawing, unless the visitor says otherwise.
      guidance: strength of the text when drawing, likewise.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    users: tuple[tuple[str, str], ...] = ()
    max_sessions: int = 200
    idle_minutes: float = 30.0
    max_waiting: int = 200
    max_waiting_each: int = 4
    workers: int = 16
    max_listeners: int = 6
    max_text: int = 2000
    max_upload: int = 8 * 2**20
    max_pixels: int = 16_000_000
    max_kept: int = 24 * 2**20
    max_entries: int = 200
    max_pictures: int = 8
    max_steps: int = 100
    max_reply: int = 300
    steps: int = 30
    guidance: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"serve.port: expected 0 to 65535, got {self.port}.")
        for name, value in vars(self).items():
            if (name.startswith("max_") or name in ("workers", "steps")) and value < 1:
                raise UserError(f"serve.{name}: expected at least 1, got {value}.")
        if self.steps > self.max_steps:
            raise UserError(f"serve.steps: expected at most max_steps = {self.max_steps}, got {self.steps}.")

    @property
    def local(self) -> bool:
        """Only this machine can reach it."""
        return self.host in LOOPBACK

    def knows(self, name: str, password: str) -> bool:
        """Whether the login is right; takes as long for a wrong name as for a wrong password."""
        right = False
        for known, secret in self.users:
            same = hmac.compare_digest(known.encode(), name.encode())
            right |= hmac.compare_digest(secret.encode(), password.encode()) and same
        return right


def read_users(path: Path) -> tuple[tuple[str, str], ...]:
    """Names and passwords from a file of lines ``name:password``; empty lines and ``#`` lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the login file cannot be read ({error}).") from None
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        name, password = clean(name), clean(password)  # as what is typed into the page is
        if not colon or not name or len(password) < 8:
            raise UserError(
                f"{path}: line {number}: expected name:password, the password of at least 8 characters."
            )
        users.append((name, password))
    if not users:
        raise UserError(f"{path}: no login in it; expected lines name:password.")
    return tuple(users)


def clean(text: str) -> str:
    """A person's text as a model may read it, by the rules of ``data.words``.

    Raises:
      Refused: half a character (a lone surrogate), which no UTF-8 can say, or a picture's place.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(400, "The text holds half a character; please type it again.")
    text, remarks = words.gate(text)
    if any(remark.severity == "error" for remark in remarks):
        raise Refused(400, "<image> stands for a picture; please take it out, or send the picture.")
    return text.strip()


class Fields:
    """The fields of a request's JSON object; asking for one judges it."""

    def __init__(self, value: Any):
        if not isinstance(value, dict):
            raise Refused(400, "Expected a JSON object.")
        self._value = value

    def text(self, name: str, most: int) -> str:
        """A cleaned text of 1 to ``most`` characters."""
        value = self._value.get(name)
        if not isinstance(value, str):
            raise Refused(400, f"{name}: expected text.")
        if len(value) > most:
            raise Refused(413, f"{name}: at most {most} characters, please; this has {len(value)}.")
        if not (value := clean(value)):
            raise Refused(400, f"{name}: please write something.")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._value.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Refused(400, f"{name}: expected a number from {low:g} to {high:g}.")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.number(name, default, low, high)
        if value != int(value):
            raise Refused(400, f"{name}: expected a whole number.")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self._value.get(name, False)
        if not isinstance(value, bool):
            raise Refused(400, f"{name}: expected true or false.")
        return value

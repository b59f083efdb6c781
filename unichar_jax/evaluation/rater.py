"""Marks from 1 to 7 by a language model behind any OpenAI-compatible endpoint that the user names.

The rubric is text in this package (``rubrics/``); the answer must end in ``Score: n``. Marks are kept in a
file by everything they depend on, so none is paid for twice and an interrupted run goes on. Without an
endpoint there are no judged metrics, and results say so. This is the only place of the package that talks
to a service, and it sends the character's profile, the question and the reply, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any

from unichar_jax.errors import UserError

LOWEST, HIGHEST = 1, 7
RUBRICS = ("memorization", "personality")

_SCORE = re.compile(r"score\W*\s*(\d+)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint.

    Attributes:
      url: base address, e.g. ``http://localhost:8000/v1``; ``/chat/completions`` is added.
      model: name of the model there.
      key_variable: environment variable that holds the key, if one is needed.
      workers: requests at a time.
      timeout: seconds for one request.
      attempts: tries before giving up on a request.
    """

    url: str
    model: str
    key_variable: str = "UNICHAR_JUDGE_KEY"
    workers: int = 4
    timeout: float = 60.0
    attempts: int = 4

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise UserError(
                f"judge: '{self.url}': expected an address that begins with http:// or https://, such as"
                " http://localhost:8000/v1."
            )
        if not self.model:
            raise UserError("judge: the endpoint needs a model's name; give --judge-model NAME.")
        for name in ("workers", "timeout", "attempts"):
            if getattr(self, name) <= 0:
                raise UserError(f"judge.{name}: expected a positive number, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Reply:
    """What is marked: a character's reply to a question."""

    rubric: str
    name: str
    profile: str
    question: str
    reply: str

    def prompt(self) -> str:
        """The rubric filled in."""
        text = (
            resources.files("unichar_jax.evaluation")
            .joinpath(f"rubrics/{self.rubric}.md")
            .read_text(encoding="utf-8")
        )
        fields = {k: getattr(self, k) for k in ("name", "profile", "question", "reply")}
        return string.Template(text).substitute(fields)


class Rater:
    """Asks an endpoint, and remembers.

    Args:
      endpoint: who is asked.
      memory: a JSONL file of marks; made if it is not there.
      ask: sends a prompt and returns the answer (replaced in tests).
      sleep: waits between attempts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        memory: str | Path,
        ask: Callable[[Endpoint, str], str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.endpoint, self._memory = endpoint, Path(memory)
        self._ask, self._sleep, self._lock = ask or chat, sleep, Lock()
        self._known: dict[str, int | None] = {}
        if self._memory.is_file():
            for line in self._memory.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record["score"]
                except (ValueError, KeyError, TypeError):  # cut off when a process was killed
                    continue

    def rate(self, replies: Sequence[Reply]) -> list[int | None]:
        """A mark from 1 to 7 for every reply; None where the judge gave none.

        Raises:
          UserError: the endpoint cannot be reached or refuses; marks given until then are kept.
        """
        with ThreadPoolExecutor(self.endpoint.workers) as pool:
            return list(pool.map(self._rate, replies))

    def _rate(self, reply: Reply) -> int | None:
        prompt = reply.prompt()
        told = json.dumps([self.endpoint.url, self.endpoint.model, prompt])
        key = hashlib.sha256(told.encode()).hexdigest()[:24]
        if key not in self._known:
            answer = self._persist(prompt)
            self._remember(key, parse_score(answer), answer)
        return self._known[key]

    def _persist(self, prompt: str) -> str:
        """Asks until there is an answer; a busy or failing service gets time."""
        reason = ""
        for attempt in range(self.endpoint.attempts):
            try:
                return self._ask(self.endpoint, prompt)
            except urllib.error.HTTPError as error:
                reason, wait = f"HTTP {error.code} {error.reason}", error.code == 429 or error.code >= 500
            except (OSError, ValueError) as error:
                reason, wait = f"{type(error).__name__}: {error}", True
            if not wait:
                break
            if attempt + 1 < self.endpoint.attempts:
                self._sleep(2.0**attempt)
        raise UserError(
            f"judge {self.endpoint.model} at {self.endpoint.url}: {reason}. Check the address, the model's"
            f" name and the key in ${self.endpoint.key_variable}. Marks given so far are kept in"
            f" {self._memory}, and the same command goes on."
        )

    def _remember(self, key: str, score: int | None, answer: str) -> None:
        line = json.dumps({"key": key, "score": score, "answer": answer}, ensure_ascii=False)
        with self._lock:
            self._known[key] = score
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with self._memory.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def parse_score(answer: str) -> int | None:
    """The last ``Score: n`` of an answer; None if there is none from 1 to 7."""
    found = _SCORE.findall(answer)
    score = int(found[-1]) if found else None
    return score if score is not None and LOWEST <= score <= HIGHEST else None


def chat(endpoint: Endpoint, prompt: str) -> str:
    """One request to the endpoint, without sampling; returns the answer's text."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(endpoint.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        endpoint.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
        answer = json.loads(response.read())
    try:
        return str(answer["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"not a chat completion: {str(answer)[:200]}") from None

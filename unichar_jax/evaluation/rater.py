"""Marks from 1 to 7 by a language model behind any OpenAI-compatible endpoint that the user names.

The rubric is text in this package (``rubrics/``); the answer must end in ``Score: n``. Marks are kept in a
file by everything they depend on, so none is paid for twice and an interrupted run goes on. Without an
endpoint there are no judged metrics, and results say so. What is sent is the character's profile, the
question and the reply, nothing else.
"""

from __future__ import annotations

import json
import re
import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from unichar_jax.evaluation.endpoint import Endpoint, chat, persist
from unichar_jax.files import Journal, digest

LOWEST, HIGHEST = 1, 7
RUBRICS = ("memorization", "personality")

_SCORE = re.compile(r"score\W*\s*(\d+)\b", re.IGNORECASE)


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
        self.endpoint, self._memory = endpoint, Journal(memory, "score")
        self._ask, self._sleep = ask or chat, sleep

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
        key = digest(told)[:24]
        if key not in self._memory.known:
            answer = self._persist(prompt)
            self._memory.add(key, parse_score(answer), answer=answer)
        return self._memory.known[key]

    def _persist(self, prompt: str) -> str:
        kept = f"Marks given so far are kept in {self._memory.path}, and the same command goes on."
        return persist(self.endpoint, lambda: self._ask(self.endpoint, prompt), kept, self._sleep)


def parse_score(answer: str) -> int | None:
    """The last ``Score: n`` of an answer; None if there is none from 1 to 7."""
    found = _SCORE.findall(answer)
    score = int(found[-1]) if found else None
    return score if score is not None and LOWEST <= score <= HIGHEST else None

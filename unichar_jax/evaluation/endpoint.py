"""A language model behind an OpenAI-compatible endpoint that the user names: one request, and patience with it.

This is the only place of the package that talks to a service. What is sent is the prompt, the picture if one
is given, and a key from the environment if there is one; nothing is sent that the caller did not pass.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unichar_jax.data.images import open_image
from unichar_jax.errors import UserError

MAX_ANSWER = 8 * 2**20
"""Bytes of an answer that are read."""

LARGEST = 768
"""Longer side of a picture that is sent."""


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
                f"endpoint '{self.url}': expected an address that begins with http:// or https://, such as"
                " http://localhost:8000/v1."
            )
        if not self.model:
            raise UserError(f"endpoint {self.url}: it needs a model's name, as the service spells it.")
        for name in ("workers", "timeout", "attempts"):
            if getattr(self, name) <= 0:
                raise UserError(f"endpoint.{name}: expected a positive number, got {getattr(self, name)}.")


def chat(endpoint: Endpoint, prompt: str, image: Path | None = None) -> str:
    """One request to the endpoint, without sampling; returns the answer's text.

    Raises:
      OSError: the endpoint cannot be reached, refuses (``HTTPError``), or is too slow.
      ValueError: what it says is not a chat completion.
    """
    content: Any = prompt
    if image is not None:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": prompt},
        ]
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(endpoint.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        endpoint.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
        answer = json.loads(response.read(MAX_ANSWER))
    try:
        return str(answer["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"not a chat completion: {str(answer)[:200]}") from None


def _data_url(path: Path) -> str:
    image = open_image(path)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def persist(
    endpoint: Endpoint, ask: Callable[[], str], kept: str, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Asks until there is an answer; a busy, failing or silent service gets time.

    Args:
      endpoint: who is asked.
      ask: makes one attempt, as ``chat`` does.
      kept: what is said of the work so far when it gives up.
      sleep: waits between attempts.

    Raises:
      UserError: no answer.
    """
    reason = ""
    for attempt in range(endpoint.attempts):
        try:
            return ask()
        except urllib.error.HTTPError as error:
            reason, wait = f"HTTP {error.code} {error.reason}", error.code == 429 or error.code >= 500
        except (OSError, ValueError) as error:
            reason, wait = f"{type(error).__name__}: {error}", True
        if not wait:
            break
        if attempt + 1 < endpoint.attempts:
            sleep(2.0**attempt)
    raise UserError(
        f"{endpoint.model} at {endpoint.url}: {reason}. Check the address, the model's name and the key in"
        f" ${endpoint.key_variable}. {kept}"
    )

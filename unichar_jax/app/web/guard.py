"""What stands before the demo: who may ask at all, headers on every answer, and a brake on guessing."""

from __future__ import annotations

import time
from collections import deque
from urllib.parse import SplitResult, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unichar_jax.app.web.settings import LOOPBACK, Settings

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Turns away what no visitor's page would send, and adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if reason := self._objection(scope["method"], headers):
            await JSONResponse({"message": reason}, 403)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)

    def _objection(self, method: str, headers: dict[str, str]) -> str:
        host = headers.get("host", "")
        if self.settings.local and ("@" in host or _split(f"//{host}").hostname not in LOOPBACK):
            return "This server answers on this machine only."
        if method in ("GET", "HEAD"):
            return ""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") or (origin is not None and _split(origin).netloc != host):
            return "This request comes from another site."
        return ""


def _split(address: str) -> SplitResult:
    """The parts of an address; none if it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class Throttle:
    """Slows down guessing: so many wrong logins from one address within a time."""

    def __init__(self, most: int = 10, seconds: float = 300.0):
        self._most, self._seconds = most, seconds
        self._failures: dict[str, deque[float]] = {}

    def allows(self, address: str) -> bool:
        failures = self._failures.get(address, deque())
        while failures and time.monotonic() - failures[0] > self._seconds:
            failures.popleft()
        return len(failures) < self._most

    def failed(self, address: str) -> None:
        if len(self._failures) > 10_000:
            self._failures.clear()
        self._failures.setdefault(address, deque(maxlen=self._most)).append(time.monotonic())

"""What a visitor has said and seen: entries with versions, pictures, and who listens.

An entry is plain data that the page shows as it is. Every change gives it the session's next version;
``since`` tells what changed after a version, which is all that a page needs to come (back) up to date.
Safe to use from any thread; a listener is woken in its own event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from unichar_jax.app.web.pictures import Shown
from unichar_jax.app.web.settings import Refused, Settings
from unichar_jax.sampling.batching import Job
from unichar_jax.sampling.session import RolePlay

Entry = dict[str, Any]
ENDED = ("done", "failed", "stopped", "removed")


class Listener:
    """One open page: an alarm in an event loop."""

    def __init__(self) -> None:
        self._loop, self._alarm, self.gone = asyncio.get_running_loop(), asyncio.Event(), False

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._alarm.set)
        except RuntimeError:  # the loop is closed: the server has stopped
            pass

    async def wait(self, seconds: float) -> bool:
        """Whether something changed within the time."""
        try:
            await asyncio.wait_for(self._alarm.wait(), seconds)
        except TimeoutError:
            return False
        self._alarm.clear()
        return True


class Session:
    """One visitor's conversations. ``user`` is the login, empty where there is none."""

    def __init__(self, settings: Settings, user: str = ""):
        self.settings, self.user = settings, user
        self.token, self.epoch = secrets.token_urlsafe(32), secrets.token_hex(4)
        self.used = time.monotonic()
        self.plays: dict[str, RolePlay] = {}
        self.tasks: deque[Callable[[], None]] = deque()
        self.running = False
        self.closed = False
        self._job: Job | None = None
        self.lock = threading.RLock()
        self._version = 0
        self._number = 0
        self._entries: dict[str, Entry] = {}
        self._pictures: OrderedDict[str, Shown] = OrderedDict()
        self._listeners: list[Listener] = []

    # -- entries --------------------------------------------------------------------------------------------

    def add(self, kind: str, **fields: Any) -> str:
        """A new entry; returns its id."""
        with self.lock:
            self._number += 1
            key = str(self._number)
            self._entries[key] = {"id": key, "kind": kind, "status": "waiting", **fields}
            self.change(key)
            ended = [k for k, e in self._entries.items() if e["status"] in ENDED]
            for old in ended[: max(0, len(self._entries) - self.settings.max_entries)]:
                del self._entries[old]
        return key

    def change(self, key: str, **fields: Any) -> None:
        """Changes fields of an entry and wakes the listeners."""
        with self.lock:
            if key not in self._entries:
                return
            self._version += 1
            self._entries[key] = self._entries[key] | fields | {"version": self._version}
            for listener in self._listeners:
                listener.wake()

    def entry(self, key: str) -> Entry | None:
        with self.lock:
            return self._entries.get(key)

    def entries(self) -> list[Entry]:
        with self.lock:
            return list(self._entries.values())

    def since(self, version: int) -> tuple[list[Entry], int]:
        """Entries changed after ``version``, in the order they were made, and the version of now."""
        with self.lock:
            return [e for e in self._entries.values() if e["version"] > version], self._version

    @property
    def empty(self) -> bool:
        return not self._entries and not self._pictures

    @property
    def busy(self) -> bool:
        return self.running or bool(self.tasks)

    # -- work -----------------------------------------------------------------------------------------------

    def take(self, job: Job) -> None:
        """Notes the engine's job that is waited for now, for ``cancel``."""
        with self.lock:
            self._job = job

    def cancel(self) -> None:
        """Cancels that job: a drawing ends after the chunk of steps it is in."""
        with self.lock:
            if self._job is not None:
                self._job.cancel()

    # -- pictures -------------------------------------------------------------------------------------------

    def keep(self, picture: Shown) -> str:
        """Keeps a picture; returns its unguessable name."""
        name = secrets.token_urlsafe(12)
        with self.lock:
            self._pictures[name] = picture
            while len(self._pictures) > 1 and self._kept() > self.settings.max_kept:
                self._pictures.popitem(last=False)
        return name

    def _kept(self) -> int:
        return sum(len(p.data) for p in self._pictures.values())

    def picture(self, name: str) -> Shown | None:
        with self.lock:
            return self._pictures.get(name)

    # -- listeners ------------------------------------------------------------------------------------------

    def listen(self) -> Listener:
        """A new listener; when there are too many, the oldest is told that it is gone."""
        listener = Listener()
        with self.lock:
            self._listeners.append(listener)
            while len(self._listeners) > self.settings.max_listeners:
                old = self._listeners.pop(0)
                old.gone = True
                old.wake()
        return listener

    def leave(self, listener: Listener) -> None:
        with self.lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def close(self) -> None:
        """Lets every listener go and ends the work, that which waits too: nobody will see it."""
        with self.lock:
            self.closed = True
            self.cancel()
            for listener in self._listeners:
                listener.gone = True
                listener.wake()
            self._listeners.clear()


class Visitors:
    """All sessions, of which there are at most ``max_sessions``.

    Sessions without a word in them go first, then those unused for ``idle_minutes``, the longest first; while
    all are in use, newcomers are asked to come again later.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, token: str | None) -> Session | None:
        session = self._sessions.get(token or "")
        if session is not None:
            session.used = time.monotonic()
        return session

    def enter(self, user: str = "") -> Session:
        """A new session, or the one that the user already has.

        Raises:
          Refused: no room.
        """
        with self._lock:
            for session in self._sessions.values():
                if user and session.user == user:
                    return session
            if len(self._sessions) >= self.settings.max_sessions:
                self._make_room()
            session = Session(self.settings, user)
            self._sessions[session.token] = session
            return session

    def _make_room(self) -> None:
        now, idle = time.monotonic(), 60 * self.settings.idle_minutes
        free = [s for s in self._sessions.values() if not s.busy and (s.empty or now - s.used > idle)]
        if not free:
            raise Refused(503, "Everybody is in conversation now; please come again in a while.")
        self._drop(min(free, key=lambda s: (not s.empty, s.used)))

    def drop(self, session: Session) -> None:
        """Forgets a visitor."""
        with self._lock:
            self._drop(session)

    def _drop(self, session: Session) -> None:
        self._sessions.pop(session.token, None)
        session.close()

    def close(self) -> None:
        """Lets every listener of every visitor go."""
        with self._lock:
            for session in self._sessions.values():
                session.close()

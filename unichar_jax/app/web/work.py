"""What the demo does for a visitor: say something, draw a sheet, ask about a picture.

Each request becomes an entry at once and is worked on in the order of its session, by a bounded pool of
threads. A closed page changes nothing: the work goes on and waits to be seen. Errors that a person can mend
are told in the entry; others are logged, and the entry says no more than that.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

from unichar_jax.app.web.guests import Guest
from unichar_jax.app.web.pictures import Shown, shown
from unichar_jax.app.web.sessions import ENDED, Session
from unichar_jax.app.web.settings import Refused, Settings
from unichar_jax.errors import UserError
from unichar_jax.sampling.batching import Cancelled, Job
from unichar_jax.sampling.session import RolePlay
from unichar_jax.sampling.text import TextSettings

log = logging.getLogger(__name__)

TEMPERATURE = 0.7


class _Stopped(Exception):
    """The visitor wants no more of it."""


class Service:
    """Works for all visitors.

    Args:
      settings: bounds.
      guests: who can be met.
    """

    def __init__(self, settings: Settings, guests: Sequence[Guest]):
        self.settings, self.guests = settings, {guest.id: guest for guest in guests}
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="unichar-web")
        self._lock, self._waiting = Lock(), 0

    def guest(self, name: str) -> Guest:
        if name not in self.guests:
            raise Refused(404, "There is nobody of that name here.")
        return self.guests[name]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Compiles what the first visitor needs, so that nobody waits for it twice."""
        for guest in self.guests.values():
            play = RolePlay(guest.engine, guest.persona, model=guest.model)
            try:
                play.reply("Hello!", TextSettings(max_tokens=16, temperature=TEMPERATURE))
                play.picture(guest.drawing(self.settings.steps, self.settings.guidance))
            except Exception as error:  # a server that starts cold is still a server
                log.warning("%s: warming up failed: %s", guest.id, error)

    # -- requests -------------------------------------------------------------------------------------------

    def say(self, session: Session, guest: Guest, text: str, *, picture: bool, thinking: bool) -> str:
        """A turn of the conversation; returns its entry."""

        def work(key: str) -> None:
            with session.lock:
                new = RolePlay(guest.engine, guest.persona, model=guest.model)
                play = session.plays.setdefault(guest.id, new)
            told = ""

            def on_text(piece: str) -> None:
                nonlocal told
                told += piece
                _go_on(session, key)
                session.change(key, reply=told)

            _go_on(session, key, "writing")
            seed = secrets.randbelow(2**31)
            settings = TextSettings(max_tokens=self.settings.max_reply, temperature=TEMPERATURE)
            on_job = functools.partial(_take, session, key)
            turn = play.reply(text, settings, seed=seed, on_text=on_text, on_job=on_job)
            session.change(key, reply=turn.reply, seed=seed)
            if not picture:
                return

            _go_on(session, key, "planning" if thinking else "drawing")
            drawing = guest.drawing(self.settings.steps, self.settings.guidance)
            turn = play.picture(drawing, thinking=thinking, seed=seed % 100_000, on_job=on_job)
            play.turns[-1] = replace(turn, image=None)  # the session keeps it, smaller
            _go_on(session, key)
            if turn.plan is not None:
                session.change(key, thinking=turn.plan.thinking, instruction=turn.plan.instruction)
            name = session.keep(shown(turn.image))
            session.change(key, picture=name, picture_seed=turn.image_seed, steps=self.settings.steps)

        return self._submit(session, work, "turn", guest=guest.id, user=text, reply="")

    def draw(
        self,
        session: Session,
        guest: Guest,
        prompt: str,
        n: int,
        steps: int,
        guidance: float,
        seed: int | None,
    ) -> str:
        """A sheet of ``n`` drawings; returns its entry."""
        first = secrets.randbelow(100_000) if seed is None else seed

        def work(key: str) -> None:
            _go_on(session, key, "drawing")
            drawing = guest.drawing(steps, guidance)
            job = guest.engine.submit_images(prompt, n, drawing, seed=first, model=guest.model, wait=True)
            done: list[dict[str, object]] = []
            for image in _pieces(job, session, key):
                done.append({"name": session.keep(shown(image)), "seed": first + len(done)})
                session.change(key, pictures=list(done))

        how = {"steps": steps, "guidance": guidance, "seed": first}
        return self._submit(
            session, work, "sheet", guest=guest.id, prompt=prompt, pictures=[], wanted=n, **how
        )

    def ask(self, session: Session, guest: Guest, question: str, name: str, picture: Shown) -> str:
        """A question about a picture; returns its entry."""

        def work(key: str) -> None:
            _go_on(session, key, "writing")
            settings = TextSettings(max_tokens=self.settings.max_reply)
            job = guest.engine.submit_text(question, picture.image(), settings, model=guest.model, wait=True)
            told = ""
            for piece in _pieces(job, session, key):
                told += piece
                session.change(key, text=told)
            session.change(key, text=job.result())

        return self._submit(session, work, "answer", guest=guest.id, question=question, picture=name, text="")

    def stop(self, session: Session, key: str) -> None:
        """Ends an entry's work, a drawing between two of its chunks of steps; what is there stays."""
        with session.lock:
            entry = session.entry(key)
            if entry is None or entry["status"] in ENDED:
                return
            session.change(key, status="stopped")
            if entry["status"] != "waiting":  # a session's work runs one by one
                session.cancel()

    def forget(self, session: Session, guest: Guest) -> None:
        """Begins the conversation anew."""
        with session.lock:
            for entry in session.entries():
                if entry["kind"] == "turn" and entry["guest"] == guest.id:
                    session.change(entry["id"], status="removed", user="", reply="", picture=None)
            session.plays.pop(guest.id, None)

    # -- queueing -------------------------------------------------------------------------------------------

    def _submit(self, session: Session, work: Callable[[str], None], kind: str, **fields: object) -> str:
        with self._lock:
            if self._waiting >= self.settings.max_waiting:
                raise Refused(503, "Very many are waiting; please try again in a minute.")
            if len(session.tasks) >= self.settings.max_waiting_each:
                raise Refused(429, "Please wait for the answers to what you have asked already.")
            self._waiting += 1
            key = session.add(kind, **fields)
            session.tasks.append(lambda: self._run(session, key, work))
        self._next(session)
        return key

    def _next(self, session: Session) -> None:
        """Starts the session's oldest task unless one is running."""
        with self._lock:
            if session.running or not session.tasks:
                return
            session.running = True
            task = session.tasks.popleft()
        try:
            self._pool.submit(task)
        except RuntimeError:  # closed
            session.running = False

    def _run(self, session: Session, key: str, work: Callable[[str], None]) -> None:
        try:
            _go_on(session, key)
            work(key)
            session.change(key, status="done")
        except _Stopped:
            pass
        except Cancelled:
            with session.lock:  # by ``stop``, which has told; or the engine has closed
                if (entry := session.entry(key)) is not None and entry["status"] not in ENDED:
                    session.change(key, status="stopped")
        except UserError as error:
            session.change(key, status="failed", note=str(error))
        except Exception:
            log.exception("entry %s failed", key)
            session.change(key, status="failed", note="Something went wrong here; it is in the server's log.")
        finally:
            with self._lock:
                self._waiting -= 1
                session.running = False
            self._next(session)


def _go_on(session: Session, key: str, status: str | None = None) -> None:
    """Notes the next stage of an entry, unless the visitor has stopped it or is gone."""
    with session.lock:
        entry = session.entry(key)
        if session.closed or entry is None or entry["status"] in ENDED:
            raise _Stopped
        if status:
            session.change(key, status=status)


def _take(session: Session, key: str, job: Job) -> None:
    """Notes the job that an entry waits for, unless the visitor has stopped it just now."""
    session.take(job)
    try:
        _go_on(session, key)
    except _Stopped:
        job.cancel()
        raise


def _pieces(job: Job, session: Session, key: str):
    """A job's pieces while its entry is wanted."""
    _take(session, key, job)
    try:
        for piece in job:
            _go_on(session, key)
            yield piece
    except BaseException:
        job.cancel()
        raise

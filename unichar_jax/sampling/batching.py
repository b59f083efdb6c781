"""A bounded queue of jobs, and the one thread that runs those that fit together.

Jobs wait in order. The worker takes the oldest and everything after it with the same ``key``, up to a number
of rows, and hands them to ``run``. A job streams pieces while it runs, can be cancelled at any time, and
always ends: with a result, with the error of its batch, or cancelled. Nothing here knows of models.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from unichar_jax.errors import UserError


class EngineBusy(UserError):
    """The queue is full."""


class EngineClosed(UserError):
    """The engine does not take requests any more."""


class Cancelled(UserError):
    """The request was cancelled."""


class Job:
    """One request: its payload, its result to come, and the pieces that stream before it.

    Args:
      key: jobs with equal keys may run in one batch.
      payload: whatever ``run`` needs.
      rows: how many rows of a batch it takes.
    """

    def __init__(self, key: Hashable, payload: Any, rows: int = 1):
        self.key, self.payload, self.rows = key, payload, rows
        self._future: Future[Any] = Future()
        self._pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._withdraw: Callable[[Job], None] = lambda job: None

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result; raises the job's error, ``Cancelled``, or ``TimeoutError``."""
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Ends the job: at once if it waits, at its next pause if it runs; a result that is there stays."""
        self._cancelled.set()
        self._withdraw(self)

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        return self._future.done()

    def __iter__(self) -> Iterator[Any]:
        """Pieces as they come (for one reader); ends with the job and raises its error."""
        while (piece := self._pieces.get()) is not _END:
            yield piece
        self.result()

    # -- for the worker -------------------------------------------------------------------------------------

    def emit(self, piece: Any) -> None:
        self._pieces.put(piece)

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends the job, once; later calls do nothing."""
        if self.done:
            return
        if self.cancelled and error is None:
            error = Cancelled("the request was cancelled.")
        if error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error)
        self._pieces.put(_END)


_END = object()


class Batcher:
    """Runs jobs in batches on a thread of its own.

    Args:
      run: called with the jobs of a batch; finishes each of them.
      max_rows: most rows of a batch (a single job may have more).
      max_queue: most jobs that wait.
    """

    def __init__(self, run: Callable[[list[Job]], None], max_rows: int, max_queue: int):
        self._run, self._max_rows, self._max_queue = run, max_rows, max_queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="unichar-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, *, wait: bool = False) -> Job:
        """Queues a job. A full queue is an ``EngineBusy`` error, or with ``wait`` a pause."""
        with self._changed:
            while len(self._waiting) >= self._max_queue and not self._closed:
                if not wait:
                    raise EngineBusy(
                        f"{len(self._waiting)} requests are waiting, the queue holds no more; try again"
                        " later, or raise max_queue."
                    )
                self._changed.wait()
            if self._closed:
                raise EngineClosed("the engine is closed; make a new one.")
            job._withdraw = self._dropped
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Jobs submitted inside start when all are queued (or the queue is full): their batches do not depend on
        timing. Wait for results outside."""
        with self._changed:
            yield

    def close(self) -> None:
        """Cancels what waits, lets the running batch end, and stops the thread."""
        with self._changed:
            self._closed = True
            for job in list(self._waiting):
                job.cancel()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _dropped(self, job: Job) -> None:
        """A job was cancelled: one that waits makes room."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.finish()
                self._changed.notify_all()

    def _next(self) -> list[Job] | None:
        """The next batch; None when closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            batch: list[Job] = []
            rest: collections.deque[Job] = collections.deque()
            rows = 0
            for job in self._waiting:
                if job.cancelled:
                    job.finish()
                elif not batch or (job.key == batch[0].key and rows + job.rows <= self._max_rows):
                    batch.append(job)
                    rows += job.rows
                else:
                    rest.append(job)
            self._waiting = rest
            self._changed.notify_all()
        return batch

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            error: BaseException | None = None
            try:
                if batch:
                    self._run(batch)
            except BaseException as caught:  # the engine outlives any one batch
                error = caught
            for job in batch:
                job.finish(error=error or RuntimeError("the batch ended without this request's result"))
            del batch, error  # a waiting worker keeps no request alive


def gather(
    jobs: Iterable[Job], submitting: contextlib.AbstractContextManager[None] | None = None
) -> list[Any]:
    """Results in order. If one fails or the caller is interrupted, the others are cancelled.

    Args:
      jobs: submitted as they are iterated over.
      submitting: entered while they are, such as ``Batcher.together``.
    """
    submitted: list[Job] = []
    try:
        with submitting or contextlib.nullcontext():
            submitted.extend(jobs)
        return [job.result() for job in submitted]
    except BaseException:
        for job in submitted:
            job.cancel()
        raise

"""Batches put onto the devices ahead of time, by a thread, while the present one is trained on.

A position that is saved counts the batches handed out, never those kept ready.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from unichar_jax.data.loader import Loader
from unichar_jax.models.streams import Batch


class Prefetch:
    """A loader whose next batches are put onto the devices while the present one is trained on.

    Args:
      loader: gives host batches; not to be used otherwise meanwhile.
      put: host batch to device batch, such as ``functools.partial(put_batch, mesh=mesh)``.
      depth: how many batches are kept ready.
    """

    def __init__(self, loader: Loader, put: Callable[[Batch], Any], depth: int = 1):
        self._loader, self._put, self._depth = loader, put, depth
        self._taken = self._handed_out = 0
        self._stop: threading.Event | None = None
        self._ready: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Lock()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Any:
        if self._stop is None:
            self._begin()
        batch = self._ready.get()
        if isinstance(batch, BaseException):  # the loader failed; its error belongs here
            self._stop = None
            raise batch
        self._handed_out += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the batches handed out, not after those kept ready."""
        with self._lock:
            return self._loader.state(batches_back=self._taken - self._handed_out)

    def restore(self, state: dict[str, Any]) -> None:
        self.close()
        self._loader.restore(state)

    def close(self) -> None:
        """Stops preparing batches."""
        if self._stop is not None:
            self._stop.set()
            while self._thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._ready.get(timeout=0.05)
            self._loader.restore(self.state())
            self._taken = self._handed_out = 0
            self._stop = None

    def _begin(self) -> None:
        self._stop, self._ready = threading.Event(), queue.Queue(self._depth)
        self._thread = threading.Thread(target=self._work, args=(self._stop, self._ready), daemon=True)
        self._thread.start()

    def _work(self, stop: threading.Event, ready: queue.Queue[Any]) -> None:
        try:
            while not stop.is_set():
                with self._lock:
                    batch = next(self._loader)
                    self._taken += 1
                ready.put(self._put(batch))
        except BaseException as error:  # handed to the consumer
            ready.put(error)

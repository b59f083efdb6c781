"""Peak host memory of a piece of work, as the anonymous memory of this process (Linux's RssAnon).

Anonymous memory is what a machine must really have: pages of mapped files (a checkpoint being read) are
not counted, because the kernel can drop them. Where there is no ``/proc``, nothing is measured.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_PERIOD_S = 0.01


def anonymous_bytes() -> int | None:
    """RssAnon of this process in bytes; None where the system does not tell."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


class PeakMemory:
    """``with PeakMemory() as memory: ...`` then ``memory.peak``: bytes above what was in use at the start."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._start = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        start = anonymous_bytes()
        if start is not None:
            self._start, self.peak = start, 0
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.peak = max(self.peak or 0, (anonymous_bytes() or 0) - self._start)

"""The queue: who runs with whom, what ends a job, and that nothing stops the worker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from unichar_jax.sampling.batching import Batcher, Cancelled, EngineBusy, EngineClosed, Job


class Recorder:
    """Runs batches when told to, and remembers what ran together."""

    def __init__(self, open_gate: bool = True):
        self.batches: list[list[object]] = []
        self.started, self.gate = threading.Event(), threading.Event()
        if open_gate:
            self.gate.set()

    def __call__(self, jobs: list[Job]) -> None:
        self.started.set()
        self.gate.wait(10)
        self.batches.append([job.payload for job in jobs])
        for job in jobs:
            if job.payload == "bad":
                raise ValueError("no such thing")
            if job.payload != "forgotten":
                job.finish(f"done {job.payload}")


def waiting_behind(run: Recorder, batcher: Batcher) -> Job:
    """A job that occupies the worker until the gate opens."""
    first = batcher.submit(Job("first", 0))
    assert run.started.wait(10)
    return first


def test_jobs_with_one_key_run_together_in_order_and_within_bounds() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, max_rows=3, max_queue=20)
    jobs = [waiting_behind(run, batcher)]
    for key, payload, rows in (("a", 1, 1), ("b", 2, 1), ("a", 3, 2), ("a", 4, 1), ("b", 5, 9)):
        jobs.append(batcher.submit(Job(key, payload, rows)))
    run.gate.set()
    assert [job.result(10) for job in jobs] == [f"done {i}" for i in range(6)]
    batcher.close()
    assert run.batches == [[0], [1, 3], [2], [4], [5]]


def test_jobs_submitted_together_share_a_batch_whatever_the_timing() -> None:
    run = Recorder()
    batcher = Batcher(run, max_rows=4, max_queue=3)
    with batcher.together():
        jobs = []
        for i in range(2):
            jobs.append(batcher.submit(Job("a", i)))
            assert not run.started.wait(0.05)  # the idle worker does not begin with the first alone
    assert [job.result(10) for job in jobs] == ["done 0", "done 1"]
    with batcher.together():  # more than the queue holds: it runs what there is
        jobs = [batcher.submit(Job("a", i), wait=True) for i in range(10)]
    assert [job.result(10) for job in jobs] == [f"done {i}" for i in range(10)]
    batcher.close()
    assert run.batches[0] == [0, 1]


def test_a_full_queue_says_so_or_waits() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, max_rows=1, max_queue=2)
    waiting_behind(run, batcher)
    for i in range(2):
        batcher.submit(Job("a", i))
    with pytest.raises(EngineBusy, match="2 requests are waiting"):
        batcher.submit(Job("a", 3))
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(batcher.submit, Job("a", 4), wait=True)
        run.gate.set()
        assert patient.result(10).result(10) == "done 4"
    batcher.close()


def test_an_error_ends_its_batch_and_nothing_else() -> None:
    run = Recorder()
    batcher = Batcher(run, max_rows=4, max_queue=20)
    with pytest.raises(ValueError, match="no such thing"):
        batcher.submit(Job("a", "bad")).result(10)
    with pytest.raises(RuntimeError, match="without this request's result"):
        batcher.submit(Job("a", "forgotten")).result(10)
    assert batcher.submit(Job("a", "good")).result(10) == "done good"
    batcher.close()


def test_a_cancelled_job_never_runs() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, max_rows=4, max_queue=20)
    waiting_behind(run, batcher)
    unwanted, wanted = batcher.submit(Job("a", 1)), batcher.submit(Job("a", 2))
    unwanted.cancel()
    run.gate.set()
    assert wanted.result(10) == "done 2"
    with pytest.raises(Cancelled):
        unwanted.result(10)
    batcher.close()
    assert run.batches == [[0], [2]]


def test_a_cancelled_job_that_waits_ends_at_once_and_makes_room() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, max_rows=4, max_queue=1)
    waiting_behind(run, batcher)
    unwanted = batcher.submit(Job("a", 1))
    unwanted.cancel()
    with pytest.raises(Cancelled):
        unwanted.result(10)  # while the first still runs
    wanted = batcher.submit(Job("a", 2))
    run.gate.set()
    assert wanted.result(10) == "done 2"
    batcher.close()


def test_pieces_stream_and_the_error_comes_last() -> None:
    def run(jobs: list[Job]) -> None:
        for job in jobs:
            job.emit("a")
            job.emit("b")
            if job.payload:
                raise ValueError("then this")
            job.finish("ab")

    batcher = Batcher(run, max_rows=1, max_queue=5)
    assert list(batcher.submit(Job("k", 0))) == ["a", "b"]
    pieces = []
    with pytest.raises(ValueError, match="then this"):
        pieces.extend(batcher.submit(Job("k", 1)))
    batcher.close()


def test_closing_cancels_what_waits_and_refuses_what_comes() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, max_rows=1, max_queue=5)
    first, second = waiting_behind(run, batcher), batcher.submit(Job("a", 1))
    threading.Timer(0.1, run.gate.set).start()
    batcher.close()
    assert first.result(0) == "done 0"
    with pytest.raises(Cancelled):
        second.result(0)
    with pytest.raises(EngineClosed):
        batcher.submit(Job("a", 2))
    batcher.close()


def test_fifty_callers_at_once_all_get_their_own_result() -> None:
    run = Recorder()
    batcher = Batcher(run, max_rows=8, max_queue=4)
    with ThreadPoolExecutor(50) as pool:
        jobs = list(pool.map(lambda i: batcher.submit(Job(i % 3, i), wait=True), range(50)))
    assert [job.result(10) for job in jobs] == [f"done {i}" for i in range(50)]
    batcher.close()
    assert sorted(x for batch in run.batches for x in batch) == list(range(50))
    assert all(len({x % 3 for x in batch}) == 1 for batch in run.batches)

"""Worker processes that may die: a crash, a lack of memory or a time-out is a row like any other."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.coverage.jobs import Job, Row, suite

_START_SECONDS = 300.0
"""How long a fresh worker may take to import its libraries."""


class _Worker:
    """A process that measures one job at a time, as its parent sees it."""

    def __init__(self, memory_gb: float, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, memory_gb, str(log)), daemon=True)
        self.process.start()
        other.close()
        self.job: Job | None = None
        self.started = time.monotonic()

    def give(self, job: Job) -> None:
        self.job = job
        self.started = time.monotonic()
        self.pipe.send(job)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def measure_all(
    jobs: Iterable[Job], workers: int, timeout: float, memory_gb: float, logs: Path
) -> Iterator[tuple[Job, Row]]:
    """Measure every job, in the order in which they get done."""
    waiting = deque(jobs)
    logs.mkdir(parents=True, exist_ok=True)
    count = min(workers, len(waiting))
    slots: dict[int, _Worker] = {}
    ready: set[int] = set()
    try:
        while waiting or any(worker.job for worker in slots.values()):
            for slot in range(count):
                if slot not in slots and waiting:
                    slots[slot] = _Worker(memory_gb, logs / f"worker-{slot}.log")
                if slot in ready and waiting:
                    ready.discard(slot)
                    slots[slot].give(waiting.popleft())
            wait([worker.pipe for worker in slots.values()], timeout=1.0)
            for slot, worker in list(slots.items()):
                limit = timeout if worker.job else _START_SECONDS
                message = _receive(worker, limit, idle=slot in ready)
                if message is None:
                    continue
                if worker.job is not None:
                    yield worker.job, message
                    worker.job = None
                elif message:
                    raise RuntimeError(f"a worker did not start: {message['error']}. See {logs}.")
                ready.add(slot)
                if message.get("status") in ("timeout", "crash"):
                    worker.stop()
                    ready.discard(slot)
                    del slots[slot]
    finally:
        for worker in slots.values():
            worker.stop()


def _receive(worker: _Worker, limit: float, idle: bool) -> Row | None:
    """What a worker has to say: a row, {} when it is ready for its first job, or `None`, nothing yet."""
    if idle:
        return None
    seconds = time.monotonic() - worker.started
    try:
        if worker.pipe.poll():
            return worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(10)
        return {
            "status": "crash",
            "error": f"the process ended with code {worker.process.exitcode}",
            "seconds": seconds,
        }
    if seconds > limit:
        return {"status": "timeout", "error": f"not done after {limit:.0f} s", "seconds": seconds}
    return None


def _serve(pipe: Connection, memory_gb: float, log: str) -> None:
    """The life of a worker: jobs in, rows out, and whatever libraries print goes to a file."""
    with open(log, "ab", buffering=0) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    faulthandler.enable()
    if memory_gb:
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    torch.set_num_threads(1)
    pipe.send({})
    while True:
        job = pipe.recv()
        pipe.send(_measure(job))


def _measure(job: Job) -> Row:
    start = time.perf_counter()
    try:
        row: dict[str, Any] = suite(job.suite).measure(job)
    except MemoryError as error:
        row = {"status": "crash", "error": f"out of memory: {error}"}
    except Exception as error:
        memory = "allocate memory" in str(error)
        row = {"status": "crash" if memory else "build", "error": f"{type(error).__name__}: {error}"}
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row

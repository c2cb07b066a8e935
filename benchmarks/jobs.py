"""Work in a pool of processes, where what fails loses nothing else."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from types import TracebackType
from typing import Any, Protocol


class Job(Protocol):
    """A job's text says which it is, where it failed."""

    @property
    def size(self) -> float: ...


class JobFailedError(Exception):
    """A job failed in another process; the message says which, and why."""


class Attempt:
    """A block whose failure is printed, and kept as a line, `why`. Ctrl-C passes."""

    why = ""

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        told = str(error)
        if not isinstance(error, JobFailedError):  # that one's was printed where it failed
            told = f"{type(error).__name__}: {told}"
            traceback.print_exception(error)
        self.why = told.partition("\n")[0][:200]
        return True


def _work(work: Callable[[Any], Any], job: Job) -> bytes:
    """By value: of a tensor that another process is handed as it is, a file stays open there."""
    found = None
    with Attempt() as attempt:
        found = work(job)
    return pickle.dumps((found, attempt.why))


def _answer(job: Job, future: Future[bytes]) -> Any:
    found, why = pickle.loads(future.result())
    if why:
        raise JobFailedError(f"{job}: {why}")
    return found


def begun(work: Callable[[Any], Any], jobs: Sequence[Job], pool: Executor | None) -> dict[Any, Callable[[], Any]]:
    """What waits for each job's result. In a pool all are on their way, the largest first; else each runs as asked for.

    Raises, where it is asked for:
        JobFailedError: the job failed in a process of the pool.
    """
    if pool is None:
        return {job: partial(work, job) for job in jobs}
    futures = {job: pool.submit(_work, work, job) for job in sorted(jobs, key=lambda job: -job.size)}
    return {job: partial(_answer, job, futures[job]) for job in jobs}

"""Arms one after the other, the next one's packages imported while one trains.

A process of an arm imports for 15 to 30 seconds what it then uses for 20: of a table of many arms that is half of the
time. An arm that waits holds no model, and a context on the card at most; what it waits is in its laps ("waited"), and
in no other figure. Its imports take one core for those seconds: not for a machine of two.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from aligntune.compare.arm import ArmSpec
from aligntune.compare.protocol import end, in_a_fresh_process, start
from aligntune.compare.settings import Arm
from aligntune.errors import ConfigError

Job = tuple[ArmSpec, Arm]


class Ahead:
    """A runner of arms, each in a process of its own, that knows which come next.

    Args:
        limit: seconds after which an arm is ended, counted from when it no longer waits.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self._jobs: list[Job] = []
        self._waiting: tuple[ArmSpec, subprocess.Popen[bytes]] | None = None

    def plan(self, jobs: Iterable[Job]) -> None:
        """What will be run, in order; the first begins to import."""
        self._jobs = list(jobs)
        self._start_next()

    def __call__(self, spec: ArmSpec, arm: Arm) -> dict[str, Any]:
        process = None
        if self._waiting is not None and self._waiting[0].folder == spec.folder:
            (spec, process), self._waiting = self._waiting, None
        folders = [job[0].folder for job in self._jobs]
        if spec.folder in folders:
            del self._jobs[: folders.index(spec.folder) + 1]
        self._start_next()
        return in_a_fresh_process(spec, arm, limit=self.limit, process=process)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        """End the arm that waits, and expect none."""
        self._jobs = []
        if self._waiting is not None:
            end(self._waiting[1])
            self._waiting = None

    def _start_next(self) -> None:
        if self._waiting is not None:
            if self._jobs and self._jobs[0][0].folder == self._waiting[0].folder:
                return
            end(self._waiting[1])
        self._waiting = None
        if self._jobs:
            spec, arm = self._jobs[0]
            spec = replace(spec, waits=os.getpid())
            with contextlib.suppress(ConfigError):  # what cannot be started says so when its turn comes
                self._waiting = (spec, start(spec, arm))

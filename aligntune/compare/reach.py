"""Whether an arm can be started at all: asked before anything runs, not when the arms before it have trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from aligntune.compare.peers import PEERS
from aligntune.compare.settings import Arm
from aligntune.errors import BackendUnavailableError, ConfigError

NEEDED = ("torch", "transformers", "trl")
_ASK = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"


def require(arm: Arm) -> None:
    """Raise unless the arm's interpreter is there and has its packages, and its setup is a name.

    Raises:
        ConfigError: no such interpreter, one that is no Python, or a setup that is not module:function.
        BackendUnavailableError: a package is not there; names the command that brings it.
    """
    _require_setup(arm)
    names = (*NEEDED, *([PEERS[arm.peer].package] if arm.peer is not None else []))
    if arm.python is None or Path(arm.python).is_dir():
        folder = [arm.python] if arm.python is not None else []
        missing = [name for name in names if PathFinder.find_spec(name, folder) is None and find_spec(name) is None]
    else:
        missing = _asked(arm, names)
    if missing:
        where = "this interpreter" if arm.python is None else repr(arm.python)
        bring = PEERS[arm.peer].install if arm.peer is not None and missing == [names[-1]] else (
            f"pip install {' '.join(missing)}")
        raise BackendUnavailableError(f"arm {arm.label!r}: {', '.join(missing)} not found by {where}; {bring}")


def _require_setup(arm: Arm) -> None:
    if arm.setup is None:
        return
    module, _, name = arm.setup.partition(":")
    if not module or not name:
        raise ConfigError(f"setup: {arm.setup!r} is not module:function")
    # An arm's process has the folder that it is started in on its path, whatever this one has.
    top = module.partition(".")[0]
    if (arm.python is None and top not in sys.modules and PathFinder.find_spec(top, [str(Path.cwd())]) is None
            and find_spec(top) is None):
        raise ConfigError(f"setup: {arm.setup!r}: there is no module {module!r} here or on the path")


def _asked(arm: Arm, names: tuple[str, ...]) -> list[str]:
    """Which of the packages the arm's own interpreter does not find."""
    assert arm.python is not None
    if shutil.which(arm.python) is None:
        raise ConfigError(f"arm {arm.label!r}: {arm.python!r} cannot be started: no such program, and no folder")
    try:
        done = subprocess.run([arm.python, "-c", _ASK, *names], capture_output=True, text=True, timeout=60, check=False,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"arm {arm.label!r}: {arm.python!r} cannot be started: {error}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"arm {arm.label!r}: {arm.python!r} is no Python that works: it said {said}")
    return done.stdout.split()

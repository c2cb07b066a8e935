"""Makes what the factories say visible where nobody has set up logging, and quiets what libraries say to each other."""

from __future__ import annotations

import logging
import os
import sys
import warnings

NAME = "aligntune"
_RENAMED = r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"


class _Stderr(logging.Handler):
    """Writes to the stderr of the moment, as long as the root logger has no handler: then the message goes there."""

    def emit(self, record: logging.LogRecord) -> None:
        # Other processes have the same to say; what is wrong in one of them alone is still said.
        elsewhere = os.environ.get("RANK", "0") != "0" and record.levelno < logging.WARNING
        if elsewhere or logging.getLogger().handlers:
            return
        mark = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(mark + record.getMessage(), file=sys.stderr, flush=True)


def show() -> None:
    """Show the package's INFO messages on stderr, unless the program has set up logging for itself.

    Handlers of the root logger or of "aligntune", and a level that "aligntune" has, are left alone.
    `logging.getLogger("aligntune").setLevel(logging.WARNING)` turns the messages off.
    """
    logger = logging.getLogger(NAME)
    if logger.hasHandlers():
        return
    logger.addHandler(_Stderr())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Keep to themselves the lines of libraries that nobody who trains can act upon; each by its own name.

    A logger's level, a variable and warning options that the program has set are left alone.
    """
    # It asks for an optional package of kernels for 4-bit inference on a CPU, which training does not use.
    asking = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if asking.level == logging.NOTSET:
        asking.setLevel(logging.ERROR)
    # The profiler that traces a step writes that it starts and that it stops, above its errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # TRL and peft read names that transformers has renamed.
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)

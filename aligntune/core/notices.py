"""Makes what the factories say visible where nobody has set up logging."""

from __future__ import annotations

import logging
import os
import sys

NAME = "aligntune"


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

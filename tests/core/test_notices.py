"""What the factories say is seen where nobody set up logging, and stays in their hands where somebody did."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import pytest

from aligntune.core import notices


@contextlib.contextmanager
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The package's logger and the root logger as a new process has them (pytest adds handlers for each test)."""
    logger, root = logging.getLogger(notices.NAME), logging.getLogger()
    level = logger.level
    with monkeypatch.context() as patch:
        patch.setattr(root, "handlers", [])
        patch.setattr(logger, "handlers", [])
        patch.delenv("RANK", raising=False)
        logger.setLevel(logging.NOTSET)
        yield logger
    logger.setLevel(level)


Capture = pytest.CaptureFixture[str]


def test_an_info_message_is_seen_once_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with new_process(monkeypatch) as fresh:
        fresh.info("unseen")
        notices.show()
        notices.show()
        fresh.info("data: %d rows", 3)
        fresh.warning("look out")
        assert capsys.readouterr() == ("", "data: 3 rows\nwarning: look out\n")


def test_logging_that_is_set_up_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with new_process(monkeypatch) as fresh:
        logging.getLogger().addHandler(logging.NullHandler())
        notices.show()
        assert fresh.handlers == [] and fresh.level == logging.NOTSET
        fresh.info("not shown")
        assert capsys.readouterr().err == ""


def test_a_root_handler_that_comes_later_takes_over(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with new_process(monkeypatch) as fresh:
        notices.show()
        logging.getLogger().addHandler(logging.NullHandler())
        fresh.info("once, by whoever the root logger has")
        assert capsys.readouterr().err == ""


def test_a_level_of_the_users_stays(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with new_process(monkeypatch) as fresh:
        fresh.setLevel(logging.WARNING)
        notices.show()
        fresh.info("not wanted")
        assert capsys.readouterr().err == "" and fresh.level == logging.WARNING


def test_the_first_process_talks_for_all_but_each_may_warn(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with new_process(monkeypatch) as fresh:
        monkeypatch.setenv("RANK", "1")
        notices.show()
        fresh.info("the same everywhere")
        fresh.warning("here alone")
        assert capsys.readouterr().err == "warning: here alone\n"


def test_lines_of_libraries_that_nobody_can_act_upon_stay_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    monkeypatch.setattr(asking, "level", logging.NOTSET)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        notices.quiet_libraries()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing_enable` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
    assert [str(item.message) for item in caught] == ["`something_else` is deprecated"]
    assert asking.level == logging.ERROR and os.environ["KINETO_LOG_LEVEL"] == "6"


def test_what_the_program_set_for_libraries_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "0")
    monkeypatch.setattr(asking, "level", logging.DEBUG)
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        before = list(warnings.filters)
        notices.quiet_libraries()
        assert warnings.filters == before
    assert asking.level == logging.DEBUG and os.environ["KINETO_LOG_LEVEL"] == "0"

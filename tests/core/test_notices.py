"""What the factories say is seen where nobody set up logging, and stays in their hands where somebody did."""

from __future__ import annotations

import contextlib
import logging
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

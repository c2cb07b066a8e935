"""The pre-flight alone, for `aligntune preview`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aligntune.data.pipeline import prepare
from aligntune.data.report import DataReport
from aligntune.data.request import DataRequest
from aligntune.errors import DataError


def preview(
    request: DataRequest, tokenizer: Any, check: Callable[[Any, str], None] = lambda rows, where: None
) -> DataReport:
    """The report of `prepare` on the same request; what training would raise is listed.

    Args:
        check: called with prepared rows and whose they are, in words; its DataError is listed too.

    Raises:
        DataError: nothing can be trained: the data cannot be read, is of another kind, or every row is bad.
    """
    data = prepare(replace(request, on_bad_row="skip"), tokenizer)
    for where, rows, part in data.parts():
        stops = []
        if part.bad and request.on_bad_row == "raise":
            stops.append(f"{len(part.bad):,} bad rows and on_bad_row is 'raise'")
        try:
            check(rows, where)
        except DataError as error:
            stops += str(error).splitlines()
        part.warnings[:0] = [f"training would stop here: {one}" for one in stops]
    return data.report

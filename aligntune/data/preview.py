"""The pre-flight alone, for `aligntune preview`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aligntune.data.pipeline import prepare
from aligntune.data.report import DataReport
from aligntune.data.request import DataRequest


def preview(request: DataRequest, tokenizer: Any) -> DataReport:
    """The report of `prepare` on the same request; bad rows are listed where training would raise.

    Raises:
        DataError: nothing can be trained: the data cannot be read, is of another kind, or every row is bad.
    """
    report = prepare(replace(request, on_bad_row="skip"), tokenizer).report
    for part in (report, report.eval):
        if part is not None and part.bad and request.on_bad_row == "raise":
            part.warnings.insert(0, f"training would stop here: {len(part.bad):,} bad rows and on_bad_row is 'raise'")
    return report

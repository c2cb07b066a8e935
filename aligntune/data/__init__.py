"""What the model will see: load, recognise, convert, template, mask, check.

`prepare(request, tokenizer)` is the one entry point: it turns any dataset that aligntune reads into the columns that
an algorithm trains on, and reports every row that it could not use. `aligntune.data.preview.preview` makes the report
alone. Names are imported on first use; importing this package imports neither datasets nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntune.data.pipeline import PreparedData, prepare
    from aligntune.data.report import DataReport
    from aligntune.data.request import DataRequest
    from aligntune.data.rows import BadRow
    from aligntune.data.shapes import with_kl_completions

_TARGETS = {
    "BadRow": "aligntune.data.rows",
    "DataReport": "aligntune.data.report",
    "DataRequest": "aligntune.data.request",
    "PreparedData": "aligntune.data.pipeline",
    "prepare": "aligntune.data.pipeline",
    "with_kl_completions": "aligntune.data.shapes",
}

__all__ = ["BadRow", "DataReport", "DataRequest", "PreparedData", "prepare", "with_kl_completions"]


def __getattr__(name: str) -> Any:
    if name not in _TARGETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_TARGETS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

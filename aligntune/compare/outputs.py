"""The files of a report: report.json, report.md, report.html, report.png and steps.csv, each whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aligntune.compare.html import html
from aligntune.compare.markdown import markdown
from aligntune.compare.png import draw
from aligntune.core.run_dir import jsonable, write_atomic

if TYPE_CHECKING:
    from aligntune.compare.report import Report

JSON, MARKDOWN, HTML, PNG, CSV = "report.json", "report.md", "report.html", "report.png", "steps.csv"


def write(report: Report) -> None:
    """Write every output into the report's folder."""
    data = jsonable(report.data)
    write_atomic(report.folder / JSON, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    write_atomic(report.folder / MARKDOWN, markdown(data))
    write_atomic(report.folder / HTML, html(data))
    write_atomic(report.folder / CSV, steps_csv(data))
    draw(data, report.folder / PNG)


def steps_csv(data: Mapping[str, Any]) -> str:
    """One line a step of every run."""
    columns = ("step", "loss", "grad_norm", "seconds", "tokens", "slots", "learnt", "documents", "traced",
               "learning_rate")
    extra = sorted({name for runs in data["curves"].values() for run in runs for name in run["metrics"]})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", "repeat", "seed", *columns, *extra])
    for role, runs in data["curves"].items():
        for run in runs:
            for index in range(len(run["step"])):
                writer.writerow([role, run["repeat"], run["seed"], *(run[name][index] for name in columns),
                                 *(run["metrics"].get(name, [None] * len(run["step"]))[index] for name in extra)])
    return file.getvalue()

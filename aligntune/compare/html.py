"""report.html: one file that opens offline, in the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from aligntune.compare import svg
from aligntune.compare.tables import Table, tables

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2430; --soft: #5a6675; --rule: #d9dee5; --card: #f5f7fa;
  --a: #1f66b0; --b: #c04f12; --y: #7b8794; --good: #1a7f3c; --bad: #b3261e;
  --p0: #3b6fb6; --p1: #d0782e; --p2: #4f9a63; --p3: #a3559e;
  --p4: #8a8f98; --p5: #c9a227; --p6: #3c9aa8; --p7: #b25a5a; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --text: #e4e9f0; --soft: #9aa7b6; --rule: #2f3843;
  --card: #1b212a; --a: #6db0f5; --b: #f79a5f; --y: #8e9aa8; --good: #5ecb80; --bad: #ff8a80;
  --p0: #6fa3e8; --p1: #e89a57; --p2: #74c38a; --p3: #c98bc5;
  --p4: #8a93a0; --p5: #dcc15a; --p6: #6cc3d0; --p7: #d98a8a; } }
body { margin: 0 auto; padding: 24px 20px 60px; max-width: 1080px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 22px; margin: 0 0 10px; } h2 { font-size: 17px; margin: 34px 0 8px; }
.verdict { font-size: 17px; padding: 12px 16px; background: var(--card); border-left: 5px solid var(--y);
  border-radius: 4px; overflow-wrap: anywhere; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.bad-text { color: var(--bad); font-weight: 600; } .good-text { color: var(--good); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; } th { color: var(--soft); font-weight: 600; } td { font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 22px; }
figure { margin: 0; min-width: 0; } figure h3 { font-size: 14px; margin: 0 0 2px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--text); font-size: 12px; }
svg .tick { fill: var(--soft); font-size: 11.5px; } svg .label { font-size: 12.5px; }
svg .grid { stroke: var(--rule); stroke-width: 0.7; } svg .zero { stroke: var(--soft); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .curve.a { stroke-width: 5; } svg .band { opacity: 0.22; }
.curve.a, .mark.a { stroke: var(--a); } .curve.b, .mark.b { stroke: var(--b); } .curve.y { stroke: var(--y);
  stroke-dasharray: 5 4; }
.band.a, .fill.a { fill: var(--a); } .band.b, .fill.b { fill: var(--b); } .band.y, .fill.y { fill: var(--y); }
svg .fill { opacity: 0.75; } svg .mark { stroke-width: 2; }
.key i { display: inline-block; width: 18px; height: 3px; margin: 0 5px 3px 12px; vertical-align: middle; }
.key i.a { background: var(--a); } .key i.b { background: var(--b); }
.key i.y { background: repeating-linear-gradient(90deg, var(--y) 0 5px, transparent 5px 8px); }
""" + "".join(f".part.p{n} {{ fill: var(--p{n}); }}\n" for n in range(8))


def html(report: Mapping[str, Any]) -> str:
    """The report as one page without any other file."""
    a, b = report["arms"]["a"]["label"], report["arms"]["b"]["label"]
    state = "bad" if not report["valid"] or report["parity"]["passed"] is False else (
        "good" if report["parity"]["passed"] else "")
    parts = [f"<h1>{escape(b)} against {escape(a)}</h1>",
             f'<p class="verdict {state}">{escape(report["verdict"])}</p>',
             f'<p class="soft">{escape(report["algorithm"])}, {escape(report["recipe"])}, '
             f'{escape(report["created"])}</p>', _said(report),
             f'<p class="key soft"><i class="a"></i>a: {escape(a)}<i class="b"></i>b: {escape(b)}'
             f'<i class="y"></i>yardstick</p>',
             f'<div class="charts">{"".join(_charts(report))}</div>']
    parts += [_table(table) for table in tables(report)]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(b)} against {escape(a)}</title><style>{_CSS}</style></head>\n"
            f"<body>{''.join(parts)}</body></html>\n")


def _said(report: Mapping[str, Any]) -> str:
    lines = [(one["severity"] != "said", one["text"]) for one in report["findings"]]
    lines += [(not one["holds"], f"assertion {one['text']}: {'holds' if one['holds'] else 'FAILED'} ({one['found']})")
              for one in report["assertions"]]
    if report["baseline"]:
        lines += [(True, f"worse than the baseline: {text}") for text in report["baseline"]["worse"]]
        lines.append((False, f"baseline of {report['baseline']['created']}: {report['baseline']['verdict']}"))
    items = "".join(f'<li{" class=" + chr(34) + "bad-text" + chr(34) if bad else ""}>{escape(text)}</li>'
                    for bad, text in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns) if any(table.columns) else ""
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
    return f'<h2>{escape(table.title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>{note}'


def _cell(text: str) -> str:
    css = {"FAIL": ' class="bad-text"', "pass": ' class="good-text"'}.get(text, "")
    return f"<td{css}>{escape(text)}</td>"


def _charts(report: Mapping[str, Any]) -> list[str]:
    curves = report["curves"]
    found = [_figure("Loss", "Mean over the repeats; the band is their range.", svg.line_chart(
        [_mean_line(curves[role], "loss", role) for role in ("a", "b")], x_label="optimizer step", y_label="loss",
        title="loss by step"))]
    found.append(_residuals(report))
    for name in report["parity"]["bands"]:
        band = report["parity"]["bands"][name]
        lines = [_line(np.array(band[role], dtype=float), role, band["steps"]) for role in ("a", "b")]
        found.append(_figure(name, "Mean over the seeds; the band is their range.", svg.line_chart(
            lines, x_label="optimizer step", y_label=name, title=f"{name} by step")))
    if report["speed"]:
        rows = [(f"{role}: {report['arms'][role]['label']}", [1e3 * s for s in report["speed"][role]["seconds"]], role)
                for role in ("a", "b")]
        found.append(_figure("Step times after the warm-up", "Lines at p10, p50 and p90; beyond p99 in the last bin.",
                             svg.histogram(rows, x_label="ms a step", title="distribution of step times")))
        phases = [(f"{role}: {report['arms'][role]['label']}",
                   [(name, 1e3 * value) for name, value in report["speed"][role]["phases"].items()])
                  for role in ("a", "b")]
        found.append(_figure("A step by phase", "", svg.stacked_bars(phases, unit="ms", title="time by phase")))
    found.append(_memory(report))
    return [figure for figure in found if figure]


def _memory(report: Mapping[str, Any]) -> str:
    rows = []
    for role in ("a", "b"):
        one = report["memory"][role]
        parts = [(name, (one[name] or 0) / 2**20) for name in ("weights", "reference", "gradients", "optimizer", "head",
                                                             "activations") if one[name]]
        rows.append((f"{role}: {report['arms'][role]['label']}", parts))
    peak = report["memory"]["a"]["peak_is"]
    note = "Peak of the GPU's memory by what holds it." if peak.startswith("GPU") else (
        "What tensors hold; activations are not known without a card.")
    return _figure("Memory", note, svg.stacked_bars(rows, unit="MiB", title="memory by category"))


def _residuals(report: Mapping[str, Any]) -> str:
    losses = report["parity"]["losses"]
    if not losses:
        return ""
    pairs = np.array(losses["residuals"])
    steps = list(range(1, pairs.shape[1] + 1))
    lines = [svg.Line("b - a", steps, pairs.mean(0).tolist(), "b", (pairs.min(0).tolist(), pairs.max(0).tolist()))]
    if losses["yardstick"]:
        lines.append(svg.Line("yardstick: sdpa and eager attention", steps, losses["yardstick"], "y"))
    return _figure("Difference of the losses, b - a", "Dashed: two implementations known to be equal.", svg.line_chart(
        lines, x_label="optimizer step", y_label="difference", zero=True, title="loss differences by step"))


def _mean_line(runs: Sequence[Mapping[str, Any]], name: str, role: str) -> svg.Line:
    count = min(len(run[name]) for run in runs)
    return _line(np.array([run[name][:count] for run in runs], dtype=float), role)


def _line(values: np.ndarray, role: str, steps: Sequence[int] | None = None) -> svg.Line:
    steps = steps or list(range(1, values.shape[1] + 1))
    return svg.Line(role, steps, values.mean(0).tolist(), role, (values.min(0).tolist(), values.max(0).tolist()))


def _figure(title: str, note: str, chart: str) -> str:
    if not chart:
        return ""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{caption}{chart}</figure>"

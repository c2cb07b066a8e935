"""The report as tables of words: what the terminal, report.md and report.html all show."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A titled table; `note` stands under it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def tables(report: Report) -> list[Table]:
    """Every table of the report that has a row, in reading order."""
    makers: list[Callable[[Report], Table | None]] = [
        _speed, _phases, _memory, _checks, _gradients, _worst, _final, _bands, _cost, _arms, _protocol, _machine,
    ]
    found = [maker(report) for maker in makers]
    return [table for table in found if table is not None and table.rows]


def first_tables(report: Report) -> list[Table]:
    """Those that a terminal shows."""
    shown = ("Speed", "Memory", "Parity")
    return [table for table in tables(report) if table.title in shown]


def _labels(report: Report) -> tuple[str, str]:
    a, b = report["arms"]["a"]["label"], report["arms"]["b"]["label"]
    return (f"a: {a}", f"b: {b}")


def _speed(report: Report) -> Table | None:
    speed = report["speed"]
    if speed is None:
        return None
    a, b = speed["a"], speed["b"]
    rows = [_row("real tokens/s", a["tokens_per_second"], b["tokens_per_second"], "{:,.0f}"),
            _row("slots/s, padding included", a["slots_per_second"], b["slots_per_second"], "{:,.0f}")]
    for name in ("p10", "p50", "p90"):
        rows.append(_row(f"step {name}, ms", a["step_seconds"][name], b["step_seconds"][name], "{:,.1f}", 1e3))
    rows.append(_row("MFU", a["mfu"], b["mfu"], "{:.1%}"))
    rows.append(_row("TFLOP/s of the model", a["tflops"], b["tflops"], "{:,.3g}"))
    rows.append(_row("cold start, s", _least(a["cold_start"]), _least(b["cold_start"]), "{:,.1f}"))
    rows.append(_row("compilation and warm-up, s", _least(a["warmup_extra"]), _least(b["warmup_extra"]), "{:,.2f}"))
    for name, what in (("rehearsal_seconds", "the pass before the first step, s"),
                       ("capture_seconds", "graph capture, s")):
        rows.append(_row(what, _least(a.get(name, ())), _least(b.get(name, ())), "{:,.2f}"))
    if speed["target_loss"] is not None:
        row = _row(f"time to loss {speed['target_loss']:.4g}, s", _least(a["time_to_target"]),
                   _least(b["time_to_target"]), "{:,.2f}")
        rows.append((row[0], *(cell or "not reached" for cell in row[1:3]), row[3]))
    ratio, low, high = speed["ratio"]
    noise = ("not measured, one repeat" if speed["noise"] is None else
             f"{speed['noise']:.1%}, what repeats of one arm differ by and the interval of one pair together")
    said = "a significant difference" if speed["significant"] else "no significant difference"
    return Table("Speed", ("", *_labels(report), "b / a"), [row for row in rows if row[1] or row[2]],
                 f"Throughput b / a, paired by step: {ratio:.3f}, 95 % interval [{low:.3f}, {high:.3f}]: {said}. "
                 f"Noise: {noise}. Over {speed['steps']} steps a run, from step {speed['first_step']} on.")


def _row(name: str, a: float | None, b: float | None, form: str, factor: float = 1.0) -> tuple[str, ...]:
    def shown(value: float | None) -> str:
        return "" if value is None else form.format(value * factor)

    ratio = f"{b / a:.2f}" if a and b is not None else ""
    return (name, shown(a), shown(b), ratio)


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _phases(report: Report) -> Table | None:
    speed = report["speed"]
    if speed is None:
        return None
    a, b = speed["a"]["phases"], speed["b"]["phases"]
    names = list(dict.fromkeys([*a, *b]))
    return Table("Time of a step by phase, ms", ("phase", *_labels(report), "b / a"),
                 [_row(name, a.get(name), b.get(name), "{:,.2f}", 1e3) for name in names],
                 "On the device's clock where there is a card. 'prepare' is what stands between sampling and the loss "
                 "(old and reference log-probs), 'other' what is in no phase.")


def _memory(report: Report) -> Table | None:
    a, b = report["memory"]["a"], report["memory"]["b"]
    names = {"peak_allocated": "peak allocated", "peak_reserved": "peak reserved", "cpu_rss_bytes": "peak RSS",
             "weights": "weights", "reference": "reference model", "gradients": "gradients",
             "optimizer": "optimizer state", "activations": "activations and the rest, at the peak",
             "head": "loss head, above its inputs"}
    rows = [_row(text, a[name], b[name], "{:,.3f}", 2**-30) for name, text in names.items()]
    fits = report["memory"]["fits"]
    if fits:
        rows.append(_row(f"largest {fits['what']}, rows full", fits["a"]["value"], fits["b"]["value"], "{:,.0f}"))
    note = "" if a["peak_allocated"] is not None else "No card: peaks are those of the process, activations not known."
    for role in ("a", "b") if fits else ():
        if fits[role]["ended"] is not None:
            note += f" The search for the largest {fits['what']} of {role} ended early: {fits[role]['ended']}."
    return Table("Memory", ("GiB", *_labels(report), "b / a"), [row for row in rows if row[1] or row[2]], note.strip())


def _checks(report: Report) -> Table | None:
    parity = report["parity"]
    rows = [(one["name"], one["text"], _small(one["value"]), _small(one["limit"]), "pass" if one["passed"] else "FAIL")
            for one in parity["checks"]]
    losses = parity["losses"]
    note = "Limits are what equal implementations (TRL with eager and with sdpa attention) differ by, with room."
    if losses:
        _, low, high = losses["drift"]
        note += (f" Mean signed difference of the losses {losses['drift'][0]:.2e}, 95 % interval [{low:.2e}, "
                 f"{high:.2e}]; largest difference between repeats of a: {_small(losses['a_to_a']) or 'not known'}, "
                 f"between the yardstick's two: {_small(losses['yardstick_max']) or 'not run'}.")
    return Table("Parity", ("check", "what", "found", "limit", ""), rows, note)


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _gradients(report: Report) -> Table | None:
    rows = [(str(one["step"]), str(one["parameters"]), _small(one["error_a"]), _small(one["error_b"]),
             _small(one["error_y1"]), _small(one["error_y2"]), _cosine(one["cosine"]), str(one["zero_in_both"]))
            for one in report["parity"]["gradients"]]
    return Table("Gradients before clipping, as one vector", (
        "step", "parameters", "a to oracle", "b to oracle", "yardstick 1", "yardstick 2", "cosine a, b", "0 in both"),
        rows, "Relative distances to an fp32 run with eager attention.")


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.9f}"


def _worst(report: Report) -> Table | None:
    rows = [(str(one["step"]), one["name"], _cosine(one["cosine"]), _small(one["relative"]),
             "" if one["norm_ratio"] is None else f"{one['norm_ratio']:.6f}", _small(one["error_a"]),
             _small(one["error_b"])) for one in report["parity"]["worst"]]
    return Table("The parameters where b's gradient is furthest from a's", (
        "step", "parameter", "cosine", "relative error", "norm b / a", "a to oracle", "b to oracle"), rows)


def _final(report: Report) -> Table | None:
    final = report["parity"]["final"]
    if not final:
        return None
    rows = [("KL(a || b) per token, nats", _small(final["kl"])), ("largest at one position", _small(final["kl_max"])),
            ("KL of the yardstick's two", _small(final["yardstick"])), ("same likeliest token", f"{final['top1']:.2%}"),
            ("positions", str(final["positions"]))]
    return Table("Final models on the probe rows", ("", ""), [row for row in rows if row[1]])


def _bands(report: Report) -> Table | None:
    rows = []
    for name, band in report["parity"]["bands"].items():
        a, b = (_mean_of_all(band[label]) for label in ("a", "b"))
        value, low, high = band["difference"]
        spread = band["spread_over_seeds"]
        rows.append((name, f"{a:.4g}", f"{b:.4g}", f"{value:.2e} [{low:.2e}, {high:.2e}]", _small(spread)))
    return Table("Rollouts, means over the run", ("", *_labels(report), "b - a", "spread of a over seeds"), rows)


def _mean_of_all(curves: Sequence[Sequence[float]]) -> float:
    values = [value for curve in curves for value in curve]
    return sum(values) / len(values)


def _cost(report: Report) -> Table | None:
    cost = report["cost"]
    a, b = cost["a"], cost["b"]
    rows = [_row("price of a million tokens", a["per_million_tokens"], b["per_million_tokens"], "{:,.4f}"),
            _row("price of a run", a["per_run"], b["per_run"], "{:,.4f}"),
            _row("training, s a run", a["run_seconds"], b["run_seconds"], "{:,.1f}"),
            _row("energy, J a token", a["joules_per_token"], b["joules_per_token"], "{:,.4f}")]
    price = cost["price_per_hour"]
    return Table("Cost", ("", *_labels(report), "b / a"), [row for row in rows if row[1] or row[2]],
                 f"At {price:g} an hour." if price is not None else "")


def _arms(report: Report) -> Table | None:
    a, b = report["arms"]["a"], report["arms"]["b"]
    rows = [("what ran", _ran(a), _ran(b)), ("precision", a["precision"], b["precision"]),
            ("config", a["config_digest"], b["config_digest"]),
            ("card", _card(a), _card(b)), ("Python", a["python_version"], b["python_version"]),
            ("commit", _commit(a), _commit(b))]
    for name in sorted(a["packages"].keys() | b["packages"].keys()):
        rows.append((name, a["packages"].get(name, ""), b["packages"].get(name, "")))
    return Table("Arms", ("", *_labels(report)), rows)


def _ran(arm: Mapping[str, Any]) -> str:
    paper = arm["attestation"]
    text = f"{paper['backend']}: {paper['trainer'].rpartition('.')[2]}, {paper['model']}"
    step = paper.get("step")
    if step:
        text += f"; kernels of one step: {', '.join(f'{name} x{count}' for name, count in step['kernels'].items())}"
    trace = arm.get("trace")
    if trace:
        what = "kernels" if trace["device"] == "cuda" else "operators"
        counts: Counter[str] = Counter()
        for name, count in trace["names"].items():
            counts[kernel_name(name)] += count
        names = [f"{name} x{count}" for name, count in counts.most_common(8)]
        text += f"; most frequent of {len(counts)} {what} in step {trace['step']}: {', '.join(names)}"
    return text + (f"; {paper['layout']}" if "layout" in paper else "")


def kernel_name(name: str) -> str:
    """A kernel's name without its template: torch's elementwise ones are told by what they do to each element."""
    if "<" in name:
        inner = re.findall(r"\w+_kernel_cuda\b", name) or re.findall(r"\w+Functor\b", name)[-1:]
        if inner:
            return str(inner[0])
    return re.split(r"[<(]", name.removeprefix("void "))[0].rpartition("::")[2].strip() or name


def _command(words: Sequence[str]) -> str:
    """As it can be typed again: a module that python -m ran has its file's path for a name."""
    first = words[0].replace("\\", "/") if words else ""
    name = ["aligntune"] if first.endswith(("aligntune/__main__.py", "/aligntune")) else list(words[:1])
    return shlex.join([*name, *words[1:]])


def _card(arm: Mapping[str, Any]) -> str:
    return ", ".join(card["name"] for card in arm["gpus"]) or f"none ({arm['cpus']} CPUs)"


def _commit(arm: Mapping[str, Any]) -> str:
    git = arm["git"]
    if not git:
        return ""
    return git["commit"][:12] + (" with uncommitted changes" if git["uncommitted_changes"] else "")


def _protocol(report: Report) -> Table | None:
    one = report["protocol"]
    rows = [("order of the runs", one["order"]), ("steps a run", str(one["steps"])),
            ("warm-up steps left out", str(one["warmup"])), ("seeds", ", ".join(map(str, one["seeds"]))),
            ("oracle", one["oracle"]), ("yardstick", ", ".join(one["yardstick"]) or "not asked for"),
            ("recipe", report["recipe"]), ("command", _command(report["command"]))]
    return Table("Protocol", ("", ""), rows)


def _machine(report: Report) -> Table | None:
    rows = []
    for role in ("a", "b"):
        for number, one in enumerate(report["machine"][role], 1):
            if not one:
                continue
            clocks, heat = one.get("sm_clock_mhz"), one.get("temperature_c")
            rows.append((
                f"{role}{number}", one["card"] or "no card",
                f"{clocks['min']:.0f}-{clocks['max']:.0f}" if clocks else "", f"{heat['max']:.0f}" if heat else "",
                ", ".join(one.get("throttled") or []),
                "yes" if one.get("shared") else "" if one["card"] is None else "no",
                f"{one['load_before'][0]:.1f} -> {one['load_after'][0]:.1f} of {one['cpus']}"))
    return Table("Machine", ("run", "card", "SM clock, MHz", "hottest, C", "throttled", "shared", "load average"), rows)

"""Tables and plot of docs and README, from the committed results: `python -m benchmarks.tables` makes them anew.

A page holds `<!-- results: NAME -->` and `<!-- end -->`; what stands between is generated. A name without its results
file says so in the page, and no figure stands there.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aligntune.compare.html import html
from aligntune.compare.tables import tables as compared
from benchmarks import plot
from benchmarks.agreement import MOST, verdict
from benchmarks.parity_parts import OPTIONS, PARTS, TRUE_LOSS
from benchmarks.sft import roofline

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md")
COMPARE_PAGE = ROOT / "docs" / "assets" / "compare" / "unsloth.html"
MARKED = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

Report = dict[str, Any]


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table; every column but the first is set to the right."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (head, ruler, *rows))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def source(report: Report) -> str:
    """The line under a table: where its figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    ceiling = f"; copy {report['copy_bytes_per_s'] / 1e12:.2f} TB/s" if "copy_bytes_per_s" in report else ""
    return f"{report['device']}{ceiling}; {versions}; commit {report['commit'][:12]}; `{report['command']}`\n"


def _us(ms: float) -> str:
    return f"{1e3 * ms:,.0f}" if ms >= 0.01 else f"{1e3 * ms:.1f}"


def elementwise(report: Report) -> str:
    """RMSNorm, GLU, RoPE: microseconds, and the share of the card's copy bandwidth that forward + backward reach."""
    names = ["eager", "torch.compile", "liger", "ours"]
    by_row: dict[str, dict[str, Any]] = {}
    for entry in report["rows"]:
        by_row.setdefault(entry["row"], {})[entry["implementation"]] = entry

    def cells(found: dict[str, Any], name: str) -> str:
        if name not in found:
            return "-"
        return f"{_us(found[name]['forward_ms'])} / {_us(found[name]['forward_backward_ms'])}"

    rows = [
        [row, *(cells(found, name) for name in names), f"{found['ours']['forward_of_ceiling']:.0%}",
         f"{found['ours']['both_of_ceiling']:.0%}"]
        for row, found in by_row.items()
    ]  # fmt: skip
    head = ["forward / with backward, us", *names, "ours, forward: of ceiling", "with backward"]
    return markdown(head, rows) + "\n" + source(report)


def head_table(report: Report) -> str:
    """The loss head: forward + backward over its bare products, and the peak above inputs and weight."""
    rows = []
    for entry in report["rows"]:
        if entry["op"] != "head":
            continue
        shape = f"T {entry['tokens']}, H {entry['hidden']}, V {entry['vocab']}, "
        shape += "weight trained" if entry["trained"] else "weight frozen"
        if "failed" in entry:
            rows.append([shape, entry["method"], entry["failed"], "-", "-"])
        else:
            over, peak = entry.get("over_gemms"), entry.get("peak_gib")
            rows.append([shape, entry["method"], f"{entry['ms']:.1f}", "-" if over is None else f"{1 + over:.2f}x",
                         "-" if peak is None else f"{peak:.2f}"])  # fmt: skip
    return markdown(["head", "method", "ms", "over bare products", "peak GiB"], rows) + "\n" + source(report)


def logits_table(report: Report) -> str:
    """Cross-entropy on logits that exist: time and share of one read and one write of them."""
    rows = [[f"{entry['tokens']} x {entry['vocab']}", entry["method"], f"{entry['ms']:.2f}",
             f"{entry['of_bound']:.0%}", f"{entry['peak_gib']:.2f}"]
            for entry in report["rows"] if entry["op"] == "cross_entropy"]  # fmt: skip
    return markdown(["logits", "method", "ms", "of bound", "peak GiB"], rows) + "\n" + source(report)


def bounded(label: Callable[[dict[str, Any]], str]) -> Callable[[Report], str]:
    """Ops measured against a bound in bytes and products."""

    def table(report: Report) -> str:
        rows = []
        for entry in report["rows"]:
            if "failed" in entry:
                rows.append([label(entry), entry["method"], entry["failed"], "-", "-"])
            else:
                share = f"{entry['of_bound']:.0%}" if "of_bound" in entry else "-"
                peak = f"{entry['peak_gib']:.2f}" if "peak_gib" in entry else "-"
                rows.append([label(entry), entry["method"], _us(entry["ms"]), share, peak])
        return markdown(["shape", "method", "us", "of bound", "peak GiB"], rows) + "\n" + source(report)

    return table


def _lora_label(entry: dict[str, Any]) -> str:
    options = [text for text, on in (("dropout", entry.get("dropout")), ("NF4", entry.get("nf4"))) if on]
    return ", ".join((entry["shape"], f"r {entry['rank']}", *options))


def recipe(report: Report) -> str:
    """A builtin recipe: what was held out, scored before, between and after, a row a seed; the time it takes."""
    names = list(report["rows"][0]["scores"])
    rows = [
        [str(row["seed"]), *(f"{row['scores'][name]:.3f}" for name in names),
         ", ".join(f"{name} {count}" for name, count in row["steps"].items()), _seconds(row)]
        for row in report["rows"]
    ]  # fmt: skip
    probe = report["rows"][0].get("probe")
    about = f"{probe}, greedy answers. " if probe else "Held-out rows. "
    return markdown(["seed", *names, "steps", "seconds (cores)"], rows) + "\n" + about + source(report)


def _seconds(row: dict[str, Any]) -> str:
    """Of one thread what it computed, whatever else ran; threads that wait count, so of more the wall's."""
    if "threads" not in row:
        return "-"
    return f"{row['cpu_s' if row['threads'] == 1 else 'wall_s']:.0f} ({row['threads']})"


def sft(report: Report) -> str:
    """Whole SFT steps: real tokens a second, the step, the peak, the first step, the losses.

    Where arms ran in repeats, how many times the first arm's speed is that of each, with its interval.
    """
    rows, versions = [], {}
    reference, compared = report["rows"][0]["arm"], any("over_this" in entry for entry in report["rows"])
    for entry in report["rows"]:
        if "why" in entry:
            rows.append([entry["arm"], entry["why"], *["-"] * (5 + compared)])
            continue
        ratio = [_interval(entry["over_this"]) if "over_this" in entry else "-"] if compared else []
        rows.append([
            entry["arm"], f"{entry['tokens_per_s']:,.0f}", *ratio, f"{entry['step_ms']:.0f}",
            f"{entry['peak_gib']:.2f}", f"{entry['first_step_s']:.0f}", f"{entry['loss_first']:.3f}",
            f"{entry['loss_last']:.3f}",
        ])  # fmt: skip
        versions = _with_versions(versions, entry)
    head = ["arm", "tokens/s", *([f"{reference} over it"] if compared else []), "step ms", "peak GiB", "first step s",
            "first loss" if compared else "first logged loss", "last"]  # fmt: skip
    return markdown(head, rows) + "\n" + source(report | {"versions": versions})


def sft_arms(*arms: str) -> Callable[[Report], str]:
    """`sft` of some arms alone; the command under it names all that ran."""

    def made(report: Report) -> str:
        return sft(report | {"rows": [entry for entry in report["rows"] if entry["arm"] in arms]})

    return made


def sft_earlier(*reports: Report) -> str:
    """Rows that were measured twice: fast and the quickest arm of unsloth, then (first half of the reports) and now.

    And fast as it is now over the quickest that any machine has made of unsloth.
    """
    half, rows = len(reports) // 2, []
    for pair in zip(reports[:half], reports[half:], strict=True):
        fast, peer = ([max(one["tokens_per_s"] for one in report["rows"] if "why" not in one and named(one["arm"]))
                       for report in pair] for named in ("fast".__eq__, lambda arm: arm.startswith("unsloth")))
        rows.append([SFT_ROWS[pair[0]["rows"][0]["row"]], *(f"{rate:,.0f}" for rate in (*fast, *peer)),
                     f"{fast[0] / peer[0]:.2f}x", f"{fast[1] / max(peer):.2f}x"])
    head = ["tokens/s", "fast, earlier", "now", "unsloth at its best, earlier", "now", "fast then over it",
            "fast now over its best of both"]
    return markdown(head, rows)


def roofline_table(*reports: Report) -> str:
    """Where a step of fast goes: milliseconds of each part of a traced step, and how many are above the least it takes.

    An arm of a results file is a column.
    """
    columns = dict(zip(roofline.ROWS, reports, strict=True))
    found = {column: roofline.parts(column[1], report) for column, report in columns.items()}
    parts = list(dict.fromkeys(part for rows in found.values() for part, _, _ in rows[:-1]))
    cells = {name: {part: f"{ms:.1f}" if bound is None else f"{ms:.1f} / {bound:.1f} ({ms - bound:+.1f})"
                    for part, ms, bound in rows} for name, rows in found.items()}  # fmt: skip
    whole = [rows[-1][0] for rows in found.values()][:1]
    rows = [[part, *(cells[name].get(part, "-") for name in found)] for part in [*parts, *whole]]
    entries = [roofline.shown(arm, report) for (_, arm), report in columns.items()]
    sizes = [(entry.get("traced") or {}).get("tokens") for entry in entries]
    tokens = [f"{mean:,.0f}" if traced in (None, round(mean)) else f"{traced:,} ({mean:,.0f})"
              for traced, mean in zip(sizes, (entry["tokens_per_step"] for entry in entries), strict=True)]
    head = (SFT_ROWS[row] if arm == "fast" else f"the same, {arm}" for row, arm in found)
    return markdown(["ms / least ms (above it)", *head],
                    [*rows, ["a step, mean of those measured", *(f"{entry['step_ms']:.1f}" for entry in entries)],
                     ["tokens of the traced step (mean)", *tokens]])


def shared_prompts(report: Report) -> str:
    """Rows whole and with the prompts that they share computed once, by the share of tokens that it spares."""
    rows = [[f"{one['group']} rows a prompt, {one['prompt']} of {one['length']} tokens", f"{one['saved']:.1%}",
             f"{one['whole_ms']:.1f}", f"{one['shared_ms']:.1f}", f"{one['whole_ms'] / one['shared_ms']:.2f}x"]
            for one in report["rows"]]
    head = ["forward and backward of 8,192 tokens", "tokens spared", "whole rows, ms", "once, ms", "quicker"]
    return markdown(head, rows) + "\n" + source(report)


def longest(report: Report) -> str:
    """The longest row that an arm trains: its tokens, the peak on the card, seconds a step."""
    rows, versions = [], {}
    for entry in report["rows"]:
        best = next(probe for probe in entry["probes"] if probe["tokens"] == entry["longest"])
        rows.append([
            entry["arm"], f"{entry['longest']:,}", f"{entry['peak_gib']:.1f} of {entry['card_gib']:.1f}",
            f"{entry['step_s']:.0f}", f"{entry['longest'] / entry['step_s']:,.0f}", f"{best['losses'][0]:.3f}",
        ])  # fmt: skip
        versions = _with_versions(versions, {"arm": entry["arm"], "versions": best.get("versions", {})})
    head = ["arm", "tokens", "peak GiB", "seconds a step", "tokens/s", "loss"]
    return markdown(head, rows) + "\n" + source(report | {"versions": versions})


def _with_versions(versions: dict[str, str], entry: dict[str, Any]) -> dict[str, str]:
    """`versions` with those of an arm, under the arm's name where it has another one."""
    apart = {f"{entry['arm']}'s {name}": version for name, version in entry["versions"].items()
             if versions.get(name, version) != version}  # fmt: skip
    return entry["versions"] | apart | versions


def rl(report: Report) -> str:
    """Whole steps of a preference or online method; rollouts within them; how far losses are from the first arm's."""
    reference, rows, versions = report["rows"][0]["arm"], [], {}
    online = any("rollout" in entry for entry in report["rows"])
    last = ["rollout s", "rollout tokens/s", "log-probs apart"] if online else ["losses apart"]
    head = ["arm", "step ms (p10, p90)", f"{reference} over it", "tokens/s", *last, "peak GiB", "reserved",
            "first step s"]  # fmt: skip
    for entry in report["rows"]:
        if "why" in entry:
            rows.append([entry["arm"], entry["why"], *["-"] * (len(head) - 2)])
            continue
        step, over = entry["step_ms"], entry.get("over_this")
        if online:
            rollout = entry["rollout"]
            apart = rollout["logged"].get("log_prob_difference_mean")
            found = [f"{rollout['seconds']:.2f}", f"{rollout['tokens_per_s']:,.0f}",
                     "-" if apart is None else f"{apart:.1e}"]  # fmt: skip
        else:
            found = [f"{entry['max_dloss']:.1e}" if "max_dloss" in entry else "-" if over is None else entry["data"]]
        rows.append([
            entry["arm"], f"{step['p50']:,.0f} ({step['p10']:,.0f}, {step['p90']:,.0f})",
            "-" if over is None else _interval(over), f"{entry['tokens_per_s']:,.0f}", *found,
            f"{entry['peak_gib']:.2f}", f"{entry['reserved_gib']:.2f}", f"{entry['first_step_s']:.0f}",
        ])  # fmt: skip
        versions = _with_versions(versions, entry)
    return markdown(head, rows) + "\n" + source(report | {"versions": versions})


def rollout(report: Report) -> str:
    """Tokens a second of the engine and of transformers' generate; the engine's decode step beside its bound.

    What a release costs stands in rows that were measured since it is.
    """
    rows, released = [], any("after_release_s" in entry for entry in report["rows"])
    for entry in report["rows"]:
        ours = "step_ms" in entry
        rows.append([
            entry["what"], f"{entry['tokens_per_second']:,.0f}", f"{entry['step_ms']:.2f}" if ours else "-",
            f"{entry['bound_ms']:.2f} ({entry['of_bound']:.0%})" if ours else "-",
            f"{entry['log_prob_difference_mean']:.3f}" if ours else "-",
            f"{entry['cache_gib']:.2f}" if ours else "-", f"{entry['peak_gib']:.1f}" if ours else "-",
            *([f"{entry['seconds']:.2f}", f"{entry['after_release_s']:.2f}", f"{entry['graphs_gib']:.2f}"]
              if "after_release_s" in entry else ["-"] * 3 if released else []),
        ])  # fmt: skip
    kind = {"nf4": "NF4, LoRA", "fp8": "e4m3, LoRA", "full": "fp32 under autocast, all weights"}
    head = [f"Llama 1B shape, {kind.get(report['rows'][0].get('base'), 'bf16, LoRA')}", "tokens/s", "step ms",
            "bound ms", "log-probs apart", "cache GiB", "peak GiB",
            *(["a call, s", "after a release, s", "graphs GiB"] if released else [])]
    return markdown(head, rows) + "\n" + source(
        report | {"versions": {"torch": report["torch"]}, "copy_bytes_per_s": report["ceilings"]["bytes_per_s"]})


def parity(report: Report) -> str:
    """Every difference between the backends beside what it is held against and its bound; what was not measured yet."""
    rows = _differences(report)
    there = [entry["part"] for entry in report["rows"]]
    failed = [entry["part"] for entry in report["rows"] if "failed" in entry]
    for what in ("fp32", "bf16", "two trl runs in fp32"):
        if missing := [name for name in PARTS if name not in failed
                       and not any(part.startswith(f"{name}, {what}") for part in there)]:
            rows.append([f"{', '.join(missing)}: {what}", "not measured yet", *["-"] * 7])
    apart = "; ".join(f"{name} {', '.join(f'{1e3 * one:.1f}' for one in found)}"
                      for name, found in report.get("apart", {}).items())
    by_seed = f"Its rms distances from fp32 in thousandths, seed by seed: {apart}. " if apart else ""
    fell = "The learning run's loss fell from {:.2f} to {:.2f}. ".format(*report["fell"]) if "fell" in report else ""
    return markdown(DIFFERENCE, rows) + f"\n{fell}{by_seed}{source(report)}"


DIFFERENCE = ["run", "what", "steps", "seeds", "fast", "held against", "times it", "bound", "holds"]


def _differences(report: Report) -> list[list[str]]:
    """A row of `DIFFERENCE` an entry."""
    return [
        [entry["part"], f"failed: {entry['failed']}", *["-"] * 6, held(entry)] if "failed" in entry else
        [entry["part"], entry["what"], str(entry["steps"]), str(entry["seeds"]), f"{entry['value']:.1e}",
         _own(entry), _times(entry), f"{entry['bound']:.1e}", held(entry)]
        for entry in report["rows"]
    ]  # fmt: skip


def differences(report: Report) -> str:
    """Every difference of a run of some parts."""
    return markdown(DIFFERENCE, _differences(report)) + f"\n{source(report)}"


def parity_options(report: Report) -> str:
    """A row a method with options: how many times what it is held against each difference is, of several the furthest.

    Those in fp32 are held against two trl runs, the gradient in bf16 against trl's, the two runs against trl in bf16.
    """
    columns = {"max |loss difference|": "fp32: max |loss difference|", "|mean signed difference|": "|mean difference|",
               "gradient of": "bf16: gradient, mean of batches", "two trl runs": "two trl runs in fp32"}
    of_part: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIONS}
    for entry in report["rows"]:
        of_part[entry["part"].partition(",")[0]].append(entry)
    rows = []
    for name, entries in of_part.items():
        if any("failed" in entry for entry in entries) or not entries:
            cells = [f"failed: {entries[0]['failed']}" if entries else "not measured yet", *["-"] * 4]
        else:
            cells = [_furthest([entry for entry in entries if what in f"{entry['part']}: {entry['what']}"])
                     for what in columns]
            cells.insert(0, str(entries[0]["seeds"]))
        worst = ("**no**", "**no**, not settled", "yes, not settled", "yes")
        rows.append([name, told(OPTIONS[name][1]), *cells, min(map(held, entries), key=worst.index, default="-")])
    table = markdown(["run", "options", "seeds", *columns.values(), "holds"], rows)
    return f"{table}\n{_true(of_part)}{source(report)}"


def _true(of_part: Mapping[str, list[dict[str, Any]]]) -> str:
    """Of the runs that were also held against one in fp64: how far from it fast is, and trl."""
    lines = []
    for name, entries in of_part.items():
        found = [entry for entry in entries if TRUE_LOSS in entry.get("what", "")]
        if found:
            sdpa, eager = (f"{_times(entry)} times as far as trl's {entry['own']:.1e}" for entry in found)
            lines.append(f"`{name}`, {TRUE_LOSS}, fp32: fast {found[0]['value']:.1e}, {sdpa} with sdpa, {eager} with "
                         "eager attention.\n\n")
    return "".join(lines)


def _furthest(entries: list[dict[str, Any]]) -> str:
    return _times(max(entries, key=lambda entry: entry["value"] / entry["bound"] if entry["own"] else math.inf))


def told(options: Mapping[str, Any]) -> str:
    """Options by name and value; TRL's own beside ours."""
    plain = {name: value for name, value in options.items() if name != "trainer_options"}
    return ", ".join(f"{name} {value}" for name, value in (plain | options.get("trainer_options", {})).items())


def held(entry: dict[str, Any]) -> str:
    """Whether a bound holds; where the interval over seeds has the bound within it, that the seeds do not settle it."""
    told = "yes" if entry["holds"] else "**no**"
    low, high = entry.get("interval") or (None, None)
    return told if low is None or not low < entry["bound"] / entry["own"] < high else f"{told}, not settled"


def _own(entry: dict[str, Any]) -> str:
    """What a difference is held against; in brackets what two runs differ by that count as more."""
    if entry["own"] is None:
        return "-"
    return f"{entry['own']:.1e}" + ("" if entry.get("raw") is None else f" ({entry['raw']:.1e})")


def _times(entry: dict[str, Any]) -> str:
    """How many times its yardstick a distance is; of distances that are pooled over seeds, with the interval."""
    if not entry["own"]:
        return "-"
    low, high = entry.get("interval") or (None, None)
    return f"{entry['value'] / entry['own']:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _interval(found: dict[str, Any]) -> str:
    ratio, low, high = found["ratio"]
    if found.get("pairs", 2) < 2:
        return f"{ratio:.2f}x, one step"
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]" + ("" if found["significant"] else ", not significant")


def learning(report: Report) -> str:
    """Backends beside each other on the builtin task: rewards at the end, what the curves show, seconds."""
    rows = []
    for row in report["rows"]:
        found, by_backend = row["judgement"], {}
        for run in row["runs"]:
            by_backend.setdefault(run["backend"], []).append(run)
        seconds = ["{:.0f}".format(sum(run["points"][-1][1] for run in runs) / len(runs))
                   for runs in by_backend.values()]
        asked = [", ".join(seconds), str(min(map(len, by_backend.values()))), str(row["at_once"])]
        if "why" in found:
            rows.append([row["algorithm"], *["-"] * 5, found["why"], "-", *asked])
            continue
        whole, time = found["whole"], found["by_time"]
        windows = [*found["windows"], found["last_third"]]
        held = sum(one["apart"] <= min(MOST, one["chance"]) for one in windows)
        spread = max(one["apart"] / min(one[name][1] for name in by_backend) for one in windows)
        rows.append([
            row["algorithm"], *(f"{windows[0][name][0]:.3f} to {windows[-1][name][0]:.3f}" for name in by_backend),
            "{:+.3f} [{:+.3f}, {:+.3f}] (±{:.3f})".format(whole["difference"], *whole["interval"], whole["half_pace"]),
            f"{spread:.2f}", f"{held} of {len(windows)}",
            verdict(found) + ("" if found["learnt"] else "; nothing learnt"),
            "no" if time["not_behind"] else "yes" if time["behind"] else "not shown", *asked,
        ])  # fmt: skip
    head = ["reward, first window to last third", "trl", "fast", "fast less trl, all steps (half as fast)",
            "most apart in a window, in deviations over seeds", "windows within", "one learner?",
            "fast behind at equal seconds", "seconds of trl, fast", "seeds", "runs at once"]  # fmt: skip
    sources = [*dict.fromkeys(source(row) for row in report["rows"])]
    if short := [row["algorithm"] for row in report["rows"] if "changed" not in row]:
        sources.insert(0, f"Runs of {', '.join(short)}: the recipes' own steps. With the longer stages that "
                       "`benchmarks.learning` has since, not measured yet.\n")
    return markdown(head, rows) + "\n" + "\n".join(sources)


def learning_commands(report: Report) -> str:
    """What was run, without the commit that names a tree which is no checkout."""
    commands = dict.fromkeys(re.sub(r" --commit \S+", "", row["command"]) for row in report["rows"])
    then = "python -m benchmarks.tables && python -m benchmarks.curves    # the tables, the pages, their images"
    return "```sh\n" + "\n".join([*commands, then]) + "\n```\n"


def learning_of(algorithm: str) -> Callable[[Report], str]:
    """What an algorithm's page shows of `learning`: the image, and the table's row."""

    def made(report: Report) -> str:
        rows = [row for row in report["rows"] if row["algorithm"] == algorithm]
        if not rows:
            return ""
        image = f"![{algorithm}-builtin on backends trl and fast](../assets/curves/learning-{algorithm}.svg)"
        told = ("Both backends from one SFT model a seed, on the same prompts; lines are means over seeds, bands twice "
                "their deviation. What is asked of them: [Benchmarks](../benchmarks.md#learning).")
        return f"{image}\n\n{told}\n\n" + learning({"rows": rows})

    return made


def sft_summary(*reports: Report) -> str:
    """A row a workload: the arm `fast`, and the peer over which it gains least.

    Then those that need the least memory, where that is another arm of fast.
    """
    quick, small, cards = [], [], set()
    for report in reports:
        measured = [entry for entry in report["rows"] if "tokens_per_s" in entry and "fp8" not in entry["arm"]]
        ours, theirs = ([one for one in measured if one["arm"].startswith("fast") == mine] for mine in (True, False))
        if not ours or not theirs:
            continue
        cards.add(report["device"])
        fast = _kept(ours)
        peer = min(theirs, key=lambda one: _gain(fast, one))
        told = _interval(peer["over_this"]) if "over_this" in peer and measured[0] is fast else None
        quick.append(_beside(SFT_ROWS[fast["row"]], fast, peer, told))
        least, least_peer = (min(arms, key=lambda one: one["peak_gib"]) for arms in (ours, theirs))
        if least["peak_gib"] < fast["peak_gib"]:
            small.append(_beside(f"{SFT_ROWS[fast['row']]}, least memory", least, least_peer, None))
    head = ["SFT step", "fast, tokens/s", "peak GiB", "best peer measured", "tokens/s", "peak GiB", "fast is"]
    told = (f"{', '.join(sorted(cards))}; random weights; the Llama 1B shape where no other is named. Tokens a second "
            "are of all measured steps together; the last column, where it has an interval, is the geometric mean over "
            "steps, and the best peer is the one over which it is least.")
    return markdown(head, [*quick, *small]) + f"\n{told}\n"


def rl_each(*reports: Report) -> str:
    """The tables of several rows, each under its name."""
    return "\n".join(f"{RL_ROWS[report['rows'][0]['row']]}:\n\n{rl(report)}" for report in reports)


def rl_summary(*reports: Report) -> str:
    """A row a workload: the arm of fast and, of the peers that ran beside it, that over which it gains least.

    Then those that need the least memory, where both sides recompute.
    """
    quick, small, cards = [], [], set()
    for report in reports:
        measured = [entry for entry in report["rows"] if "why" not in entry]
        ours, theirs = ([one for one in measured if one["arm"].startswith("fast") == mine] for mine in (True, False))
        if not ours or not theirs:
            continue
        cards.add(report["device"])
        fast = _kept(ours)
        name = RL_ROWS[fast["row"]]
        peer = min(theirs, key=lambda one: _gain(fast, one))
        quick.append(_step_beside(name, fast, peer, _interval(peer["over_this"])))
        least, least_peer = (min(arms, key=lambda one: one["peak_gib"]) for arms in (ours, theirs))
        if least is not fast and least_peer["arm"].endswith("-gc"):
            small.append(_step_beside(f"{name}, least memory", least, least_peer, f"{_gain(least, least_peer):.2f}x"))
    head = ["whole step, LoRA", "fast, ms", "peak GiB", "best peer measured", "ms", "peak GiB", "fast is"]
    told = ("; random weights; the Llama 1B shape where no other is named. Milliseconds are the median of an arm's "
            "steps; the last column is of tokens a second: over steps of both arms in pairs, where it has an interval."
            "\n")
    return markdown(head, [*quick, *small]) + f"\n{', '.join(sorted(cards))}{told}"


def _step_beside(name: str, fast: dict[str, Any], peer: dict[str, Any], ratio: str) -> list[str]:
    version = peer["versions"].get(peer["arm"].partition("-")[0], "")
    return [name, f"{fast['step_ms']['p50']:,.0f}", f"{fast['peak_gib']:.1f}", f"{peer['arm']} {version}".strip(),
            f"{peer['step_ms']['p50']:,.0f}", f"{peer['peak_gib']:.1f}", ratio]


def _kept(ours: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm that keeps its activations, which others are held against; the first where it did not run."""
    return next((one for one in ours if one["arm"] == "fast"), ours[0])


def _gain(fast: dict[str, Any], peer: dict[str, Any]) -> float:
    """How many times as quick as `peer` fast is: over steps in pairs where those were compared."""
    compared = "over_this" in peer and "over_this" not in fast  # with the first arm, which is held against none
    return peer["over_this"]["ratio"][0] if compared else fast["tokens_per_s"] / peer["tokens_per_s"]


def _beside(name: str, fast: dict[str, Any], peer: dict[str, Any], ratio: str | None) -> list[str]:
    label = peer["arm"].partition("-")[0]
    version = peer["versions"].get({"liger": "liger-kernel"}.get(label, label), "")
    return [name, f"{fast['tokens_per_s']:,.0f}", f"{fast['peak_gib']:.1f}", f"{peer['arm']} {version}".strip(),
            f"{peer['tokens_per_s']:,.0f}", f"{peer['peak_gib']:.1f}",
            ratio or f"{fast['tokens_per_s'] / peer['tokens_per_s']:.2f}x"]


def comparison(report: Report) -> str:
    """A report of `aligntune compare`: its verdict, the tables of speed, memory and parity, and where it is from."""
    found = {table.title: table for table in compared(report)}
    shown = [f"```\n{report['verdict']}\n```\n"]
    shown += [f"* {one['text']}\n" for one in report["findings"]]
    for title in ("Speed", "Memory", "Parity", "Final models on the probe rows", "Cost"):
        table = found[title]
        shown.append(f"{title}:\n\n" + markdown([cell or " " for cell in table.columns], map(list, table.rows)))
        if table.note:
            shown.append(table.note + "\n")
    arms, rows = ({row[0]: row[1:] for row in found[name].rows} for name in ("Arms", "Protocol"))
    packages = ", ".join(f"{name} {arms[name][1]}" for name in ("torch", "triton", "transformers", "trl", "peft"))
    shown.append(f"{arms['card'][1]}; Python {arms['Python'][1]}, {packages}, unsloth {arms['unsloth'][0]} with trl "
                 f"{arms['trl'][0]}; commit {arms['commit'][1]}; runs {rows['order of the runs'][0]}; "
                 f"`{rows['command'][0]}`\n")
    return "\n".join(shown)


RECIPES = ("sft", "reward", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "ppo", "rloo", "grpo", "gspo", "dapo",
           "dr_grpo")
SFT_ROWS = {"lora-1b": "LoRA, 4 x 2048", "lora-1b-ragged": "LoRA, 16 ragged rows",
            "lora-1b-packed": "LoRA, ragged rows packed", "full-1b": "all weights, 4 x 2048",
            "qlora-8b": "QLoRA 8B, 2 x 2048", "lora-4b": "LoRA 4B, 4 x 2048", "lora-1b-16k": "LoRA, 1 x 16,384"}
SFT_TWICE = ("lora-1b", "lora-1b-ragged", "lora-1b-packed", "qlora-8b")

LEARNT = ("grpo", "ppo", "dapo", "rloo", "dr_grpo")
RL_ROWS = {**{f"{name}-1b": f"{called}, 8 pairs" for name, called in (
               ("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO"), ("orpo", "ORPO"), ("simpo", "SimPO"), ("cpo", "CPO"),
               ("reward", "reward model"))},
           **{f"{name}-1b": f"{called}, 64 completions of 256 tokens" for name, called in (
               ("grpo", "GRPO"), ("ppo", "PPO"), ("dapo", "DAPO"), ("rloo", "RLOO"), ("dr_grpo", "Dr. GRPO"))},
           "grpo-4b": "GRPO 4B, 64 of up to 1,024"}  # fmt: skip
RL_APART = ("dpo-1b", "grpo-1b", "ppo-1b", "dapo-1b", "grpo-4b")
"""Rows with a section of their own; the others share one."""

# name -> (files, separated by spaces, what makes the table of their reports)
TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "ops-elementwise": ("ops/elementwise.json", elementwise),
    "ops-head": ("ops/head.json", head_table),
    "ops-cross-entropy": ("ops/head.json", logits_table),
    "ops-lora": ("ops/lora.json", bounded(_lora_label)),
    "ops-nf4": ("ops/nf4.json", bounded(lambda entry: " x ".join(map(str, entry["shape"])))),
    "ops-fp8": ("ops/fp8.json", bounded(lambda entry: " x ".join(map(str, entry["shape"])))),
    "ops-decode": ("ops/decode.json", bounded(lambda entry: f"{entry['op']}: {entry['shape']}")),
    "ops-segment-attention": (
        "ops/segment_attention.json", bounded(lambda entry: f"{entry['shape']}: {entry['op']}")),
    "ops-adamw": ("ops/adamw.json", bounded(lambda entry: f"{entry['numel']:,} parameters")),
    **{f"sft-{name}": (f"sft/{name}.json", sft) for name in SFT_ROWS},
    "sft-lora-1b-fp8": ("sft/lora-1b-fp8.json", sft_arms("fast", "fast-fp8")),
    "sft-earlier": (" ".join(f"sft/{when}{name}.json" for when in ("earlier/", "") for name in SFT_TWICE), sft_earlier),
    "sft-roofline": (" ".join(f"sft/{name}.json" for name, _ in roofline.ROWS), roofline_table),
    "sft-longest": ("sft/longest.json", longest),
    "sft-start": ("sft/start.json", sft),
    "compare-unsloth": ("compare/unsloth.json", comparison),
    "sft-summary": (" ".join(f"sft/{name}.json" for name in SFT_ROWS), sft_summary),
    "rollout": ("rollout.json", rollout),
    **{f"rollout-{base}": (f"rollout-{base}.json", rollout) for base in ("full", "nf4", "fp8")},
    "shared-prompts": ("shared_prompts.json", shared_prompts),
    "parity": ("parity.json", parity),
    "parity-options": ("parity-options.json", parity_options),
    "parity-fp64": ("parity-fp64.json", differences),
    **{f"rl-{name}": (f"rl/{name}.json", rl) for name in RL_APART},
    "rl-others": (" ".join(f"rl/{name}.json" for name in RL_ROWS if name not in RL_APART), rl_each),
    **{f"rl-{name}-trl": (f"rl/{name}-trl.json", rl) for name in ("grpo-1b", "grpo-4b")},
    "rl-grpo-4b-fast": ("rl/grpo-4b-fast.json", rl),
    "rl-summary": (" ".join(f"rl/{name}.json" for name in RL_ROWS), rl_summary),
    "learning": ("learning.json", learning),
    "learning-commands": ("learning.json", learning_commands),
    **{f"learning-{name}": ("learning.json", learning_of(name)) for name in LEARNT},
    "speed-sft": (" ".join(f"sft/{name}.json" for name in SFT_ROWS), sft_summary),
    **{f"speed-{name}": (" ".join(f"rl/{row}.json" for row in RL_ROWS if row.startswith(f"{name}-")), rl_summary)
       for name in RECIPES if name not in ("sft", "gspo")},
    **{f"recipe-{name}": (f"recipes/{name}-builtin.json", recipe) for name in RECIPES},
    "recipe-quickstart": ("recipes/quickstart.json", recipe),
}

UNMEASURED = {
    **dict.fromkeys((f"learning-{name}" for name in LEARNT), ""),
    **{name: f"How fast `{name.removeprefix('speed-')}` is was not measured; what was is in "
             "[Benchmarks](../benchmarks.md).\n" for name in TABLES if name.startswith("speed-")},
}  # fmt: skip
"""What is said in place of a table whose results are not there yet, where it is not "Not measured yet."."""


def table(name: str) -> str:
    """The generated text of one marker.

    Raises:
        KeyError: no such table.
    """
    files, make = TABLES[name]
    found = [json.loads(path.read_text()) for file in files.split() if (path := RESULTS / file).exists()]
    return make(*found) if found else UNMEASURED.get(name, "Not measured yet.\n")


def rendered(page: str) -> str:
    """`page` with every marked table generated anew."""
    return MARKED.sub(lambda match: match[1] + "\n" + table(match[2]) + "\n" + match[3], page)


def compare_page() -> str:
    """The committed comparison as the page that `aligntune compare` writes."""
    return html(json.loads((RESULTS / "compare" / "unsloth.json").read_text()))


def main() -> int:
    COMPARE_PAGE.write_text(compare_page())
    if plot.drawn_from(plot.PLOT) != plot.digest():
        plot.draw(plot.PLOT)
        print(plot.PLOT.relative_to(ROOT))
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) != text:
            page.write_text(new)
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables and plot of docs and README, from the committed results: `python -m benchmarks.tables` makes them anew.

A page holds `<!-- results: NAME -->` and `<!-- end -->`; what stands between is generated. A name without its results
file says so in the page, and no figure stands there.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aligntune.compare.html import html
from aligntune.compare.tables import tables as compared
from benchmarks import plot
from benchmarks.agreement import MOST, verdict
from benchmarks.parity_parts import OPTIONS, PARTS, TRUE_LOSS
from benchmarks.sft import roofline
from benchmarks.step_tables import (
    RL_ROWS,
    SFT_ROWS,
    Report,
    longest,
    markdown,
    rl,
    rl_each,
    rl_summary,
    roofline_table,
    sft,
    sft_earlier,
    sft_summary,
    source,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md")
COMPARE_PAGE = ROOT / "docs" / "assets" / "compare" / "unsloth.html"
MARKED = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


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


def shared_prompts(report: Report) -> str:
    """Rows whole and with the prompts that they share computed once, by the share of tokens that it spares."""
    rows = [[f"{one['group']} rows a prompt, {one['prompt']} of {one['length']} tokens", f"{one['saved']:.1%}",
             f"{one['whole_ms']:.1f}", f"{one['shared_ms']:.1f}", f"{one['whole_ms'] / one['shared_ms']:.2f}x"]
            for one in report["rows"]]
    head = ["forward and backward of 8,192 tokens", "tokens spared", "whole rows, ms", "once, ms", "quicker"]
    return markdown(head, rows) + "\n" + source(report)


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
    return markdown(DIFFERENCE, rows) + f"\n{fell}{by_seed}{sources(report)}"


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
    return markdown(DIFFERENCE, _differences(report)) + f"\n{sources(report)}"


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
    return f"{table}\n{_true(of_part)}{sources(report)}"


def sources(report: Report) -> str:
    """`source`, and of the parts that were measured before, where theirs are from."""
    earlier = [f"{', '.join(one['parts'])}: {source(one)}" for one in report.get("earlier", ())]
    return "\n".join([source(report), *earlier])


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
SFT_TWICE = ("lora-1b", "lora-1b-ragged", "lora-1b-packed", "qlora-8b")

LEARNT = ("grpo", "ppo", "dapo", "rloo", "dr_grpo")
RL_APART = ("dpo-1b", "grpo-1b", "ppo-1b", "dapo-1b", "grpo-4b")
"""Rows with a section of their own; the others share one."""

# name -> (files, separated by spaces, what makes the table of their reports)
TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "ops-elementwise": ("ops/elementwise.json", elementwise),
    "ops-head": ("ops/head.json", head_table),
    "ops-cross-entropy": ("ops/head.json", logits_table),
    "ops-lora": ("ops/lora.json", bounded(_lora_label)),
    "ops-lora-up": ("ops/lora_up.json", bounded(lambda entry: str(entry["shape"]))),
    "ops-nf4": ("ops/nf4.json", bounded(lambda entry: " x ".join(map(str, entry["shape"])))),
    "ops-fp8": ("ops/fp8.json", bounded(lambda entry: " x ".join(map(str, entry["shape"])))),
    "ops-decode": ("ops/decode.json", bounded(lambda entry: f"{entry['op']}: {entry['shape']}")),
    "ops-segment-attention": (
        "ops/segment_attention.json", bounded(lambda entry: f"{entry['shape']}: {entry['op']}")),
    "ops-adamw": ("ops/adamw.json", bounded(lambda entry: f"{entry['numel']:,} parameters")),
    **{f"sft-{name}": (f"sft/{name}.json", sft) for name in SFT_ROWS},
    "sft-full-1b-all": ("sft/full-1b-all.json", sft),
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
    "rl-grpo-4b-cb": ("rl/grpo-4b-cb.json", rl),
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

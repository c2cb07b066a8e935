"""Tables of whole steps: SFT's, and those of preference and online methods; what every table is written with.

`benchmarks.tables` says which results each is made of, and in which page it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.sft import roofline

Report = dict[str, Any]

SFT_ROWS = {"lora-1b": "LoRA, 4 x 2048", "lora-1b-ragged": "LoRA, 16 ragged rows",
            "lora-1b-packed": "LoRA, ragged rows packed", "full-1b": "all weights, 4 x 2048",
            "qlora-8b": "QLoRA 8B, 2 x 2048", "lora-4b": "LoRA 4B, 4 x 2048", "lora-1b-16k": "LoRA, 1 x 16,384"}
RL_ROWS = {**{f"{name}-1b": f"{called}, 8 pairs" for name, called in (
               ("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO"), ("orpo", "ORPO"), ("simpo", "SimPO"), ("cpo", "CPO"),
               ("reward", "reward model"))},
           **{f"{name}-1b": f"{called}, 64 completions of 256 tokens" for name, called in (
               ("grpo", "GRPO"), ("ppo", "PPO"), ("dapo", "DAPO"), ("rloo", "RLOO"), ("dr_grpo", "Dr. GRPO"))},
           "grpo-4b": "GRPO 4B, 64 of up to 1,024"}  # fmt: skip


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

    An arm of a results file is a column; one that did not run, or of which no step was traced, is none.
    """
    pairs = zip(roofline.ROWS, reports, strict=True)
    columns = {(row, arm): (entry, report["ceilings"]) for (row, arm), report in pairs
               if (entry := roofline.shown(arm, report)) is not None}
    found = {column: roofline.parts(*given) for column, given in columns.items()}
    parts = list(dict.fromkeys(part for rows in found.values() for part, _, _ in rows[:-1]))
    cells = {name: {part: f"{ms:.1f}" if bound is None else f"{ms:.1f} / {bound:.1f} ({ms - bound:+.1f})"
                    for part, ms, bound in rows} for name, rows in found.items()}  # fmt: skip
    whole = [rows[-1][0] for rows in found.values()][:1]
    rows = [[part, *(cells[name].get(part, "-") for name in found)] for part in [*parts, *whole]]
    entries = [entry for entry, _ in columns.values()]
    sizes = [(entry.get("traced") or {}).get("tokens") for entry in entries]
    tokens = [f"{mean:,.0f}" if traced in (None, round(mean)) else f"{traced:,} ({mean:,.0f})"
              for traced, mean in zip(sizes, (entry["tokens_per_step"] for entry in entries), strict=True)]
    head = (SFT_ROWS[row] if arm == "fast" else f"the same, {arm}" for row, arm in found)
    return markdown(["ms / least ms (above it)", *head],
                    [*rows, ["a step, mean of those measured", *(f"{entry['step_ms']:.1f}" for entry in entries)],
                     ["tokens of the traced step (mean)", *tokens]])


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


def _interval(found: dict[str, Any]) -> str:
    ratio, low, high = found["ratio"]
    if found.get("pairs", 2) < 2:
        return f"{ratio:.2f}x, one step"
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]" + ("" if found["significant"] else ", not significant")


def sft_summary(*reports: Report) -> str:
    """A row a workload: the arm `fast`, and the peer over which it gains least.

    Then those that need the least memory, where that is another arm of fast or a peer needs less.
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
        if min(least["peak_gib"], least_peer["peak_gib"]) < fast["peak_gib"]:
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
    theirs = f"{peer['arm']} {version}".strip()
    if peer["row"] == "ppo-1b":
        theirs = f"our PPO on {theirs}"  # which has none
    return [name, f"{fast['step_ms']['p50']:,.0f}", f"{fast['peak_gib']:.1f}", theirs,
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

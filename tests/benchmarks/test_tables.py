"""Figures in the docs are those of the committed results."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks import plot, tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text()
    assert tables.rendered(text) == text, "write them anew: python -m benchmarks.tables"


def test_the_comparison_s_page_is_the_report_s():
    assert tables.COMPARE_PAGE.read_text() == tables.compare_page(), "write it anew: python -m benchmarks.tables"
    assert tables.table("compare-unsloth").splitlines()[1].startswith("fast,")
    assert "parity PASS" in tables.compare_page()


def test_every_table_stands_in_a_page():
    found = {match[1] for page in tables.PAGES for match in tables.MARKED.findall(page.read_text())}
    assert found == set(tables.TABLES)


def test_rows_that_share_a_section_are_told_apart():
    report = json.loads((tables.RESULTS / "rl" / "dpo-1b.json").read_text())
    other = report | {"rows": [entry | {"row": "kto-1b"} for entry in report["rows"]]}
    lines = tables.rl_each(report, other).splitlines()
    assert [line for line in lines if line.endswith(":")] == ["DPO, 8 pairs:", "KTO, 8 pairs:"]
    assert sum(line.startswith("| arm |") for line in lines) == 2 == sum("`python -m" in line for line in lines)


@pytest.mark.parametrize("name", [name for name in tables.RECIPES if name != "gspo"])
def test_an_algorithm_s_page_has_its_speed(name):
    page = (tables.ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
    section = page[page.index("## On backend fast"):].split("\n## ")[0]
    (shown,) = [match[0] for match in tables.MARKED.finditer(section) if match[2] == f"speed-{name}"]
    assert "was not measured" not in shown and "| fast is |" in shown
    # Of its own steps alone: a row a workload, each named by itself.
    if name != "sft":
        title = {"reward": "reward model", "dr_grpo": "Dr. GRPO", "simpo": "SimPO"}.get(name, name.upper())
        rows = [line for line in shown.splitlines() if line.startswith(f"| {title}")]
        assert len(rows) == shown.count("\n| ") - 2 >= 1 and "the same" not in shown


def test_the_roofline_s_columns_are_the_rows_of_its_files():
    head, _, *rows = tables.table("sft-roofline").splitlines()
    assert head.count("|") == len(tables.roofline.ROWS) + 2 and "fast-fp8" in head and "ragged" in head
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in rows}
    fp8 = tables.roofline.ROWS.index(("lora-1b", "fast-fp8"))
    assert [i for i, cell in enumerate(cells["quantising"]) if not cell.startswith("-")] == [fp8]
    assert all("/" in cell and "(+" in cell for cell in cells["products"])


@pytest.mark.parametrize("left", [{"why": "failed: OutOfMemoryError"}, {"trace": None}])
def test_an_arm_without_a_traced_step_is_no_column_of_the_roofline(left):
    reports = [json.loads((tables.RESULTS / "sft" / f"{name}.json").read_text()) for name, _ in tables.roofline.ROWS]
    whole = tables.roofline_table(*reports)
    row, arm = tables.roofline.ROWS[0]
    reports[0] = copy.deepcopy(reports[0])
    (entry,) = [one for one in reports[0]["rows"] if one["arm"] == arm]
    if "why" in left:
        entry.clear()
    entry.update({"row": row, "arm": arm} | left)
    cut = tables.roofline_table(*reports)
    assert cut.splitlines()[0].count("|") == whole.splitlines()[0].count("|") - 1
    assert "| products |" in cut


def test_where_a_peer_needs_less_memory_the_summary_says_so():
    """In a run in which no arm of fast recomputed."""
    report = json.loads((tables.RESULTS / "sft" / "full-1b-all.json").read_text())
    (row,) = [line for line in tables.sft_summary(report).splitlines() if "least memory" in line]
    assert "| liger-gc" in row
    peaks = [float(cell) for cell in (row.split(" | ")[2], row.split(" | ")[5])]
    assert peaks[1] < peaks[0]


def test_a_changed_figure_is_found():
    report = {
        "device": "card", "versions": {"torch": "1"}, "commit": "c" * 40, "command": "x", "copy_bytes_per_s": 3e12,
        "rows": [{"op": "nf4", "shape": [2, 3], "method": "ours", "ms": 0.02, "of_bound": 0.5, "peak_gib": 0.0}],
    }  # fmt: skip
    make = tables.TABLES["ops-nf4"][1]
    assert "| 2 x 3 | ours | 20 | 50% | 0.00 |" in make(report)
    report["rows"][0]["ms"] = 0.03
    assert "| 2 x 3 | ours | 30 |" in make(report)


def test_a_recipes_table_has_a_row_a_seed():
    rows = [{"seed": 1, "probe": "exact_match on sums", "scores": {"before": 0.0, "after sft": 0.765},
             "steps": {"sft": 340}, "cpu_s": 181.4, "wall_s": 300.2, "threads": 1}]  # fmt: skip
    report = {"device": "CPU", "versions": {"torch": "1"}, "commit": "c" * 40, "command": "x", "rows": rows}
    assert tables.recipe(report).splitlines()[2] == "| 1 | 0.000 | 0.765 | sft 340 | 181 (1) |"
    assert "exact_match on sums, greedy answers. CPU; torch 1" in tables.recipe(report)
    rows[0]["threads"] = 2  # threads that wait count as well: no measure of the work
    assert tables.recipe(report).splitlines()[2] == "| 1 | 0.000 | 0.765 | sft 340 | 300 (2) |"
    del rows[0]["threads"]
    assert tables.recipe(report).splitlines()[2] == "| 1 | 0.000 | 0.765 | sft 340 | - |"


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_results_name_card_commit_command_and_versions(name):
    paths = [tables.RESULTS / file for file in tables.TABLES[name][0].split()]
    if not any(path.exists() for path in paths):
        assert tables.table(name) == tables.UNMEASURED.get(name, "Not measured yet.\n")
    for path in paths:
        if path.exists():
            report = json.loads(path.read_text())
            if name.startswith("compare-"):
                assert "NVIDIA H100" in report["arms"]["a"]["gpus"][0]["name"] and report["arms"]["a"]["git"]["commit"]
                assert report["command"] and report["protocol"]["repeats"] >= 2 and report["valid"]
                continue
            where = {"parity-options": "NVIDIA H"}.get(name, "CPU" if name.startswith("recipe-") else "H100")
            assert where in report["device"] and len(report["commit"].rstrip("+")) == 40 and report["command"]
            assert report["rows"]


def measured(arm: str, rate: float, **more: Any) -> dict[str, Any]:
    return {"row": "lora-1b", "arm": arm, "tokens_per_s": rate, "step_ms": 100.0, "peak_gib": 10.0, "first_step_s": 9.0,
            "loss_first": 3.0, "loss_last": 2.0, "versions": {"torch": "2", "unsloth": "7"}, **more}  # fmt: skip


def sft_report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"device": "card", "commit": "c" * 40, "command": "x", "rows": list(rows)}


def test_an_sft_table_with_intervals_and_what_did_not_run():
    over = {"ratio": [1.25, 1.2, 1.3], "noise": 0.01, "significant": True}
    report = sft_report(measured("fast", 1000), measured("trl", 800, over_this=over),
                        {"row": "lora-1b", "arm": "liger", "why": "liger is not installed"})
    lines = tables.sft(report).splitlines()
    assert "| fast over it |" in lines[0] and "first loss" in lines[0]
    assert lines[2] == "| fast | 1,000 | - | 100 | 10.00 | 9 | 3.000 | 2.000 |"
    assert lines[3] == "| trl | 800 | 1.25x [1.20, 1.30] | 100 | 10.00 | 9 | 3.000 | 2.000 |"
    assert lines[4] == "| liger | liger is not installed | - | - | - | - | - | - |"
    over["significant"] = False
    assert "[1.20, 1.30], not significant |" in tables.sft(report)


def test_the_summary_takes_the_peer_that_fast_gains_least_over():
    report = sft_report(measured("fast-gc", 700), measured("fast", 1000), measured("trl", 800),
                        measured("unsloth-compiled", 900))  # fmt: skip
    lines = tables.sft_summary(report).splitlines()
    assert lines[2] == "| LoRA, 4 x 2048 | 1,000 | 10.0 | unsloth-compiled 7 | 900 | 10.0 | 1.11x |"
    assert lines[3] == ""  # no arm of fast needs less
    over = {"noise": 0.01, "significant": True}
    beside = (measured("trl", 900, over_this=over | {"ratio": [1.3, 1.2, 1.4]}),
              measured("unsloth", 890, over_this=over | {"ratio": [1.2, 1.1, 1.3]}))
    summary = tables.sft_summary(sft_report(measured("fast", 1000), *beside))
    assert "| unsloth 7 | 890 | 10.0 | 1.20x [1.10, 1.30] |" in summary
    assert tables.sft_summary(sft_report(measured("trl", 800))).count("\n|") == 1  # nothing to compare


def test_the_summary_takes_the_smallest_of_each_side_too():
    report = sft_report(measured("fast", 1000), measured("fast-offload", 600, peak_gib=3.0), measured("unsloth", 900),
                        measured("fast-fp8", 2000, peak_gib=1.0), measured("unsloth-gc", 500, peak_gib=4.0))
    lines = tables.sft_summary(report).splitlines()
    assert lines[2].endswith("| unsloth 7 | 900 | 10.0 | 1.11x |")
    assert lines[3] == "| LoRA, 4 x 2048, least memory | 600 | 3.0 | unsloth-gc 7 | 500 | 4.0 | 1.20x |"


def test_the_summary_of_online_methods():
    def row(arm, ms, **more):
        return {"row": "grpo-1b", "arm": arm, "step_ms": {"p10": 1.0, "p50": ms, "p90": 2.0}, "peak_gib": 20.0,
                "versions": {"unsloth": "7"}, **more}  # fmt: skip

    over = {"ratio": [9.0, 8.0, 10.0], "significant": True, "pairs": 2}
    more = over | {"ratio": [9.1, 8.0, 10.0]}  # quicker by its median, and yet fast gains more over it
    report = sft_report(row("fast", 800.0), row("trl", 7100.0, over_this=more), {"arm": "x", "why": "not here"},
                        row("unsloth", 7200.0, over_this=over))
    line = tables.rl_summary(report).splitlines()[2]
    assert line == ("| GRPO, 64 completions of 256 tokens | 800 | 20.0 | unsloth 7 | 7,200 | 20.0 | "
                    "9.00x [8.00, 10.00] |")
    assert tables.rl_summary(sft_report(row("fast", 800.0))).count("\n|") == 1
    # Another arm of fast is no peer; the two that need the least memory are held against each other by their rates.
    report["rows"] += [row("fast-gc", 900.0, over_this=over | {"ratio": [1.1, 1.0, 1.2]}) | {
                           "peak_gib": 3.0, "tokens_per_s": 600.0},
                       row("unsloth-gc", 9000.0, over_this=over | {"ratio": [12.0, 11.0, 13.0]}) | {
                           "peak_gib": 4.0, "tokens_per_s": 60.0}]  # fmt: skip
    quick, small = tables.rl_summary(report).splitlines()[2:4]
    assert quick == line
    assert small == ("| GRPO, 64 completions of 256 tokens, least memory | 900 | 3.0 | unsloth-gc 7 | 9,000 | 4.0 | "
                     "10.00x |")


def test_the_plot_shows_the_committed_figures(tmp_path, monkeypatch):
    assert plot.drawn_from(plot.PLOT) == plot.digest(), "draw it anew: python -m benchmarks.tables"
    shown = f"docs/images/{plot.PLOT.name}"
    assert shown in (tables.ROOT / "README.md").read_text()
    path = tmp_path / "plot.png"
    assert plot.drawn_from(path) is None
    plot.draw(path)
    before = plot.drawn_from(path)
    assert before == plot.digest()
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "lora-1b.json").write_text(json.dumps(sft_report(measured("fast", 1000), measured("trl", 1001))))
    assert plot.figures() == [("LoRA, 4 x 2048 tokens", [("trl", 1001.0), ("fast", 1000.0)])]
    assert plot.digest() != before


def test_rows_that_were_measured_twice() -> None:
    def report(row: str, **speeds: float) -> dict[str, Any]:
        arms = [{"row": row, "arm": name.replace("_", "-"), "tokens_per_s": speed} for name, speed in speeds.items()]
        return {"rows": [*arms, {"row": row, "arm": "unsloth-gc", "why": "not here"}]}

    before = [report("lora-1b", fast=90.0, fast_fp8=99.0, unsloth=50.0, unsloth_compiled=60.0, trl=80.0),
              report("qlora-8b", fast=9.0, unsloth=5.0)]
    now = [report("lora-1b", fast=1000.0, fast_offload=800.0, unsloth=55.0), report("qlora-8b", fast=8.0, unsloth=4.0)]
    assert tables.sft_earlier(*before, *now).splitlines()[2:] == [
        "| LoRA, 4 x 2048 | 90 | 1,000 | 60 | 55 | 1.50x | 16.67x |",
        "| QLoRA 8B, 2 x 2048 | 9 | 8 | 5 | 4 | 1.80x | 1.60x |"]

"""Figures in the docs are those of the committed results."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text()
    assert tables.rendered(text) == text, "write them anew: python -m benchmarks.tables"


def test_every_table_stands_in_a_page():
    found = {match[1] for page in tables.PAGES for match in tables.MARKED.findall(page.read_text())}
    assert found == set(tables.TABLES)


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
             "steps": {"sft": 340}}]  # fmt: skip
    report = {"device": "CPU", "versions": {"torch": "1"}, "commit": "c" * 40, "command": "x", "rows": rows}
    assert tables.recipe(report).splitlines()[2] == "| 1 | 0.000 | 0.765 | sft 340 |"
    assert "exact_match on sums, greedy answers. CPU; torch 1" in tables.recipe(report)


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_results_name_card_commit_command_and_versions(name):
    path = tables.RESULTS / tables.TABLES[name][0]
    if not path.exists():
        assert tables.table(name) == "Not measured yet.\n"
        return
    report = json.loads(path.read_text())
    where = "CPU" if name.startswith("recipe-") else "H100"
    assert where in report["device"] and len(report["commit"].rstrip("+")) == 40 and report["command"]
    assert report["rows"]

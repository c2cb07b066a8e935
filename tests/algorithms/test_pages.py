"""A page each: its parts, its generated tables, its curve, and the row that it shows.

`python -m tests.algorithms.test_pages` writes the tables of options and the lists of differences anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aligntune.algorithms import ALGORITHMS
from aligntune.core.option_docs import default
from aligntune.core.options import infos
from aligntune.core.recipes import packaged, read_recipe
from aligntune.data import DataRequest, prepare
from benchmarks import curves
from tests.data.tokenizers import make

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = ALGORITHMS.names()
MARKED = re.compile(r"(<!-- (options|differs): (\w+) -->\n).*?(<!-- end -->)", re.S)


def page(name: str) -> str:
    return (DOCS / "algorithms" / f"{name}.md").read_text()


def options_table(name: str) -> str:
    """The algorithm's own options, from its dataclass."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for row in infos(ALGORITHMS.load(name).options, "loss"):
        value = default(row, name)
        literal = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"| `{row.name}` | `{literal}` | {row.help} |".replace("||", "\\|\\|"))
    return "\n".join(lines) + "\n"


def differences(name: str) -> str:
    return "".join(f"* {line}\n" for line in ALGORITHMS.load(name).differences)


MADE = {"options": options_table, "differs": differences}


def rendered(text: str) -> str:
    return MARKED.sub(lambda match: f"{match[1]}\n{MADE[match[2]](match[3])}\n{match[4]}", text)


@pytest.mark.parametrize("name", NAMES)
def test_options_and_differences_of_a_page_are_those_of_the_code(name: str) -> None:
    assert [match[1:3] for match in MARKED.findall(page(name))] == [("options", name), ("differs", name)]
    assert len(ALGORITHMS.load(name).differs) >= 1
    assert rendered(page(name)) == page(name), "write them anew: python -m tests.algorithms.test_pages"


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_parts_in_order(name: str) -> None:
    text = page(name)
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    wanted = ["## The loss", "## The data", "## Options", "## What goes wrong"]
    assert [next(i for i, head in enumerate(heads) if head.startswith(each)) for each in wanted] and all(
        sum(head.startswith(each) for head in heads) == 1 for each in wanted)
    opening = text.split("## ")[0]
    assert re.search(r"\b(Use|Take) it\b|\bIt is for\b|\bTake it\b", opening), "when to use it"
    assert len(re.findall(r"^\|", text[text.index("## What goes wrong"):], re.M)) >= 6, "what goes wrong, as a table"
    spec = ALGORITHMS.load(name)
    for number in re.findall(r"\d{4}\.\d{5}", spec.paper)[:1]:
        assert number in text
    loss = text[text.index("## The loss"):text.index("## The data")]
    assert re.search(r"^```\n.*=.*^```$", loss, re.M | re.S), "the equation"


@pytest.mark.parametrize("name", NAMES)
def test_no_heading_of_a_page_stands_over_nothing(name: str) -> None:
    """As it is rendered: the marks of generated parts show nothing, and one that is not measured yet is empty."""
    shown = re.sub(r"^```.*?^```", "code", re.sub(r"<!--.*?-->", "", page(name), flags=re.S), flags=re.M | re.S)
    heads = list(re.finditer(r"^(#+) .*$", shown, re.M))
    ends = [head.start() for head in heads[1:]] + [len(shown)]
    assert len(heads) >= 5
    for head, end in zip(heads, ends, strict=True):
        assert shown[head.end():end].strip(), head[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_every_recipe_of_its_algorithm(name: str) -> None:
    recipes = [recipe for recipe in packaged() if read_recipe(recipe).algorithms[-1:] == (name,)
               and recipe not in ("quickstart", "tiny-instruct")]
    assert len(recipes) >= 2
    for recipe in recipes:
        assert recipe in page(name), recipe
    assert f"aligntune train {name}-builtin" in page(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_that_a_page_shows_is_one_that_the_algorithm_takes(name: str) -> None:
    text = page(name)
    data = text[text.index("## The data"):]
    (block, *_) = re.findall(r"^```json\n(.*?)^```", data, re.M | re.S)
    rows = [json.loads(line) for line in block.strip().splitlines()]
    spec = ALGORITHMS.load(name)
    request = DataRequest(algorithm=name, takes=spec.takes, dataset=rows * 2, max_seq_length=512,
                          max_completion_length=64 if spec.takes == "prompts" else None)
    found = prepare(request, make("qwen3"))
    assert found.report.rows_trained == 2 * len(rows) and not found.report.bad


@pytest.mark.parametrize("name", NAMES)
def test_the_curve_of_a_page_is_drawn_from_the_committed_history(name: str) -> None:
    image = curves.ASSETS / f"{name}.svg"
    assert f"](../assets/curves/{name}.svg)" in page(name)
    assert image.stat().st_size < 12_000
    report = curves.report_of(name)
    assert image.read_text() == curves.svg(name, report), "draw it anew: python -m benchmarks.curves"
    history = curves.chosen(report)["history"]
    for panel in curves.CURVES[name]:
        drawn = [metric for metric in panel.metrics if history[metric]]
        assert drawn and len(history[drawn[0]]) >= 7
    first = curves.CURVES[name][0].metrics[0]
    values = [value for _, value in history[first]]
    third = len(values) // 3
    start, end = sum(values[:third]) / third, sum(values[-third:]) / third
    assert end > start if first == "reward" else end < start, f"{first} went from {start} to {end}"


@pytest.mark.parametrize("name", NAMES)
def test_a_builtin_recipe_learnt_something_on_held_out_rows_within_three_minutes(name: str) -> None:
    """On two cores by the wall; what one thread computed is less, or two threads would not pay."""
    rows = curves.report_of(name)["rows"]
    for row in rows:
        scores = list(row["scores"].values())
        if row.get("probe"):
            assert scores[0] < 0.05 and scores[-1] > scores[-2] + 0.1, row["seed"]
        else:
            start, end = (row["scores"][key] for key in row["scores"] if key.startswith("eval_loss"))
            assert end < 0.2 * start
    took = [row["cpu_s" if row["threads"] == 1 else "wall_s"] for row in rows if row.get("threads", 3) <= 2]
    assert took and 10 < min(took) <= max(took) <= 180, took


def test_a_changed_history_changes_the_curve() -> None:
    report = curves.report_of("dpo")
    before = curves.svg("dpo", report)
    curves.chosen(report)["history"]["loss"][3][1] += 0.05
    assert curves.svg("dpo", report) != before
    for row in report["rows"]:
        del row["history"]
    with pytest.raises(LookupError, match="no history"):
        curves.svg("dpo", report)


def test_points_lie_where_their_numbers_are() -> None:
    """0 to 10 in value over 0 to 100 in steps, by hand: 6% of room above and below."""
    history = {"loss": [[0, 0.0], [100, 10.0]], "accuracy": [[0, 0.5], [100, 0.5]]}
    drawn = curves.svg("reward", {"command": "x", "rows": [{"seed": 1, "history": history}]})
    low, high = re.findall(r'<polyline points="48\.0,([\d.]+) 338\.0,([\d.]+)"', drawn)[0]
    assert (float(low), float(high)) == (pytest.approx(34 + 156 * 10.6 / 11.2, abs=0.06),
                                         pytest.approx(34 + 156 * 0.6 / 11.2, abs=0.06))
    assert curves.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0] and curves.ticks(0.31, 0.72) == [0.4, 0.5, 0.6, 0.7]


if __name__ == "__main__":
    for each in NAMES:
        path = DOCS / "algorithms" / f"{each}.md"
        path.write_text(rendered(path.read_text()))

"""The report: its figures, and what it shows as text, Markdown and colour."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from aligntune.data.report import DataReport, Segment
from aligntune.data.rows import BadRow
from tests.data import rows as data
from tests.data.rows import assistant, prepared, user


def report(**changes):
    return DataReport(**{"source": "s", "algorithm": "sft", "takes": "sft", "kind": "text", "why": "w",
                         "conversion": "c", **changes})  # fmt: skip


def test_figures_of_a_small_dataset():
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": [user("a"), assistant("b b")]}, {"messages": 1}]
    found = prepared(rows, "sft", "gemma", on_bad_row="skip").report
    # <bos><start_of_turn> user \n a <end_of_turn> \n <start_of_turn> m o d e l \n b <end_of_turn> \n
    lengths = [len(ids) for ids in prepared(rows[:2], "sft", "gemma").train["input_ids"]]
    assert list(found.lengths) == lengths and lengths[1] > lengths[0]
    assert found.tokens == sum(lengths) and found.supervised_tokens == 3 + 3 + lengths[1] - lengths[0]
    assert found.supervised_percent == pytest.approx(100 * found.supervised_tokens / found.tokens)
    assert (found.rows_read, found.rows_trained, found.examples, len(found.bad)) == (3, 2, 2, 1)
    assert found.end_of_turn_percent == 100.0 and found.truncated_percent == 0.0
    assert found.masks == {"prefix difference": 2}


def test_shapes_without_a_mask_have_no_supervised_share():
    for takes, rows in (("prompts", data.PROMPTS), ("reward", data.PREFERENCE)):
        found = prepared(rows, takes, "llama3.1").report
        assert found.supervised_tokens is found.supervised_percent is found.end_of_turn_percent is None
        assert "supervised" not in found.text() and "learnt" not in found.text()
        assert found.tokens == sum(found.lengths) > 0


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []), ([7], [(7, 7, 1)]), ([3, 4, 4], [(3, 3, 1), (4, 4, 2)]),
        (list(range(1, 101)), [(10 * i + 1, 10 * i + 10, 10) for i in range(10)]),
        ([1, 12], [(1, 2, 1), (3, 4, 0), (5, 6, 0), (7, 8, 0), (9, 10, 0), (11, 12, 1)]),
    ],
)  # fmt: skip
def test_histogram(lengths, expected):
    found = report(lengths=lengths)
    assert found.histogram() == expected
    assert sum(count for _, _, count in found.histogram()) == len(lengths)


def test_quantiles():
    found = report(lengths=list(range(100, 0, -1)))
    assert (found.quantile(0.5), found.quantile(0.95), found.quantile(1.0)) == (51, 96, 100)
    assert report().quantile(0.5) == 0


def test_text_marks_what_is_learnt_line_by_line():
    text = prepared(data.TWO_TURNS, "sft", "llama3.1").report.text()
    assert "rows         1 read = 1 trained + 0 bad" in text
    lines = [line.strip() for line in text.split("one example")[1].splitlines()]
    assert "> 42.<|eot_id|>" in lines and "> 12.<|eot_id|>" in lines
    assert not any(line.startswith(">") and "What is" in line for line in lines)
    assert any(line.startswith("What is 12 + 30?") for line in lines)


def test_pairs_show_all_three_parts():
    text = prepared(data.PREFERENCE_TURNS, "preference", "llama3.1").report.text()
    parts = [text.index(part) for part in ("[prompt]", "[chosen]", "> It is blue.", "[rejected]", "> It is green.")]
    assert parts == sorted(parts)


def test_bad_rows_and_warnings_are_shown_in_every_form():
    rows = [*data.TEXT, *({"text": None} for _ in range(12))]
    found = prepared(rows, "sft", "base", on_bad_row="skip").report
    found.warnings.append("look | here")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.rich())
    for shown in (found.text(), found.markdown().replace("\\|", "|"), console.export_text()):
        assert "list: row 2: text: is null" in shown and "list: row 11: text: is null" in shown
        assert "list: row 12" not in shown and "... and 2 more" in shown
        assert "look | here" in shown and "14 read = 2 trained + 12 bad" in shown
    assert "look \\| here" in found.markdown()


def test_markdown_survives_fences_and_tables_in_the_example():
    example = [Segment("row", "```python\nx\n```` | y", True)]
    found = report(example=example, supervised_tokens=1, tokens=1, end_of_turn=1)
    lines = found.markdown().splitlines()
    fences = [line for line in lines if line.startswith("`````")]
    assert fences == ["`````text", "`````"]
    assert "> ```python" in lines


def test_rich_colours_what_is_learnt():
    console = Console(width=120, force_terminal=True, color_system="standard", record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(prepared(data.MESSAGES, "sft", "llama3.1").report.rich())
    styled = console.export_text(styles=True)
    assert "\x1b[32mParis.<|eot_id|>" in styled and "\x1b[2m" in styled


def test_markup_in_the_data_is_shown_and_not_obeyed():
    found = prepared([{"text": "a [bold]b[/bold] [/nope] :smile:"}], "sft", "base").report
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.rich())
    assert "[bold]b[/bold] [/nope] :smile:" in console.export_text()


def test_long_examples_are_shortened_and_it_is_said():
    found = prepared([{"text": "word " * 3000}], "sft", "base", max_seq_length=10_000).report
    assert "characters not shown" in found.text() and len(found.text()) < 6000


def test_the_report_as_values_is_json():
    found = prepared(data.ALPACA * 3, "sft", "qwen3", val_split_ratio=0.5).report
    values = json.loads(json.dumps(found.as_dict()))
    assert values["rows_read"] == values["rows_trained"] == 3 and values["rows_bad"] == 0
    assert values["eval"]["rows_read"] == 3 and values["eval"]["eval"] is None
    assert sum(count for _, _, count in values["histogram"]) == 3
    assert "Data for sft" in found.text().split("\n", 1)[1]  # the evaluation data follows


def test_bad_rows_are_written_with_the_row_itself(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 5}\n{"text": \n')
    found = prepared(path, "sft", "base", on_bad_row="quarantine", eval_dataset=[{"text": "x"}, {"text": None}]).report
    assert found.write_bad_rows(tmp_path / "bad_rows.jsonl") == 3
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert written[0] == {
        "where": f"{path}:2", "field": "text", "why": "is a number, expected text", "row": {"text": 5},
    }  # fmt: skip
    assert written[1]["where"] == f"{path}:3" and written[1]["row"] == '{"text": '
    assert written[2] == {"where": "list: row 1", "field": "text", "why": "is null", "row": {"text": None}}


def test_bad_rows_with_half_a_character_are_written(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud83d é \\\\"}\n"\\ude00"\n')
    found = prepared(path, "sft", "base", on_bad_row="quarantine").report
    assert found.write_bad_rows(tmp_path / "bad_rows.jsonl") == 2
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text("utf-8").splitlines()]
    assert [one["row"] for one in written] == [{"text": "\ud83d é \\"}, "\ude00"]
    assert [one["where"] for one in written] == [f"{path}:2", f"{path}:3"]
    (tmp_path / "data_report.md").write_text(found.markdown(), encoding="utf-8")


def test_bad_rows_as_people_read_them():
    assert str(BadRow("f.jsonl:3", "output", "is null")) == "f.jsonl:3: output: is null"
    assert str(BadRow("f.jsonl:3", "", "odd")) == "f.jsonl:3: odd"

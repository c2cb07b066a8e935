"""Local files: every row keeps its line, every broken row is reported, nothing else is lost."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligntune.data.files import read_file
from aligntune.data.rows import BadRow
from aligntune.errors import DataError


def contents(rows):
    return [pair for chunk in rows.chunks(2) for pair in chunk]


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_with_bom_blank_lines_crlf_and_differing_columns(tmp_path):
    raw = b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": "x\xe2\x80\xa8y", "a": null}\r\n   \n{"a": {"deep": [1, {"er": 2}]}}'
    path = write(tmp_path / "data.jsonl", raw)
    rows = read_file(path)
    assert contents(rows) == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:3", {"b": "x\u2028y", "a": None}),  # U+2028 does not end a line of JSON
        (f"{path}:5", {"a": {"deep": [1, {"er": 2}]}}),
    ]
    assert rows.columns == ("a", "b")


def test_jsonl_broken_lines_are_bad_rows_in_their_place(tmp_path):
    path = write(tmp_path / "data.jsonl", b'{"a": 1}\n{"a": 2,}\n[1, 2]\n"text"\nnull\n{"a": "\xff"}\n{"a": 3}\n')
    found = contents(read_file(path))
    assert [row for _, row in found if isinstance(row, dict)] == [{"a": 1}, {"a": 3}]
    shown = [str(row) for _, row in found if isinstance(row, BadRow)]
    assert len(shown) == 5
    assert shown[0].startswith(f"{path}:2: JSON: ") and "column 9" in shown[0]
    assert shown[1] == f"{path}:3: JSON: is a list, a row must be a JSON object"
    assert shown[2] == f"{path}:4: JSON: is a string, a row must be a JSON object"
    assert shown[3] == f"{path}:5: JSON: is null, a row must be a JSON object"
    assert shown[4] == f"{path}:6: JSON: not UTF-8 (invalid start byte at byte 7)"


def test_jsonl_nested_too_deeply(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"a": 1}\n' + "[" * 200_000 + "]" * 200_000 + "\n")
    _, bad = contents(read_file(path))[1]
    assert isinstance(bad, BadRow) and "nested too deeply" in str(bad)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_array_rows_know_their_lines(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", '\n[\n  {"a": 1},\n  {\n    "a": 2\n  }, 7,\n  {"a": "\\n[,]"}\n]\n')
    found = contents(read_file(path))
    assert [where for where, _ in found] == [f"{path}:{line}" for line in (3, 4, 6, 7)]
    assert str(found[2][1]) == f"{path}:6: JSON: is a number, a row must be a JSON object"
    assert found[3][1] == {"a": "\n[,]"}


@pytest.mark.parametrize(
    ("text", "line"),
    [('[\n{"a": 1},\n{"a": 2,}\n]', 3), ('[{"a": 1}\n{"a": 2}]', 2), ('[{"a": 1},\n', 2), ('[{"a": 1}]\n{"a": 2}', 1)],
)
def test_json_array_that_is_broken_names_the_line(tmp_path, text, line):
    path = write(tmp_path / "data.json", text)
    with pytest.raises(DataError, match=rf"data\.json:{line}: JSON: "):
        read_file(path)


def test_empty_json_array_has_no_rows(tmp_path):
    assert len(read_file(write(tmp_path / "data.json", " [ ] "))) == 0


def test_json_object_with_rows_inside(tmp_path):
    path = write(tmp_path / "data.json", '{"version": 1, "data": [{"a": 1}, 5]}')
    found = contents(read_file(path))
    assert found[0] == (f"{path}: data[0]", {"a": 1})
    assert isinstance(found[1][1], BadRow)


def test_json_object_that_is_a_row(tmp_path):
    path = write(tmp_path / "one.json", '{\n"messages": [{"role": "user", "content": "x"}]\n}')
    assert contents(read_file(path)) == [(f"{path}:1", {"messages": [{"role": "user", "content": "x"}]})]


def test_json_lines_under_the_suffix_json(tmp_path):
    path = write(tmp_path / "data.json", '{"a": 1}\n{"a": \n{"a": 3}\n')
    found = contents(read_file(path))
    assert [isinstance(row, BadRow) for _, row in found] == [False, True, False]


def test_json_that_is_broken_as_a_whole(tmp_path):
    with pytest.raises(DataError, match=r"data\.json:2: JSON"):
        read_file(write(tmp_path / "data.json", '{\n"a": 1,,\n"b": 2}'))
    with pytest.raises(DataError, match="holds a number, not rows"):
        read_file(write(tmp_path / "number.json", "3"))


def test_csv_keeps_text_and_the_line_where_a_row_starts(tmp_path):
    path = write(tmp_path / "data.csv", '\ufeffquestion,answer\r\n"two\nlines, ""quoted""",042\r\n\r\nx,\r\n')
    assert contents(read_file(path)) == [
        (f"{path}:2", {"question": 'two\nlines, "quoted"', "answer": "042"}),
        (f"{path}:5", {"question": "x", "answer": ""}),
    ]


def test_csv_rows_with_the_wrong_number_of_fields_are_bad(tmp_path):
    path = write(tmp_path / "data.csv", "a,b\n1,2\n3\n4,5,6\n")
    assert [str(row) for _, row in contents(read_file(path))[1:]] == [
        f"{path}:3: CSV: has 1 fields, the header names 2",
        f"{path}:4: CSV: has 3 fields, the header names 2",
    ]


def test_csv_limits_and_faults(tmp_path):
    csv.field_size_limit(131_072)
    long = "x" * 300_000
    assert contents(read_file(write(tmp_path / "long.csv", f"a\n{long}\n")))[0][1] == {"a": long}
    assert csv.field_size_limit() == 131_072
    with pytest.raises(DataError, match=r"open\.csv:2: CSV: "):
        read_file(write(tmp_path / "open.csv", 'a\n"never closed\n'))
    with pytest.raises(DataError, match="two columns are called 'a'"):
        read_file(write(tmp_path / "twice.csv", "a,a\n1,2\n"))
    with pytest.raises(DataError, match="is empty"):
        read_file(write(tmp_path / "empty.csv", ""))


def test_tsv(tmp_path):
    assert contents(read_file(write(tmp_path / "data.tsv", "a\tb\n1,0\t2\n")))[0][1] == {"a": "1,0", "b": "2"}


def test_parquet_keeps_nested_types(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": i} for i in range(5)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert contents(read_file(path)) == [(f"{path}: row {i}", row) for i, row in enumerate(rows)]
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_file(write(tmp_path / "broken.parquet", b"PAR1 not really"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_that_are_not_utf8_are_refused_by_name(tmp_path, encoding, suffix):
    text = "a\ncafé\n" if suffix == ".csv" else json.dumps([{"a": "café"}], ensure_ascii=False)
    path = write(tmp_path / f"data{suffix}", text.encode(encoding))
    with pytest.raises(DataError, match=rf"data\{suffix}: .*UTF-"):
        read_file(path)


def test_unknown_suffix_and_unreadable_file(tmp_path):
    with pytest.raises(DataError, match=r"\.txt is not a data format; readable: \.json, \.jsonl"):
        read_file(write(tmp_path / "data.txt", "x"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_file(tmp_path / "gone.jsonl")

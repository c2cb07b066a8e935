"""Readers of local files: each row keeps its line, a broken line is a bad row, never a lost one.

json is read here rather than by Arrow's reader, which infers one schema for the whole file, gives no line numbers, and
fails where rows differ in columns or nesting. csv is read as text: inferring types would make 42 of the answer "42".
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aligntune.data.rows import BadRow, Row, Rows, from_list, from_table
from aligntune.errors import DataError

# An object whose rows sit under one of these keys; any other object is a row itself.
WRAPPERS = ("data", "rows", "examples", "instances", "items", "train", "test", "validation")


def read_file(path: Path) -> Rows:
    """The rows of one json, jsonl, ndjson, csv, tsv or parquet file.

    Raises:
        DataError: the file cannot be read as a whole; names file and line where there is one.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: {path.suffix or 'no suffix'} is not a data format; readable: {', '.join(READERS)}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Rows:
    if _first_byte(path) == b"[":
        return _read_json(path)  # an array under the wrong suffix: a line of JSONL cannot start with [
    rows: list[Row | BadRow] = []
    lines: list[int] = []
    with path.open("rb") as file:  # bytes: a line ends at \n alone, U+2028 inside a string does not end it
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = _without_bom(path, raw)
            if raw.strip():
                rows.append(_json_row(raw, f"{path}:{number}"))
                lines.append(number)
    return from_list(path.name, rows, lambda i: f"{path}:{lines[i]}")


def _json_row(raw: bytes, where: str) -> Row | BadRow:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(where, "JSON", f"not UTF-8 ({error.reason} at byte {error.start})", raw.decode(errors="replace"))
    except json.JSONDecodeError as error:
        return BadRow(where, "JSON", f"{error.msg} (column {error.colno})", raw.decode("utf-8").rstrip("\r\n"))
    except RecursionError:
        return BadRow(where, "JSON", "nested too deeply", raw.decode("utf-8").rstrip("\r\n"))
    return _row(value, where)


def _row(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(where, "JSON", f"is {_kind(value)}, a row must be a JSON object", value)


def _read_json(path: Path) -> Rows:
    text = _without_bom(path, path.read_bytes()).decode("utf-8")
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        return _array_rows(path, text, start)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return _lines_of_json(path, text)
    if not isinstance(whole, dict):
        raise DataError(f"{path}: holds {_kind(whole)}, not rows")
    for key in WRAPPERS:
        if isinstance(whole.get(key), list):
            places = [f"{path}: {key}[{i}]" for i in range(len(whole[key]))]
            rows = [_row(value, place) for value, place in zip(whole[key], places, strict=True)]
            return from_list(path.name, rows, places.__getitem__)
    return from_list(path.name, [whole], lambda i: f"{path}:1")


def _lines_of_json(path: Path, text: str) -> Rows:
    """A .json file that is not one JSON value: JSON lines under the wrong suffix, or broken."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        json.loads(first)
    except json.JSONDecodeError:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: JSON: {error.msg} (column {error.colno})") from error
    return _read_jsonl(path)


def _array_rows(path: Path, text: str, at: int) -> Rows:
    decode = json.JSONDecoder().raw_decode
    values: list[Any] = []
    lines: list[int] = []
    line = text.count("\n", 0, at) + 1
    at, line = _skip(text, at + 1, line)
    while text[at : at + 1] != "]":
        try:
            value, end = decode(text, at)
            after, _ = _skip(text, end, 0)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, after)
        except json.JSONDecodeError as error:
            # Inside an array nothing says where the next row starts, so what follows cannot be skipped to.
            raise DataError(f"{path}:{error.lineno}: JSON: {error.msg} (column {error.colno})") from error
        values.append(value)
        lines.append(line)
        line += text.count("\n", at, end)
        at, line = _skip(text, end, line)
        if text[at] == ",":
            at, line = _skip(text, at + 1, line)
    if text[at + 1 :].strip():
        raise DataError(f"{path}:{line}: JSON: something follows the closing ] of the array")
    shared = {line for line, count in Counter(lines).items() if count > 1}  # json.dump writes all rows on one line
    places = [f"{path}:{line}" + (f", row {i}" if line in shared else "") for i, line in enumerate(lines)]
    return from_list(path.name, [_row(*one) for one in zip(values, places, strict=True)], places.__getitem__)


def _skip(text: str, at: int, line: int) -> tuple[int, int]:
    while text[at : at + 1] in (" ", "\t", "\r", "\n") and at < len(text):
        line += text[at] == "\n"
        at += 1
    return at, line


def _read_csv(path: Path) -> Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[Row | BadRow] = []
    lines: list[int] = []
    with path.open(newline="", encoding="utf-8-sig") as file, _long_fields():
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{path}: is empty; the first line must name the columns")
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: two columns are called {_repeated(header)!r}")
            line = reader.line_num + 1
            for values in reader:
                if values:  # [] is a blank line
                    rows.append(_csv_row(header, values, f"{path}:{line}"))
                    lines.append(line)
                line = reader.line_num + 1  # a quoted field may span lines: a row stands where it starts
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: CSV: {error}") from error
    return from_list(path.name, rows, lambda i: f"{path}:{lines[i]}", columns=header)


def _csv_row(header: list[str], values: list[str], where: str) -> Row | BadRow:
    if len(values) == len(header):
        return dict(zip(header, values, strict=True))
    return BadRow(where, "CSV", f"has {len(values)} fields, the header names {len(header)}", values)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields longer than csv's own limit of 131,072 characters, without leaving the limit changed for others."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    return from_table(path.name, table, lambda i: f"{path}: row {i}")


def _without_bom(path: Path, raw: bytes) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(4096)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "an object")


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv,
    ".parquet": _read_parquet,
}  # fmt: skip

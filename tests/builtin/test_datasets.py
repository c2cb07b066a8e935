"""The embedded datasets: right answers, disjoint splits, the same rows every time, and no file run that is read."""

import inspect
import json
import re
import subprocess
import sys

import pytest

from aligntune.builtin import arithmetic, docstrings, is_builtin, load_dataset, names
from aligntune.errors import ConfigError

QUESTION = re.compile(r"What is (\d+) \+ (\d+)\?")


SIZES = {"train": 9490, "test": 510}
PINNED_TEST = ["What is 52 + 22?", "What is 4 + 43?", "What is 7 + 88?"]
PINNED_TRAIN = ["What is 10 + 9?", "What is 3 + 43?", "What is 72 + 29?"]


def solve(question):
    left, right = QUESTION.fullmatch(question).groups()
    return int(left) + int(right)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_three_forms_of_arithmetic_agree_and_are_right(split):
    forms = ("", "-preference", "-prompts")
    chat, pairs, prompts = (load_dataset(f"builtin:arithmetic{form}", split) for form in forms)
    assert len(chat) == len(pairs) == len(prompts) == SIZES[split]
    assert (chat.column_names, pairs.column_names, prompts.column_names) == (
        ["messages"], ["prompt", "chosen", "rejected"], ["prompt", "answer"])
    for row, pair, prompt in zip(chat, pairs, prompts, strict=True):
        question, answer = row["messages"]
        assert [question["role"], answer["role"]] == ["user", "assistant"]
        assert pair["prompt"] == prompt["prompt"] == [question] and pair["chosen"] == [answer]
        assert int(prompt["answer"]) == int(answer["content"]) == solve(question["content"]) >= 0
        assert pair["rejected"][0]["role"] == "assistant"
        assert int(pair["rejected"][0]["content"]) not in (-1, int(answer["content"]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_brief_pairs_hold_one_number_twice(split):
    rows = load_dataset("builtin:arithmetic-brief", split)
    assert len(rows) == SIZES[split] and rows.column_names == ["prompt", "chosen", "rejected"]
    said = set()
    for row in rows:
        right = str(solve(row["prompt"][0]["content"]))
        assert row["chosen"] == [{"role": "assistant", "content": right}]
        (answer,) = row["rejected"]
        assert re.findall(r"\d+", answer["content"]) == [right] and answer["role"] == "assistant"
        said.add(answer["content"].replace(right, "{}"))
    assert said == {*arithmetic.SENTENCES}


def test_train_and_held_out_share_no_problem_in_either_order():
    def problems(split):
        rows = load_dataset("arithmetic", split)
        return [tuple(map(int, QUESTION.fullmatch(row["messages"][0]["content"]).groups())) for row in rows]

    train, test = problems("train"), problems("test")
    assert (len(train), len(test)) == (SIZES["train"], SIZES["test"])
    assert len({*train}) == len(train) and len({*test}) == len(test)  # no row twice
    assert not {tuple(sorted(p)) for p in train} & {tuple(sorted(p)) for p in test}
    assert {*train, *test} == {(a, b) for a in range(100) for b in range(100)}


def test_the_rows_are_pinned():
    assert [problem.question for problem in arithmetic.problems("test")[:3]] == PINNED_TEST
    assert [problem.question for problem in arithmetic.problems("train")[:3]] == PINNED_TRAIN


def test_pydoc_is_this_pythons_documentation():
    train, test = load_dataset("builtin:pydoc"), load_dataset("builtin:pydoc", "test")
    assert len(train) > 3000 and len(train) / 30 < len(test) < len(train) / 10
    version = "{}.{}.{}".format(*sys.version_info[:3])
    assert version in train.info.description
    rows = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in [*train, *test]}
    assert len(rows) == len(train) + len(test)  # no question twice
    assert rows["What does `json.loads` do?"] == inspect.cleandoc(json.loads.__doc__)
    assert rows["What is the class `json.decoder.JSONDecoder`?"].startswith("Simple JSON")
    lengths = sorted(map(len, rows.values()))
    assert lengths[0] < 20 and lengths[-1] > 4000 and all(lengths)
    assert not any("._" in question or "`_" in question for question in rows)


SOURCE_A = '''"""Module a."""
raise SystemExit("imported")
def f():
    "F."
    def inner():
        "no"
'''
SOURCE_B = '''class C:
    """C."""
    def m(self):
        """M.

        More."""
    def _private(self): "no"
'''
SOURCE_C = '''if True:
    def g(): "first"
else:
    def g(): "second"
async def h(): "H"
def blank(): "  "
'''


def test_instruct_is_arithmetic_and_pydoc_together():
    both = load_dataset("instruct", "test")
    parts = [load_dataset(name, "test") for name in ("arithmetic", "pydoc")]
    assert list(both) == [*parts[0], *parts[1]]
    assert all(part.info.description in both.info.description for part in parts)


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_pydoc_reads_source_without_running_it(tmp_path):
    write(tmp_path, "a.py", SOURCE_A)
    write(tmp_path, "b/__init__.py", SOURCE_B)
    write(tmp_path, "b/c.py", SOURCE_C)
    write(tmp_path, "_hidden.py", '"""no"""')
    write(tmp_path, "test/t.py", '"""no"""')
    write(tmp_path, "broken.py", "def (:\n")
    write(tmp_path, "latin.py", "")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n'''caf\xe9'''\n")
    rows = [row["messages"] for split in ("train", "test") for row in docstrings.chat_rows(split, tmp_path)]
    assert {question["content"]: answer["content"] for question, answer in rows} == {
        "What is the module `a` for?": "Module a.",
        "What does `a.f` do?": "F.",
        "What is the class `b.C`?": "C.",
        "What does `b.C.m` do?": "M.\n\nMore.",
        "What does `b.c.g` do?": "first",
        "What does `b.c.h` do?": "H",
        "What is the module `latin` for?": "caf\u00e9",
    }


def test_names_and_unknown_names():
    assert is_builtin("builtin:pydoc") and is_builtin("builtin:") and not is_builtin("pydoc") and not is_builtin(None)
    assert names()["datasets"] == [
        "builtin:arithmetic", "builtin:arithmetic-preference", "builtin:arithmetic-brief",
        "builtin:arithmetic-prompts", "builtin:pydoc",
        "builtin:instruct"]
    for name in names()["datasets"]:
        assert len(load_dataset(name, "test")) > 100
    with pytest.raises(ConfigError, match="did you mean 'builtin:arithmetic'"):
        load_dataset("builtin:arithmetics")
    with pytest.raises(ConfigError, match="builtin:tiny is a model; the builtin datasets are"):
        load_dataset("builtin:tiny")
    with pytest.raises(ConfigError, match="split of builtin:pydoc 'val'"):
        load_dataset("builtin:pydoc", "val")


def test_importing_builtin_imports_nothing_heavy():
    code = ("import sys, aligntune.builtin as b; b.names(); b.is_builtin('x');"
            "print(sorted({'torch', 'transformers', 'datasets', 'tokenizers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The whole way: rows in = rows trained + rows reported, lengths, what rewards get, and the same in every process."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from aligntune.data import DataRequest, prepare, with_kl_completions
from aligntune.data.preview import preview
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, learnt, prepared, user
from tests.data.tokenizers import make

LONG = "Write a function that adds two numbers. " * 30

# Rows of which some are bad, for every shape: (takes, good rows, bad rows).
ENEMIES = {
    "sft": (data.MESSAGES, [{"messages": None}, {}, {"messages": [user("x")]}, {"messages": "x"},
                            {"messages": [user(LONG), assistant("x")]}]),
    "preference": (data.PREFERENCE_TURNS, [{"prompt": [user("x")], "chosen": [assistant("y")]}, {"prompt": 3},
                                           {"prompt": [user(LONG)], "chosen": [assistant("y")],
                                            "rejected": [assistant("z")]}]),
    "reward": (data.PREFERENCE, [{"prompt": "x", "chosen": "y", "rejected": None},
                                 {"prompt": "x", "chosen": LONG, "rejected": "z"}]),
    "unpaired": (data.UNPAIRED, [{"prompt": "x", "completion": "y", "label": None}, {"prompt": "x", "label": True},
                                 {"prompt": LONG, "completion": "y", "label": True}]),
    "prompts": (data.GSM8K, [{"question": "x", "answer": None}, {"question": "", "answer": "1"},
                             {"question": LONG, "answer": "1"}]),
}  # fmt: skip
COLUMNS = {
    "sft": ["input_ids", "labels"],
    "preference": ["prompt_ids", "chosen_ids", "rejected_ids"],
    "reward": ["chosen_ids", "rejected_ids"],
    "unpaired": ["prompt_ids", "completion_ids", "label"],
    "prompts": ["prompt", "question", "answer", "full_answer"],
}


def jsonl(path: Path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("takes", list(ENEMIES))
@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_every_row_is_trained_or_reported(takes, policy, tmp_path):
    good, bad = ENEMIES[takes]
    rows = [row for pair in zip(good * 4, bad, strict=False) for row in pair] + ["{broken", "[1]"] + good
    path = jsonl(tmp_path / "data.jsonl", rows)
    found = prepared(str(path), takes, "llama3.1", on_bad_row=policy, max_seq_length=200)
    report = found.report
    assert report.rows_read == len(rows) == report.rows_trained + len(report.bad)
    assert len(report.bad) == len(bad) + 2
    assert len(found.train) == report.rows_trained == len(bad) + len(good)
    assert found.train.column_names == COLUMNS[takes]
    # Each bad row is named by its line, in the order of the file.
    lines = [int(str(row).removeprefix(f"{path}:").split(":")[0]) for row in report.bad]
    assert lines == [2 * i + 2 for i in range(len(bad))] + [2 * len(bad) + 1, 2 * len(bad) + 2]
    assert all(row.field and row.why for row in report.bad)
    assert [row.row for row in report.bad][: len(bad)] == bad


@pytest.mark.parametrize("takes", list(ENEMIES))
def test_rows_of_a_json_array_on_one_line_are_told_apart(takes, tmp_path):
    """As json.dump writes them."""
    good, bad = ENEMIES[takes]
    rows = [*good, *bad, 3, *good]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    report = prepared(str(path), takes, "llama3.1", on_bad_row="skip", max_seq_length=200).report
    assert report.rows_trained == 2 * len(good)
    assert [one.where for one in report.bad] == [f"{path}:1, row {len(good) + at}" for at in range(len(bad) + 1)]
    assert [one.row for one in report.bad] == [*bad, 3]


def test_a_row_that_is_taken_twice_is_reported_twice(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [*data.MESSAGES, {"messages": None}])
    last = f"train[{len(data.MESSAGES)}:]"
    report = prepared(str(path), "sft", "llama3.1", on_bad_row="skip", split=f"train+{last}").report
    assert (report.rows_read, report.rows_trained, len(report.bad)) == (len(data.MESSAGES) + 2, len(data.MESSAGES), 2)


@pytest.mark.parametrize("takes", list(ENEMIES))
def test_bad_rows_stop_the_run_by_default_all_at_once(takes, tmp_path):
    good, bad = ENEMIES[takes]
    path = jsonl(tmp_path / "data.jsonl", [*good, *bad])
    with pytest.raises(DataError) as caught:
        prepared(str(path), takes, "llama3.1", max_seq_length=200)
    message = str(caught.value)
    assert message.startswith(f"{len(bad)} of {len(good) + len(bad)} rows of data.jsonl cannot be trained:")
    for i in range(len(bad)):
        assert f"\n  {path}:{len(good) + i + 1}: " in message
    assert "on_bad_row='skip'" in message


def test_many_bad_rows_are_listed_in_part_and_counted():
    rows = [{"text": None}] * 25 + data.TEXT
    with pytest.raises(DataError, match=r"25 of 27 rows[\s\S]*list: row 9: text: is null\n  \.\.\. and 15 more"):
        prepared(rows, "sft", "base")


def test_nothing_left_is_an_error_under_every_policy():
    for policy in ("skip", "quarantine"):
        with pytest.raises(DataError, match="none of 2 rows can be trained"):
            prepared([{"text": None}] * 2, "sft", "base", on_bad_row=policy)
    with pytest.raises(DataError, match="list has no rows"):
        prepared([], "sft", "base")
    with pytest.raises(DataError, match="dataset has no rows"):
        prepared(Dataset.from_dict({"text": []}), "sft", "base")


def test_a_file_of_nothing_but_broken_lines(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:1: JSON: "):
        prepared(str(jsonl(tmp_path / "data.jsonl", ["{", "}"])), "sft", "base", on_bad_row="skip")


def test_no_supervised_token_is_an_error():
    rows = [{"messages": [user(LONG), assistant("x")]}] * 3
    with pytest.raises(DataError, match="the prompt alone has .* tokens, so nothing that is trained is left"):
        prepared(rows, "sft", "llama3.1", max_seq_length=64)
    tokenizer = make("qwen3")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [user("x"), assistant("")]}]
    with pytest.raises(DataError, match="holds no token that is trained"):
        prepared(rows, "sft", tokenizer=tokenizer)


def test_long_rows_are_cut_and_counted_or_refused():
    rows = [{"messages": [user("q"), assistant(LONG)]}, {"messages": [user("q"), assistant("short")]}]
    found = prepared(rows, "sft", "qwen2.5", max_seq_length=100)
    assert [len(ids) for ids in found.train["input_ids"]] == [100, found.report.lengths[1]]
    assert found.report.truncated == 1 and found.report.truncated_percent == 50.0
    assert found.report.end_of_turn == 1 and found.report.end_of_turn_percent == 50.0
    assert found.report.lengths[0] > 100 and max(found.train[0]["labels"][-3:]) != -100
    with pytest.raises(DataError, match=r"row 0: length: \d+ tokens, max_seq_length is 100 \(truncation='error'\)"):
        prepared(rows, "sft", "qwen2.5", max_seq_length=100, truncation="error")


def test_a_cut_after_the_end_of_turn_leaves_it_supervised():
    rows = [{"messages": [user("a"), assistant("b"), user(LONG)]}]
    report = prepared(rows, "sft", "llama3.1", max_seq_length=100).report
    assert report.truncated == 1 and report.end_of_turn_percent == 100.0


def test_pairs_are_cut_to_length():
    rows = [{"prompt": [user("q")], "chosen": [assistant(LONG)], "rejected": [assistant("no")]}]
    found = prepared(rows, "preference", "llama3.1", max_seq_length=100)
    row = found.train[0]
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 100 > len(row["prompt_ids"]) + len(row["rejected_ids"])
    assert found.report.truncated == 1 and found.report.end_of_turn == 0
    with pytest.raises(DataError, match="list: row 0: chosen: .* tokens, max_seq_length is 100"):
        prepared(rows, "reward", "llama3.1", max_seq_length=100)  # its last token is scored: never cut


def test_prompts_are_never_cut():
    prompt = [user("Give three tips for staying healthy.")]
    length = prepared([{"prompt": prompt}], "prompts", "llama3.1").report.lengths[0]
    fits = prepared([{"prompt": prompt}], "prompts", "llama3.1", max_seq_length=length + 50, max_completion_length=50)
    assert fits.train[0]["prompt"] == prompt
    with pytest.raises(DataError, match=f"prompt: {length} tokens, at most {length - 1} fit"):
        prepared([{"prompt": prompt}], "prompts", "llama3.1", max_seq_length=length + 49, max_completion_length=50)


def test_rewards_get_every_column_that_users_have():
    rows = [
        {"prompt": "a", "answer": "1", "level": 1, "tags": ["x"], "meta": {"k": 1}},
        {"prompt": "b", "answer": 2, "level": None, "tags": [], "meta": {"j": "y"}},
    ]
    train = prepared(rows, "prompts", "llama3.1").train
    assert train[0] == {"prompt": [user("a")], "answer": "1", "level": 1, "tags": ["x"], "meta": {"k": 1, "j": None},
                        "full_answer": "1"}  # fmt: skip
    assert train[1]["answer"] == "2" and train[1]["level"] is None


def test_columns_of_mixed_types_and_late_columns():
    rows = [{"prompt": "a"}, {"prompt": "b", "x": 1}, {"prompt": "c", "x": "one", "y": 2.5}]
    found = prepared(rows, "prompts", "base")
    assert list(found.train["x"]) == ["null", "1", '"one"']
    assert list(found.train["y"]) == [None, None, 2.5] and list(found.train["prompt"]) == ["a", "b", "c"]
    assert any("column 'x' holds values of different types" in warning for warning in found.report.warnings)


def test_turns_of_prompts_keep_their_own_keys():
    """As an Arrow struct every turn would get `tool_calls: None`, and templates ask whether the key is there."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = [{"prompt": [user("q"), call, {"role": "tool", "content": "1", "name": "f"}]}, {"prompt": [user("r")]}]
    train = prepared(rows, "prompts", "qwen2.5").train
    assert train[0]["prompt"] == rows[0]["prompt"] and train[1]["prompt"] == rows[1]["prompt"]
    assert train[:2]["prompt"] == [row["prompt"] for row in rows]


def test_an_arrow_dataset_whose_turns_differ_in_keys():
    rows = [{"messages": [user("q"), {**assistant("a"), "reasoning_content": "r"}]}, data.MESSAGES[0]]
    train = prepared(Dataset.from_list(rows), "sft", "qwen3").train
    assert list(train["input_ids"]) == list(prepared(rows, "sft", "qwen3").train["input_ids"])


def test_unpaired_rows_of_pairs_stand_as_trl_orders_them():
    found = prepared(data.PREFERENCE, "unpaired", "base")
    assert list(found.train["label"]) == [True, True, False, False]
    assert found.report.rows_trained == 2 and found.report.examples == 4
    moved = with_kl_completions(found.train, 3)
    ids = list(found.train["completion_ids"])
    assert list(moved["KL_completion_ids"]) == [ids[2], ids[0], ids[1], ids[3]]


def test_identical_pairs_are_counted():
    rows = [*data.PREFERENCE, {"prompt": "x", "chosen": "y", "rejected": "y"}]
    report = prepared(rows, "preference", "base").report
    assert any("the same tokens" in warning and "1 of 3" in warning for warning in report.warnings)


def test_strings_on_a_chat_model_are_said():
    report = prepared(data.PREFERENCE, "preference", "llama3.1").report
    assert any("2 examples are plain strings" in warning for warning in report.warnings)
    assert not prepared(data.PREFERENCE, "preference", "base").report.warnings
    assert not prepared(data.PREFERENCE, "preference", "llama3.1", apply_chat_template=True).report.warnings


def test_evaluation_data_is_prepared_the_same_way():
    found = prepared(data.ALPACA * 5, "sft", "llama3.1", val_split_ratio=0.2)
    assert len(found.train) == 8 and len(found.eval) == 2
    assert found.report.eval.rows_read == found.report.eval.rows_trained == 2
    found = prepared(data.ALPACA, "sft", "llama3.1", eval_dataset=[data.ALPACA[1]])
    assert found.eval[0] == found.train[1]
    with pytest.raises(DataError, match="list: row 0: output: is null"):
        prepared(data.ALPACA, "sft", "llama3.1", eval_dataset=[{**data.ALPACA[0], "output": None}])


@pytest.mark.parametrize(
    ("name", "takes", "kind"),
    [
        ("arithmetic", "sft", "messages"), ("arithmetic-preference", "preference", "preference"),
        ("arithmetic-prompts", "prompts", "prompt + reference answer"),
        pytest.param("pydoc", "sft", "messages", marks=pytest.mark.slow),  # reads the whole standard library
    ],
)  # fmt: skip
def test_every_builtin_dataset_prepares(name, takes, kind):
    from aligntune.builtin import load_tokenizer

    found = prepared(f"builtin:{name}", takes, tokenizer=load_tokenizer("tiny"), max_samples=50, on_bad_row="skip")
    assert found.kind == kind and found.report.rows_read == 50 and len(found.train) > 40
    made_of = f"CPython {platform.python_version()}" if name == "pydoc" else "Sums of numbers from 0 to 99"
    assert any(made_of in note for note in found.report.notes) and made_of in found.report.text()


def test_every_source_gives_the_same_tokens(tmp_path):
    expected = list(prepared(data.ALPACA, "sft", "qwen3").train["input_ids"])
    (tmp_path / "a.json").write_text(json.dumps(data.ALPACA))
    (tmp_path / "a.csv").write_text("instruction,input,output\n" + "".join(
        ",".join(f'"{value}"' for value in row.values()) + "\n" for row in data.ALPACA))  # fmt: skip
    Dataset.from_list(data.ALPACA).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(data.ALPACA).save_to_disk(tmp_path / "saved")
    sources = [tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.parquet", tmp_path / "saved",
               jsonl(tmp_path / "a.jsonl", data.ALPACA), Dataset.from_list(data.ALPACA)]  # fmt: skip
    for source in sources:
        assert list(prepared(source, "sft", "qwen3").train["input_ids"]) == expected, source


def test_conversations_as_json_text_in_csv(tmp_path):
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerows([[json.dumps(row["messages"])] for row in data.MESSAGES])
    assert learnt(prepared(path, "sft", "llama3.1")) == "Paris.<|eot_id|>"


HALF = "\ud83d x"
HALVED = [
    ("sft", data.TEXT, {"text": HALF}, "text"),
    ("sft", data.PROMPT_COMPLETION, {"prompt": HALF, "completion": "y"}, "prompt"),
    ("sft", data.PROMPT_COMPLETION, {"prompt": "x", "completion": HALF}, "completion"),
    ("sft", data.PROMPT_COMPLETION_TURNS, {"prompt": [user("x")], "completion": [assistant(HALF)]},
     "completion[0].content"),
    ("sft", data.ALPACA, {"instruction": "x", "input": HALF, "output": "y"}, "input"),
    ("sft", data.MESSAGES, {"messages": [user("x"), assistant(HALF)]}, "messages[1].content"),
    ("sft", data.MESSAGES, {"messages": [{"from": "human", "value": HALF}, assistant("y")]}, "messages[0].value"),
    ("sft", data.MESSAGES, {"messages": [user([{"type": "text", "text": HALF}]), assistant("y")]},
     "messages[0].content[0].text"),
    ("sft", data.MESSAGES, {"messages": json.dumps([user("x"), assistant(HALF)])}, "messages[1].content"),
    ("sft", data.MESSAGES, {"messages": [user("x"), {**assistant("y"), "reasoning_content": HALF}]},
     "messages[1].reasoning_content"),
    ("sft", data.MESSAGES, {"other": HALF, "messages": [user("x"), assistant("y" + HALF)]}, "messages[1].content"),
    ("sft", data.MESSAGES, {"messages": [user("x"), assistant("y")], "tools": [{"name": HALF}]}, "tools[0].name"),
    ("sft", data.MESSAGES, {"messages": [user("x"), assistant("y")], "tools": json.dumps([{HALF: 1}])},
     r"tools[0]['\ud83d x']"),
    ("preference", data.PREFERENCE, {"prompt": "x", "chosen": "y", "rejected": HALF}, "rejected"),
    ("preference", data.PREFERENCE_TURNS, {"prompt": [user("x")], "chosen": [assistant(HALF)],
                                           "rejected": [assistant("z")]}, "chosen[0].content"),
    ("preference", data.TRANSCRIPTS, {"chosen": f"\n\nHuman: x\n\nAssistant: {HALF}",
                                      "rejected": "\n\nHuman: x\n\nAssistant: y"}, "chosen"),
    ("reward", data.PREFERENCE, {"prompt": "x", "chosen": HALF, "rejected": "y"}, "chosen"),
    ("unpaired", data.UNPAIRED, {"prompt": "x", "completion": HALF, "label": True}, "completion"),
    ("prompts", data.PROMPTS, {"prompt": [user(HALF)], "difficulty": 2}, "prompt[0].content"),
    ("prompts", data.GSM8K, {"question": "x", "answer": HALF}, "answer"),
    ("prompts", data.GSM8K, {"question": "x", "answer": "1", "tags": [{"of": HALF}]}, "tags[0].of"),
]


@pytest.mark.parametrize("policy", ["raise", "skip", "quarantine"])
@pytest.mark.parametrize(("takes", "good", "halved", "field"), HALVED)
def test_half_a_character_is_a_bad_row_of_every_layout(takes, good, halved, field, policy, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [*good, halved, *good])
    told = f"{path}:{len(good) + 1}: {field}: has a lone surrogate (half a character), which no tokenizer reads"
    if policy == "raise":
        with pytest.raises(DataError) as caught:
            prepared(str(path), takes, "qwen3")
        assert f"1 of {2 * len(good) + 1} rows" in str(caught.value) and f"  {told}\n" in str(caught.value)
        return
    found = prepared(str(path), takes, "qwen3", on_bad_row=policy)
    assert [str(row) for row in found.report.bad] == [told]
    assert found.report.rows_trained == 2 * len(good)
    assert found.report.write_bad_rows(tmp_path / "bad_rows.jsonl") == 1
    assert json.loads((tmp_path / "bad_rows.jsonl").read_text())["row"] == halved


def test_half_a_character_where_nothing_reads_it_and_whole_ones_are_trained():
    rows = [{"text": "a \U0001f642 b", "id": "\ud83d"}]
    found = prepared(rows, "sft", "base")
    assert found.report.rows_trained == 1 and learnt(found).startswith("a \U0001f642 b")
    rows = [{"prompt": "x", "chosen": "y", "rejected": HALF}]
    assert prepared(rows, "sft", "base").report.rows_trained == 1
    with pytest.raises(DataError, match="system_prompt has a lone surrogate"):
        prepared(data.MESSAGES, "sft", "qwen3", system_prompt=HALF)


SCRIPT = """
import json, sys
from tests.data.tokenizers import make
from aligntune.data import DataRequest, prepare
found = prepare(DataRequest(algorithm="sft", takes="sft", dataset=sys.argv[1], val_split_ratio=0.3), make("qwen3"))
print(json.dumps([found.train._fingerprint, found.eval._fingerprint, found.train[:]["input_ids"],
                  found.eval[:]["labels"]]))
"""


def test_every_process_prepares_the_same(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", data.ALPACA * 6)
    here = prepared(str(path), "sft", "qwen3", val_split_ratio=0.3)
    environment = {"PYTHONHASHSEED": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[2], env=environment)  # fmt: skip
    train, evaluation = here.train, here.eval
    assert json.loads(run.stdout) == [
        train._fingerprint, evaluation._fingerprint, train[:]["input_ids"], evaluation[:]["labels"],
    ]  # fmt: skip
    assert not [*tmp_path.rglob("*.arrow")]  # nothing is left in a cache that processes would share


def test_chunks_do_not_show(monkeypatch):
    rows = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(25)]
    whole = prepared(rows, "sft", "base")
    monkeypatch.setattr("aligntune.data.pipeline.CHUNK", 4)
    pieces = prepared(rows, "sft", "base")
    assert list(whole.train["input_ids"]) == list(pieces.train["input_ids"]) and whole.report == pieces.report


def test_random_rows_of_every_shape_never_get_lost():
    """Whatever stands in a row: it is trained or reported, and nothing else happens."""
    draw = random.Random(5)
    values = [None, "", "text", 3, 2.5, True, [], ["x"], [user("q")], [user("q"), assistant("a")], [assistant("a")],
              [{"role": "user"}], [{"from": "gpt", "value": "a"}], {"a": 1}, "\n\nHuman: q\n\nAssistant: a", "[{", LONG,
              [{"role": "user", "content": None}], [None], "\x00", "<|im_end|>"]  # fmt: skip
    shapes = {"sft": ("messages",), "preference": ("prompt", "chosen", "rejected"), "reward": ("chosen", "rejected"),
              "unpaired": ("prompt", "completion", "label"), "prompts": ("prompt", "answer")}  # fmt: skip
    for takes, columns in shapes.items():
        good = ENEMIES[takes][0] if takes not in ("reward", "prompts") else None
        good = good or {"reward": data.WHOLE_CONVERSATIONS, "prompts": [{"prompt": [user("q")], "answer": "1"}]}[takes]
        rows = list(good) * 20 + [{column: draw.choice(values) for column in columns} for _ in range(300)]
        found = prepared(rows, takes, "qwen3", on_bad_row="skip", max_seq_length=120)
        report = found.report
        assert report.rows_read == len(rows) == report.rows_trained + len(report.bad), takes
        assert len(found.train) == report.examples >= 1 and len(report.bad) > 10


def test_preview_reports_where_training_would_stop():
    request = DataRequest(algorithm="sft", takes="sft", dataset=[*data.TEXT, {"text": None}])
    report = preview(request, make("base"))
    assert report.rows_trained == 2 and len(report.bad) == 1
    assert report.warnings[0].startswith("training would stop here: 1 bad row")
    with pytest.raises(DataError):
        prepare(request, make("base"))


def test_importing_the_package_imports_neither_datasets_nor_transformers():
    code = ("import sys, aligntune.data; from aligntune.data import DataRequest; "
            "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

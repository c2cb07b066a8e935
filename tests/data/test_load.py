"""Sources, splits, slices, held-out rows and column names."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from aligntune.data import DataRequest
from aligntune.data.load import load
from aligntune.errors import ConfigError, DataError

ROWS = [{"text": f"row {i}"} for i in range(20)]


def ask(dataset, **options):
    return load(DataRequest(algorithm="sft", takes="sft", dataset=dataset, **options))


def texts(rows):
    return [row["text"] for chunk in rows.chunks(7) for _, row in chunk]


def places(rows):
    return [where for chunk in rows.chunks(7) for where, _ in chunk]


def jsonl(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALL = [row["text"] for row in ROWS]


def test_list_and_dataset_and_file_give_the_same_rows(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    for dataset in (ROWS, Dataset.from_list(ROWS), str(path), path):
        train, evaluation = ask(dataset)
        assert texts(train) == ALL and evaluation is None
    assert places(ask(ROWS)[0])[3] == "list: row 3"
    assert places(ask(Dataset.from_list(ROWS))[0])[3] == "dataset: row 3"
    assert places(ask(path)[0])[3] == f"{path}:4"


def test_formats_of_a_dataset_do_not_reach_the_rows():
    dataset = Dataset.from_list([{"text": "x", "ids": [1, 2]}]).with_format("numpy")
    [(_, row)] = next(ask(dataset)[0].chunks(5))
    assert row == {"text": "x", "ids": [1, 2]} and type(row["ids"]) is list


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ALL), ("train[:10%]", ALL[:2]), ("train[5:8]", ALL[5:8]), ("train[-3:]", ALL[-3:]),
        ("train[:2]+train[50%:60%]", ALL[:2] + ALL[10:12]), (" train [ :1] ", ALL[:1]),
    ],
)  # fmt: skip
def test_splits_and_slices_hold_for_every_source(tmp_path, split, expected):
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    for dataset in (ROWS, Dataset.from_list(ROWS), str(path)):
        train, _ = ask(dataset, split=split)
        assert texts(train) == expected
    assert places(ask(str(path), split="train[5:8]")[0]) == [f"{path}:{line}" for line in (6, 7, 8)]


def test_slices_mean_what_datasets_means_by_them():
    dataset = Dataset.from_list(ROWS[:13])
    for spec in ("train[:10%]", "train[33%:66%]", "train[-2:]", "train[3:]"):
        instruction = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": 13})[0]
        assert texts(ask(dataset, split=spec)[0]) == ALL[instruction.from_ : instruction.to]


def test_unknown_and_unreadable_splits(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(DataError, match="unknown split 'tran'; did you mean 'train'"):
        ask(path, split="tran")
    with pytest.raises(DataError, match="unknown split 'test'"):
        ask(ROWS, split="test[:5]")
    with pytest.raises(DataError, match="cannot be read"):
        ask(ROWS, split="train[1")
    with pytest.raises(DataError, match="cannot be read"):
        ask(ROWS, split="train[:200%]")


def test_dataset_dict_takes_train_or_the_only_split():
    parts = DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[3:5]))
    assert texts(ask(parts)[0]) == ALL[:3]
    assert texts(ask(parts, split="test")[0]) == ALL[3:5]
    assert texts(ask(DatasetDict(other=Dataset.from_list(ROWS[:2])))[0]) == ALL[:2]
    with pytest.raises(DataError, match="has the splits a, b; say which"):
        ask(DatasetDict(a=Dataset.from_list(ROWS[:1]), b=Dataset.from_list(ROWS[:1])))


def test_max_samples_takes_the_first_and_says_so():
    train, _ = ask(ROWS, split="train[5:]", max_samples=3)
    assert texts(train) == ALL[5:8]
    assert train.notes == ("the first 3 of 15 rows",)
    assert ask(ROWS, max_samples=100)[0].notes == ()


def test_held_out_rows_are_disjoint_complete_and_drawn_by_seed():
    train, evaluation = ask(ROWS, val_split_ratio=0.2)
    assert len(train) == 16 and len(evaluation) == 4
    assert sorted(texts(train) + texts(evaluation), key=ALL.index) == ALL
    assert texts(train) == sorted(texts(train), key=ALL.index)
    assert texts(evaluation) == [ALL[i] for i in (0, 3, 7, 8)]  # seed 42; the same in every process and version
    again = ask(ROWS, val_split_ratio=0.2, seed=7)[1]
    assert texts(again) != texts(evaluation)
    with pytest.raises(DataError, match="both need at least one"):
        ask(ROWS[:3], val_split_ratio=0.01)
    with pytest.raises(ConfigError, match="give one of them"):
        ask(ROWS, val_split_ratio=0.2, eval_split="test")


def test_evaluation_data_of_its_own():
    train, evaluation = ask(ROWS[:5], eval_dataset=ROWS[5:], max_eval_samples=2)
    assert texts(train) == ALL[:5] and texts(evaluation) == ALL[5:7]
    parts = DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[3:5]))
    assert texts(ask(parts, eval_split="test")[1]) == ALL[3:5]
    assert texts(ask(parts, eval_split="train[:1]")[1]) == ALL[:1]
    with pytest.raises(DataError, match=r"^eval_split: the list: unknown split 'test'.*val_split_ratio=0.1 holds out"):
        ask(ROWS, eval_split="test")
    # A dataset that is named for evaluation gives its validation or test part first.
    assert texts(ask(ROWS, eval_dataset=parts)[1]) == ALL[3:5]


def test_folder_of_files_by_split(tmp_path):
    jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:3])
    jsonl(tmp_path / "train-00001-of-00002.jsonl", [*ROWS[3:5], {"text": "more", "extra": 1}])
    jsonl(tmp_path / "val.jsonl", ROWS[5:7])
    jsonl(tmp_path / "test" / "part.jsonl", ROWS[7:8])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    train, evaluation = ask(tmp_path, eval_split="validation")
    assert texts(train) == [*ALL[:5], "more"] and texts(evaluation) == ALL[5:7]
    assert places(train)[3:5] == [f"{tmp_path / 'train-00001-of-00002.jsonl'}:{line}" for line in (1, 2)]
    assert train.columns == ("text", "extra")
    assert texts(ask(str(tmp_path), split="test")[0]) == ALL[7:8]
    assert texts(ask(tmp_path, split="train[2:4]")[0]) == ALL[2:4]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with a suffix"):
        ask(tmp_path / "empty")


def test_folder_of_save_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:2]), test=Dataset.from_list(ROWS[2:3])).save_to_disk(tmp_path / "two")
    assert texts(ask(tmp_path / "one")[0]) == ALL
    assert texts(ask(tmp_path / "two", split="test")[0]) == ALL[2:3]


def test_builtin():
    train, evaluation = ask("builtin:arithmetic", max_samples=3, eval_split="test[:2]")
    assert len(train) == 3 and len(evaluation) == 2
    assert places(train)[2] == "builtin:arithmetic[train]: row 2"
    with pytest.raises(ConfigError, match="arithmetic"):
        ask("builtin:arithmatic")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        ask("builtin:arithmetic", split="dev")


def test_column_mapping(tmp_path):
    train, _ = ask([{"body": "x", "other": 1}], column_mapping={"body": "text"})
    assert train.columns == ("text", "other")
    assert next(train.chunks(1))[0][1] == {"text": "x", "other": 1}
    swapped, _ = ask([{"a": 1, "b": 2}], column_mapping={"a": "b", "b": "a"})
    assert next(swapped.chunks(1))[0][1] == {"b": 1, "a": 2}
    with pytest.raises(DataError, match="unknown column 'bodi'; did you mean 'body'"):
        ask([{"body": "x"}], column_mapping={"bodi": "text"})
    with pytest.raises(DataError, match=r"no column 'text'; is \{'body': 'text'\} meant\?$"):
        ask([{"body": "x"}], column_mapping={"text": "body"})
    with pytest.raises(DataError, match="there is a column 'text' already"):
        ask([{"body": "x", "text": "y"}], column_mapping={"body": "text"})
    with pytest.raises(DataError, match="two columns to one name"):
        ask([{"a": "x", "b": "y"}], column_mapping={"a": "text", "b": "text"})


def test_what_is_not_a_dataset(tmp_path, monkeypatch):
    jsonl(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder: .*did you mean .*mine\.jsonl"):
        ask(str(tmp_path / "mne.jsonl"))
    with pytest.raises(DataError, match="there is no folder .* either"):
        ask(str(tmp_path / "no" / "mine.jsonl"))
    with pytest.raises(DataError, match="row 1 is str"):
        ask([{"text": "x"}, "y"])
    with pytest.raises(DataError, match="not dict"):
        ask({"text": ["x"]})
    with pytest.raises(DataError, match="streaming"):
        ask(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(DataError, match="transform"):
        ask(Dataset.from_list(ROWS).with_transform(lambda batch: batch))


class Hub:
    """Stands where the network would be: `datasets.load_dataset`, answered from memory."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def __call__(self, path, name=None, **options):
        self.calls.append((path, name, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch):
    def install(answer):
        fake = Hub(answer)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        return fake

    return install


def test_hub_dataset(hub):
    fake = hub(DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:4])))
    train, evaluation = ask("owner/name", dataset_config="main", split="train[:10%]", eval_split="test")
    assert texts(train) == ALL[:2] and texts(evaluation) == ALL[:4]
    assert fake.calls[0][:2] == ("owner/name", "main")
    assert places(train)[1] == "owner/name[train]: row 1"
    with pytest.raises(DataError, match="unknown split 'tests'; did you mean 'test'"):
        ask("owner/name", split="tests")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "HF_HUB_OFFLINE=1"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"), "gated dataset needs"),
        (ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"), "dataset_config="),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), "loading script"),
        (datasets.exceptions.DatasetGenerationError("An error occurred while generating"), "cannot be loaded"),
    ],
)
def test_hub_failures_are_clear(hub, error, hint):
    hub(error)
    with pytest.raises(DataError, match="'owner/name' cannot be loaded from the hub") as caught:
        ask("owner/name")
    assert hint in str(caught.value) and str(error).splitlines()[0] in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_real_load_dataset_reads_a_hub_layout(tmp_path, monkeypatch):
    """No mock: datasets itself, on a folder that has the layout of a hub repository."""
    jsonl(tmp_path / "repo" / "data" / "train-00000.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    real, cache = datasets.load_dataset, str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: real(str(tmp_path / name), config, cache_dir=cache)
    )
    assert texts(ask("repo", split="train[:3]")[0]) == ALL[:3]


def test_every_wrong_option_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        DataRequest(algorithm="sft", takes="sfts", dataset=[], on_bad_row="skipp", max_samples=0, val_split_ratio=1.5,
                    max_seq_length=1)  # fmt: skip
    parts = ("5 faults", "did you mean 'sft'", "did you mean 'skip'", "max_samples", "between 0 and 1", "at least 2")
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        DataRequest(algorithm="grpo", takes="prompts", dataset=[], max_seq_length=256, max_completion_length=256)

"""Find a dataset and the part of it that a run uses: hub, files, folders, `builtin:`, objects; splits and slices."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.data.files import READERS, read_file
from aligntune.data.rows import Rows, concatenate, from_dataset, from_list
from aligntune.errors import DataError, nearest, unknown

if TYPE_CHECKING:
    from aligntune.data.request import DataRequest

BUILTIN = "builtin:"
# What a file's name says about its split; anything else is training data.
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation",
}  # fmt: skip
EVAL_SPLITS = ("validation", "valid", "val", "dev", "test", "eval")
_TERM = re.compile(r"([\w.\-]+?)(\[[^\]]*\])?(\(\w+\))?")

Reader = Callable[[], Rows]


def load(request: DataRequest) -> tuple[Rows, Rows | None]:
    """The training rows and the evaluation rows (or None) that `request` asks for.

    Raises:
        DataError: nothing can be read there, or there is no such split or column.
    """
    train = _limit(_source(request.dataset, request, request.split, wanted=("train",)), request.max_samples)
    evaluation = None
    if request.eval_dataset is not None:
        evaluation = _source(request.eval_dataset, request, request.eval_split, wanted=(*EVAL_SPLITS, "train"))
    elif request.eval_split is not None:
        try:
            evaluation = _source(request.dataset, request, request.eval_split, wanted=())
        except DataError as error:  # its training rows were read: it is the split
            raise DataError(f"eval_split: {error}; eval_split=null val_split_ratio=0.1 holds out a part of the "
                            "training rows instead") from None
    elif request.val_split_ratio is not None:
        train, evaluation = _hold_out(train, request.val_split_ratio, request.seed)
    if evaluation is not None:
        evaluation = _rename(_limit(evaluation, request.max_eval_samples), request.column_mapping)
    return _rename(train, request.column_mapping), evaluation


def _source(dataset: Any, request: DataRequest, split: str | None, *, wanted: tuple[str, ...]) -> Rows:
    """`wanted`: the splits to take, in order of preference, where `split` is None."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        readers: dict[str, Reader] = {key: _dataset_reader(f"dataset[{key}]", part) for key, part in dataset.items()}
        return _choose(readers, split, "the DatasetDict", wanted)
    if isinstance(dataset, datasets.Dataset):
        return _choose({"train": _dataset_reader("dataset", dataset)}, split, "the Dataset", wanted)
    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError("a streaming dataset has no length and cannot be checked before training; load it without "
                        "streaming=True, or take the part you need: list(dataset.take(10_000))")  # fmt: skip
    if isinstance(dataset, list | tuple):
        return _choose({"train": lambda: _from_objects(dataset)}, split, "the list", wanted)
    if not isinstance(dataset, str | Path):
        raise DataError(f"a dataset is a hub id, a path, 'builtin:NAME', a datasets.Dataset or a list of dicts, "
                        f"not {type(dataset).__name__}")  # fmt: skip
    text = str(dataset)
    if text.startswith(BUILTIN):
        return _builtin(text, split, wanted)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, split, wanted)
    if path.is_file():
        return _choose({"train": lambda: read_file(path)}, split, text, wanted)
    if isinstance(dataset, Path) or _looks_local(text):
        raise DataError(_missing_path(path))
    return _hub(text, request, split, wanted)


def _choose(readers: Mapping[str, Reader], split: str | None, name: str, wanted: tuple[str, ...]) -> Rows:
    """The rows of `split` out of the named parts; only the parts that are used are read."""
    if split is None:
        split = _default_split(list(readers), name, wanted)
    split = "".join(split.split())
    terms = [_TERM.fullmatch(term) for term in split.split("+")]
    names = [match.group(1) for match in terms if match]
    if not all(terms):
        raise DataError(f"split {split!r} cannot be read; write a split ('train'), a slice ('train[:10%]') or a sum")
    for asked in names:
        if asked not in readers:
            raise DataError(f"{name}: {unknown('split', asked, readers)}")
    parts = {asked: readers[asked]() for asked in dict.fromkeys(names)}
    if split in parts:
        return parts[split]
    return _sliced(parts, split, name)


def _sliced(parts: Mapping[str, Rows], split: str, name: str) -> Rows:
    import datasets

    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(part) for key, part in parts.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{name}: split {split!r} cannot be read: {error}") from error
    chosen = [replace(parts[p.splitname], index=parts[p.splitname].index[p.from_ : p.to]) for p in pieces]
    return chosen[0] if len(chosen) == 1 else concatenate(f"{name} [{split}]", chosen)


def _default_split(names: list[str], name: str, wanted: tuple[str, ...]) -> str:
    for candidate in wanted:
        if candidate in names:
            return candidate
    if len(names) == 1:
        return names[0]
    raise DataError(f"{name} has the splits {', '.join(names)}; say which with split=")


def _limit(rows: Rows, count: int | None) -> Rows:
    if count is None or count >= len(rows):
        return rows
    return replace(rows, index=rows.index[:count], notes=(*rows.notes, f"the first {count:,} of {len(rows):,} rows"))


def _hold_out(rows: Rows, ratio: float, seed: int) -> tuple[Rows, Rows]:
    """Both parts keep the order of the data; the draw depends on `seed` and the number of rows alone."""
    count = round(len(rows) * ratio)
    if not 0 < count < len(rows):
        raise DataError(f"val_split_ratio {ratio} of {len(rows)} rows is {count} for evaluation and "
                        f"{len(rows) - count} for training; both need at least one")  # fmt: skip
    held = set(random.Random(seed).sample(range(len(rows)), count))
    train = [at for i, at in enumerate(rows.index) if i not in held]
    evaluation = [at for i, at in enumerate(rows.index) if i in held]
    return replace(rows, index=train), replace(
        rows, index=evaluation, notes=(*rows.notes, f"{count:,} rows held out of the training data (seed {seed})")
    )


def _rename(rows: Rows, mapping: Mapping[str, str] | None) -> Rows:
    if not mapping:
        return rows
    faults = [_unmapped(column, ours, rows) for column, ours in mapping.items() if column not in rows.columns]
    kept = [column for column in rows.columns if column not in mapping]
    for column, ours in mapping.items():
        if ours in kept and column in rows.columns:
            faults.append(f"column_mapping sends {column!r} to {ours!r}, but there is a column {ours!r} already; "
                          f"map that one to another name as well")  # fmt: skip
    if len(set(mapping.values())) < len(mapping):
        faults.append(f"column_mapping sends two columns to one name: {dict(mapping)}")
    if faults:
        raise DataError(f"{rows.name}: " + "; ".join(faults))
    columns = tuple(mapping.get(column, column) for column in rows.columns)
    return replace(rows, columns=columns, renamed=dict(mapping))


def _unmapped(column: str, ours: str, rows: Rows) -> str:
    if ours in rows.columns:
        return (f"column_mapping reads {{the dataset's column: the column meant}}, and there is no column {column!r}; "
                f"is {{{ours!r}: {column!r}}} meant?")
    return f"column_mapping names a column that is not there: {unknown('column', column, rows.columns)}"


def _dataset_reader(name: str, dataset: Any) -> Reader:
    def read() -> Rows:
        if dataset.format["type"] == "custom":
            raise DataError(f"{name} has a transform set on it (with_transform); its rows may differ at every reading. "
                            "Apply it with .map() first")  # fmt: skip
        return from_dataset(name, dataset)

    return read


def _from_objects(rows: list[Any] | tuple[Any, ...]) -> Rows:
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"a list dataset holds one dict per row; row {i} is {type(row).__name__}")
    return from_list("list", rows, lambda i: f"list: row {i}")


def _builtin(name: str, split: str | None, wanted: tuple[str, ...]) -> Rows:
    from aligntune.builtin import load_dataset

    def read(part: str) -> Rows:
        dataset = load_dataset(name.removeprefix(BUILTIN), part)
        rows = from_dataset(f"{name}[{part}]", dataset)
        made_of = dataset.info.description
        return replace(rows, notes=(*rows.notes, made_of)) if made_of else rows

    def reader(part: str) -> Reader:
        return lambda: read(part)

    return _choose({part: reader(part) for part in ("train", "test")}, split, name, wanted)


def _folder(path: Path, split: str | None, wanted: tuple[str, ...]) -> Rows:
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: looks like a folder of save_to_disk but cannot be read: {error}") from error
        named = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return _choose({k: _dataset_reader(f"{path}[{k}]", v) for k, v in named.items()}, split, str(path), wanted)
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in READERS and file.is_file() and not file.name.startswith("."):
            files.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not files:
        raise DataError(f"{path}: no file with a suffix of {', '.join(READERS)} in this folder")
    readers = {key: _files_reader(f"{path} [{key}]", parts) for key, parts in files.items()}
    return _choose(readers, split, str(path), wanted)


def _files_reader(name: str, files: list[Path]) -> Reader:
    def read() -> Rows:
        parts = [read_file(file) for file in files]
        return parts[0] if len(parts) == 1 else concatenate(name, parts)

    return read


def _split_of(file: Path) -> str:
    """The split that a file's folder or name speaks of: `test/a.json`, `test.jsonl`, `train-00000-of-00002.parquet`."""
    for text in (*file.parts[:-1], file.stem):
        for word in re.split(r"[^a-z]+", text.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def _looks_local(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or (text.count("/") > 1 and not text.startswith(("hf://", "buckets/")))
        or "\\" in text
        or Path(text).suffix.lower() in {*READERS, ".txt", ".gz", ".zst", ".zip", ".arrow", ".xlsx", ".yaml"}
    )


def _missing_path(path: Path) -> str:
    message = f"no such file or folder: {path}"
    folder = path.parent
    if not folder.is_dir():
        return f"{message} (there is no folder {folder} either)"
    close = nearest(path.name, (entry.name for entry in folder.iterdir()))
    return f"{message}; did you mean {folder / close}?" if close else message


def _hub(name: str, request: DataRequest, split: str | None, wanted: tuple[str, ...]) -> Rows:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # What datasets raises on purpose; RuntimeError is "dataset scripts are no longer supported".
    failures = (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError)
    try:
        # Without split=: datasets downloads and builds every split in any case, and the split is then chosen (and
        # sliced) here by the same rules as for files.
        found = datasets.load_dataset(name, request.dataset_config)
    except failures as error:
        raise DataError(_hub_message(name, request, error)) from error
    named = found if isinstance(found, dict) else {"train": found}
    return _choose({key: _dataset_reader(f"{name}[{key}]", part) for key, part in named.items()}, split, name, wanted)


def _hub_message(name: str, request: DataRequest, error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    hints = []
    if isinstance(error, ConnectionError):
        hints.append("no connection to the hub: check the network, or set HF_HUB_OFFLINE=1 to use what is cached")
    elif "Config name is missing" in text or "BuilderConfig" in text:
        hints.append("name one of its configurations: dataset_config=")
    elif "script" in text.lower():
        hints.append("it needs a loading script, which the datasets library no longer runs; use a parquet copy of it")
    elif isinstance(error, FileNotFoundError):
        hints.append("check the spelling; a private or gated dataset needs `hf auth login`")
    if isinstance(error, (ConnectionError, FileNotFoundError)):
        hints.append(f"a local file needs its path ({name} was not found under the current folder {Path.cwd()})")
    config = f" (configuration {request.dataset_config!r})" if request.dataset_config else ""
    return "\n  ".join([f"the dataset {name!r}{config} cannot be loaded from the hub: {text}", *hints])

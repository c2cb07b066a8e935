"""What a run leaves on disk, and who may write it.

    config.yaml         the resolved configuration
    environment.json    versions, machine, card, commit, command line
    attestation.json    what ran
    data_report.md      what the model saw
    metrics.jsonl       one line a log: step, epoch, time, kind ("train" or "eval"), and the numbers
    loss.png            and reward.png for online methods
    checkpoint-N/       what training resumes from
    summary.json        how it ended

Only the main process writes. A file is written beside its place and renamed into it: a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aligntune.core.environment import redact, snapshot
from aligntune.errors import AlignTuneError, CheckpointError, ConfigError

CONFIG, ENVIRONMENT, ATTESTATION = "config.yaml", "environment.json", "attestation.json"
METRICS, SUMMARY, DATA_REPORT = "metrics.jsonl", "summary.json", "data_report.md"
PLOTS = ("loss.png", "reward.png")
TENSORBOARD = "tb"
FILES = (CONFIG, ENVIRONMENT, ATTESTATION, METRICS, SUMMARY, DATA_REPORT, *PLOTS)
_CHECKPOINT = re.compile(r"(?:old-)?checkpoint-\d+(?:-\d+)?")
_OLD_METRICS = re.compile(r"metrics-\d+\.jsonl")
_HEADER = "# The resolved configuration of an aligntune run.\n"


class RunDir:
    """The folder of one run.

    Args:
        path: the folder; made at the first write.
        is_main: whether this process writes; None reads the launcher's RANK.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_main: bool | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.is_main = os.environ.get("RANK", "0") == "0" if is_main is None else is_main

    @classmethod
    def create(
        cls, output_dir: str | os.PathLike[str] | None = None, *, algorithm: str, model_name: str,
        resume: bool | str | os.PathLike[str] = False, overwrite: bool = False, root: str | os.PathLike[str] = "runs",
    ) -> RunDir:
        """The folder for a new run, or of the run that `resume` continues.

        Args:
            output_dir: the folder; None makes `<root>/<algorithm>-<model>-<YYYYmmdd-HHMMSS>`. With `resume=True`,
                None takes the newest folder of that algorithm and model that has a checkpoint; with a path, the
                folder of that checkpoint.
            resume: True continues from the folder's newest complete checkpoint; a path (a checkpoint) only says
                that a run is continued here, whatever the folder holds.
            overwrite: remove what an earlier run left in `output_dir` (and nothing else) first.

        Raises:
            ConfigError: the folder cannot be written, or holds another run and neither `resume` nor `overwrite` is
                given.
            CheckpointError: `resume=True` and there is nothing to continue.
        """
        stem = f"{_slug(algorithm)}-{_slug(Path(str(model_name)).name.removeprefix('builtin:'))}"

        def settle() -> str:
            folder = output_dir
            if folder is None:
                if resume is True:
                    return str(_newest(Path(root), stem))
                if not resume:
                    return str(_fresh(Path(root), stem))
                given = Path(resume).expanduser().absolute()
                folder = given.parent if _CHECKPOINT.fullmatch(given.name) else given
            run = cls(folder, is_main=True)
            if run.path.exists() and not run.path.is_dir():
                raise ConfigError(f"output_dir: {str(run.path)!r} is a file")
            if run.foreign_config():
                raise ConfigError(
                    f"output_dir: {str(folder)!r} has a {CONFIG} that no run wrote, and the run would write over "
                    "it; give another folder"
                )
            if resume is True:
                _require_checkpoint(run)
            elif not resume and not overwrite and run.holds_a_run():
                raise ConfigError(
                    f"output_dir: {str(folder)!r} holds another run ({', '.join(run.leftovers()[:4])}, ...); "
                    "resume=True continues it, another output_dir keeps both, overwrite=True removes it first"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            check_file_in(run.path)
            if overwrite and not resume:
                run.clear()
            return str(run.path)

        def attempt() -> str:
            from_resume = root if isinstance(resume, bool) else resume
            with writing("output_dir", from_resume if output_dir is None else output_dir):
                return settle()

        return cls(on_main_process(attempt))

    # What is there

    def leftovers(self) -> list[str]:
        """Names of the files and folders here that a run writes."""
        if not self.path.is_dir():
            return []
        return sorted(
            entry.name for entry in self.path.iterdir()
            if (entry.name in (*FILES, TENSORBOARD) and not (entry.name == CONFIG and self.foreign_config()))
            or _CHECKPOINT.fullmatch(entry.name) or _OLD_METRICS.fullmatch(entry.name)
        )

    def foreign_config(self) -> bool:
        """Whether config.yaml here is somebody's own file."""
        path = self.path / CONFIG
        return path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_HEADER)

    def holds_a_run(self) -> bool:
        """Whether a run has been started here."""
        return bool(self.leftovers())

    def clear(self) -> None:
        """Remove what a run wrote here; files of any other name stay."""
        if not self.is_main:
            return
        for name in self.leftovers():
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()

    @property
    def tensorboard(self) -> Path:
        return self.path / TENSORBOARD

    # What is written

    def write_text(self, name: str, text: str) -> None:
        """Write one file of the run, whole or not at all; nothing on other processes than the main one."""
        if not self.is_main:
            return
        write_atomic(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")

    def write_config(self, yaml_text: str) -> None:
        """The resolved configuration, without strings of the shape of an access token."""
        self.write_text(CONFIG, _HEADER + redact(yaml_text))

    def write_environment(self) -> None:
        if self.is_main:
            self.write_json(ENVIRONMENT, snapshot())

    def write_attestation(self, attestation: Mapping[str, Any]) -> None:
        self.write_json(ATTESTATION, attestation)

    def write_data_report(self, text: str) -> None:
        self.write_text(DATA_REPORT, text if text.endswith("\n") else text + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_json(SUMMARY, summary)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of one of the run's JSON files, or None where it is absent."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    # metrics.jsonl

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; NaN and infinities are written as null, which is JSON."""
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps(jsonable(record), ensure_ascii=False) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; the half line that a killed process leaves is not one."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in records if isinstance(record, dict)]

    def cut_metrics(self, step: int) -> None:
        """Drop the records after `step`: training continues from there and writes them again."""
        records = self.read_metrics()
        if self.is_main and records:
            kept = [json.dumps(record, ensure_ascii=False) for record in records if record.get("step", 0) <= step]
            self.write_text(METRICS, "".join(line + "\n" for line in kept))

    def set_metrics_aside(self) -> Path | None:
        """Before training starts anew here: move metrics.jsonl to metrics-K.jsonl if it has training records."""
        if not self.is_main or not any(record.get("kind") == "train" for record in self.read_metrics()):
            return None
        number = 1
        while (target := self.path / f"metrics-{number}.jsonl").exists():
            number += 1
        os.replace(self.path / METRICS, target)
        return target

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"


@contextlib.contextmanager
def writing(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what the system refuses in the block of `path`, as the user gave it: not of a file of ours in it.

    Raises:
        ConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        given = str(Path(path).expanduser().absolute())
        raise ConfigError(f"{what}: {given!r} cannot be written: {error.strerror or error}") from error


def check_file_in(folder: Path) -> None:
    """Make a file in `folder` that is gone at once: permission bits do not tell whether one can be made.

    Raises:
        OSError: none can.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` through a file beside it, so that a crash leaves the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and numpy numbers as numbers, NaN and infinities as None."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)


_stores: list[Any] = []  # held for the life of the process: rank 0's is the server that the others read from


def on_main_process(work: Callable[[], str]) -> str:
    """`work()` done by the main process, its result or its error on all of them.

    Without this, each process would choose a folder by its own clock, or wait for one that met an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return work()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if os.environ.get("RANK", "0") == "0":
        try:
            outcome[0] = work()
        except (AlignTuneError, OSError) as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    else:
        outcome = _over_store(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _over_store(outcome: list[Any]) -> list[Any]:
    """Rank 0's `outcome`, through the launcher's rendezvous.

    No process group yet: whoever starts one here chooses its backend, and accelerate, asked before it is told that the
    run is on CPU, settles for a world of one process.
    """
    import torch.distributed as dist

    if not _stores:
        _stores.append(next(iter(dist.rendezvous("env://")))[0])
    key = f"aligntune/main/{len(_stores)}"
    _stores.append(key)
    if os.environ.get("RANK", "0") == "0":
        _stores[0].set(key, pickle.dumps(outcome))
    return pickle.loads(_stores[0].get(key))


def _slug(name: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")
    return slug[:60] or "model"


def _fresh(root: Path, stem: str) -> Path:
    """A folder that nobody else has: made here, so two runs of one second do not share it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        path = root / f"{stem}-{stamp}{suffix}"
        try:
            path.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            continue
        return path.absolute()
    raise ConfigError(f"output_dir: {root} has a thousand runs of {stem}-{stamp}")


def _newest(root: Path, stem: str) -> Path:
    from aligntune.core.checkpoints import complete_checkpoints

    runs: Iterable[Path] = root.glob(f"{stem}-*") if root.is_dir() else []
    with_checkpoints = [run for run in runs if complete_checkpoints(run)]
    if not with_checkpoints:
        raise CheckpointError(f"resume=True: no run {root}/{stem}-* has a complete checkpoint; give output_dir")
    return max(with_checkpoints, key=lambda run: (run.stat().st_mtime, run.name)).absolute()


def _require_checkpoint(run: RunDir) -> None:
    from aligntune.core.checkpoints import newest_complete

    newest_complete(run.path)

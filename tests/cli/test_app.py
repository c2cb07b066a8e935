"""The command line in this process: what each command says, and how it ends."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import aligntune
from aligntune import errors
from aligntune.algorithms import ALGORITHMS
from aligntune.cli import doctor as doctor_module
from aligntune.cli.app import app
from aligntune.cli.launching import command_of
from aligntune.core.recipes import packaged
from aligntune.core.resolve import option_table, takers
from aligntune.errors import (
    AlignTuneError,
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    DataError,
    GpuMemoryError,
    NonFiniteError,
    UnsupportedAlgorithmError,
)
from tests.small_jobs import alpaca, write

COMMANDS = ("train", "validate", "preview", "generate", "evaluate", "backends", "explain", "options", "doctor",
            "launch", "recipes", "compare", "export")


def run(*arguments: str, **kwargs: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **kwargs)


@pytest.fixture
def job(tmp_path: Path) -> str:
    return write(tmp_path / "job.yaml", {"algorithm": "sft", "backend": "trl", "model": {"model_name": "some/model"},
                                         "data": {"dataset_name": alpaca(tmp_path / "rows.jsonl")}})


def test_help_names_every_command_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command}" in result.stdout
        assert run(command, "--help").exit_code == 0
    page = Path(__file__).parents[2].joinpath("docs/command-line.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    raised = {error.exit_code for error in vars(errors).values()
              if isinstance(error, type) and issubclass(error, AlignTuneError)}
    assert raised | {0, 9, 130} == {int(code) for code, _ in documented}
    told = result.stdout.split("Exit codes: ")[1]
    assert re.findall(r"(?:^|; )(\d+) ", " ".join(told.split())) == [code for code, _ in documented]
    assert set(COMMANDS) == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_version_and_an_unknown_command() -> None:
    from aligntune import __version__

    assert run("--version").stdout.strip() == __version__
    result = run("trian")
    assert result.exit_code == 2 and "trian" in result.stderr


# How errors end

@pytest.mark.parametrize(("error", "code"), [
    (ConfigError, 2), (DataError, 3), (BackendUnavailableError, 4), (UnsupportedAlgorithmError, 5),
    (CheckpointError, 6), (NonFiniteError, 7), (GpuMemoryError, 11), (KeyboardInterrupt, 130),
])
def test_each_class_of_error_has_its_exit_code_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("what happened")

    monkeypatch.setattr("aligntune.core.recipe_run.run_recipe", fail)
    result = run("train", "sft-builtin")
    assert result.exit_code == code
    assert "what happened" in result.stderr and "Traceback" not in result.stderr
    for arguments in (("--debug", "train", "sft-builtin"), ("train", "sft-builtin", "--debug")):
        result = run(*arguments)
        assert result.exit_code == code
        assert "Traceback" in result.stderr and "what happened" in result.stderr


def test_of_several_processes_the_others_say_one_line(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run("validate", job, "lernin_rate=1", "batch_sise=2")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: [rank 1] 2 faults in ") and result.stderr.count("\n") == 1


# train and validate, as far as they go without training

@pytest.mark.parametrize("command", ["train", "validate", "preview"])
@pytest.mark.parametrize(("arguments", "told"), [
    (["{job}", "train.lerning_rate=1e-3"], "train.lerning_rate: unknown option; did you mean 'train.learning_rate'?"),
    (["{job}", "max_steps=many"], "max_steps = 'many': must be"),
    (["{job}", "--max-steps=3"], "did you mean max_steps=3?"),
    (["{job}", "num_generations=4"], "sft does not take this option"),
    (["sft-bultin"], "unknown recipe 'sft-bultin'; did you mean 'sft-builtin'"),
    (["missing.yaml"], "no file 'missing.yaml'"),
    (["{broken}"], "broken.yaml"),
])
def test_a_wrong_command_line_is_a_message_and_exit_code_2(
    tmp_path: Path, job: str, command: str, arguments: list[str], told: str
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("algorithm: [sft\n")
    result = run(command, *(text.format(job=job, broken=broken) for text in arguments))
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_validate_shows_what_was_set_and_by_whom(job: str) -> None:
    result = run("validate", job, "learning_rate=1e-4", "max_steps=null")
    assert result.exit_code == 2 and "max_steps" in result.stderr
    result = run("validate", job, "learning_rate=1e-4", "backend=auto", "device=cpu")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["train.learning_rate", "0.0001", "argument"] in lines
    assert ["model.model_name", "some/model", "config"] in lines
    assert ["backend", "trl", "argument"] in lines
    assert "- backend: trl, because device='cpu' was asked for" in result.stdout
    assert "train.max_steps" not in result.stdout
    assert "valid (the data was not read; --data reads it)" in result.stdout


def test_validate_as_yaml_is_a_recipe_again(job: str, tmp_path: Path) -> None:
    result = run("validate", job, "--yaml", "learning_rate=1e-4", "system_prompt=say ${x}")
    text = result.stdout.rpartition("\n" + job)[0]
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert run("validate", str(again)).exit_code == 0
    from aligntune.core.recipes import load_plan

    options = load_plan(again).stages[0].job.options
    assert (options.learning_rate, options.system_prompt) == (1e-4, "say ${x}")


def test_validate_says_what_a_backend_does_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", {"algorithm": "gspo", "backend": "fast", "model_name": "m", "dataset_name": "d",
                                       "reward_functions": ["exact_match"]})
    result = run("validate", path)
    assert result.exit_code == 5 and "backend='trl' runs it" in result.stderr


def test_validate_tells_each_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", {"defaults": {"model_name": "m", "dataset_name": "d", "backend": "trl"},
                                       "stages": [{"algorithm": "sft"}, {"algorithm": "dpo", "model_name": "previous"}],
                                       "probe": {"dataset_name": "p", "split": "test"}})
    result = run("validate", path, "stages.2.beta=0.5")
    assert result.exit_code == 0, result.output
    places = [result.stdout.index(mark) for mark in ("1-sft: ", "2-dpo: ", "probe: exact_match on p[test]")]
    assert places == sorted(places)
    assert run("validate", path, "stages.1.beta=0.5").exit_code == 2


# recipes

def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = run("recipes", "list").stdout
    for name in packaged():
        assert f" {name} " in listed
    text = packaged()["dpo-builtin"].read_text()
    assert run("recipes", "show", "dpo-builtin").stdout == text
    assert run("recipes", "copy", "dpo-builtin").exit_code == 0
    assert Path("dpo-builtin.yaml").read_text() == text
    Path("dpo-builtin.yaml").write_text("mine")
    result = run("recipes", "copy", "dpo-builtin")
    assert result.exit_code == 2 and "is there already; --force replaces it" in result.stderr
    assert Path("dpo-builtin.yaml").read_text() == "mine"
    assert run("recipes", "copy", "dpo-builtin", "--force").exit_code == 0
    assert Path("dpo-builtin.yaml").read_text() == text
    Path("folder").mkdir()
    assert run("recipes", "copy", "dpo-builtin", "folder").stdout.strip() == os.path.join("folder", "dpo-builtin.yaml")
    assert run("recipes", "copy", "dpo-builtin", "no/such/x.yaml").exit_code == 2
    result = run("recipes", "copy", "dpo-builtin", "/proc/x.yaml")
    assert result.exit_code == 2
    assert "recipes copy: '/proc/x.yaml' cannot be written: No such file or directory" in result.stderr
    assert "did you mean 'dpo-builtin'" in run("recipes", "show", "dpo-bultin").stderr


# backends, explain, options

def test_the_support_matrix_has_every_algorithm_with_reasons() -> None:
    result = run("backends")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name in ALGORITHMS.names():
        assert name in rows
    assert rows["gspo"].split()[-3:-1] == ["yes", "no"] and rows["sft"].split()[-2:] == ["yes", "yes"]
    assert f"{rows['gspo'].split()[-1]} fast: the fast online trainer covers token-level ratios" in result.stdout
    assert "On this machine:" in result.stdout and "  trl: supported" in result.stdout
    assert ("\n  fast: importance_sampling_level='sequence', loss_type='luspo' or 'vespo', torch_compile=True, "
            "torch_compile_backend, torch_compile_mode, use_liger_kernel=True\n") in result.stdout
    assert "\n  trl: rollout_engine='fast', rollout_memory_gib, " in result.stdout


def test_explain() -> None:
    assert run("explain", "fast", "gspo").stdout.startswith("gspo on fast: unsupported")
    sequence, forms = (f"\n  not with {gate}: the fast online trainer covers token-level ratios"
                       for gate in ("importance_sampling_level='sequence'", "loss_type='luspo' or 'vespo'"))
    told, printed = run("explain", "fast", "grpo").stdout, str(aligntune.explain("fast", "grpo"))
    assert all(line in text for line in (sequence, forms) for text in (told, printed))
    for name in ("dapo", "dr_grpo", "rloo"):  # of the first two trainer_options take a level, of none another form
        told = str(aligntune.explain("fast", name))
        assert (sequence in told) == (name != "rloo") and forms not in told
    assert "not with rollout_memory_gib: " in str(aligntune.explain("trl", "rloo"))
    assert "not with rollout_" not in str(aligntune.explain("trl", "sft"))
    of_any = str(aligntune.explain("fast", "sft"))
    assert "not with torch_compile=True: " in of_any and "not with loss_type" not in of_any
    result = run("explain", "fsat", "gropo")
    assert result.exit_code == 2
    assert "did you mean 'fast'" in result.stderr and "did you mean 'grpo'" in result.stderr


@pytest.mark.parametrize("algorithm", ALGORITHMS.names())
@pytest.mark.parametrize("format", ["text", "markdown", "json-schema"])
def test_options_lists_each_option_of_an_algorithm_and_no_other(algorithm: str, format: str) -> None:
    text = run("options", algorithm, "--format", format).stdout
    marks = {"text": "\n  {} = ", "markdown": "| `{}` |", "json-schema": '"{}": {{'}
    mine = set(option_table(algorithm))
    for name in option_table(None):
        assert (marks[format].format(name) in text) == (name in mine), name


def test_options_show_the_algorithms_own_defaults() -> None:
    schema = json.loads(run("options", "grpo", "--format", "json-schema").stdout)
    rate = schema["properties"]["train"]["properties"]["learning_rate"]
    assert (rate["default"], rate["type"], rate["minimum"]) == (1e-6, "number", 0)
    beta = schema["properties"]["loss"]["properties"]["beta"]
    assert (beta["default"], schema["properties"]["algorithm"]) == (0.04, {"const": "grpo"})
    assert schema["properties"]["data"]["properties"]["on_bad_row"]["enum"] == ["raise", "skip", "quarantine"]
    assert schema["properties"]["rollout"]["properties"]["stop_strings"]["anyOf"] == [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}, {"type": "null"}]
    assert "unknown algorithm 'gropo'" in run("options", "gropo").stderr
    everything = run("options").stdout
    assert "loss (dpo)" in everything and f"Only {', '.join(takers('num_generations'))}." in everything


# launch

def test_launch_on_the_cpu_is_torchrun(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligntune.cli.launching._gpus", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    result = run("launch", job, "max_steps=3", "--nproc", "2", "--print")
    assert result.exit_code == 0, result.output
    wanted = f"-m torch.distributed.run --standalone --nproc_per_node 2 -m aligntune train {job} max_steps=3"
    assert wanted in result.stdout
    assert result.stdout.startswith("OMP_NUM_THREADS=")
    assert "how many processes" in run("launch", job, "--print").stderr


def test_launch_on_gpus_is_accelerate(tmp_path: Path) -> None:
    command, environment = command_of("r.yaml", ["a=1"], nproc=None, gpus=4)
    assert command[1:] == ["-m", "accelerate.commands.launch", "--num_processes", "4", "--num_machines", "1",
                           "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "-m", "aligntune",
                           "train", "r.yaml", "a=1"]
    assert environment == {}
    assert "--multi_gpu" not in command_of("r.yaml", [], nproc=1, gpus=4)[0]
    file = tmp_path / "fsdp.yaml"
    file.touch()
    command, _ = command_of("r.yaml", [], nproc=None, gpus=4, accelerate_config=file)
    assert command[2:5] == ["accelerate.commands.launch", "--config_file", str(file)]
    with pytest.raises(ConfigError, match="--nproc 5: this machine has 4 GPUs"):
        command_of("r.yaml", [], nproc=5, gpus=4)
    with pytest.raises(ConfigError, match="no file"):
        command_of("r.yaml", [], nproc=2, gpus=4, accelerate_config=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="ONE process on a CPU"):
        command_of("r.yaml", [], nproc=2, gpus=0, accelerate_config=file)


def test_launch_on_the_cpu_of_a_machine_with_gpus_says_so_to_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    command, environment = command_of("r.yaml", [], nproc=2, gpus=0, force_cpu=True)
    assert command[-1] == "model.device=cpu" and environment == {"ACCELERATE_USE_CPU": "true"}


def test_launch_tells_a_typo_before_it_starts_anything(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.execvpe", lambda *args: pytest.fail("started"))
    assert run("launch", job, "--nproc", "2", "max_step=3").exit_code == 2


# doctor

def test_doctor_is_content_here_and_shows_the_versions() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "nothing is broken" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    # "note" where it is newer than any that was tested
    assert any(line[0] in ("ok", "note") and line[1:2] == ["torch"]
               and line[2].rstrip(",") == metadata.version("torch") for line in lines if line)
    assert any(line[:3] == ["ok", "backend", "auto"] for line in lines)


def test_doctor_fails_when_something_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib.metadata import version

    versions = {"trl": "1.2.0", "peft": "99.0"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: versions.get(name) or version(name))
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(blocked / "hub"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("doctor")
    assert result.exit_code == 1
    assert "2 broken: trl, hub cache" in result.stderr
    assert "1.2.0, too old: tested with 1.16" in result.stdout
    assert "99.0, newer than any that was tested" in result.stdout
    assert "'1': kernels are interpreted" in result.stdout


def test_doctor_tells_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError, version

    def without_trl(name: str) -> str:
        if name == "trl":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_trl)
    findings = [finding for finding in doctor_module.packages() if finding.what == "trl"]
    assert [(finding.state, finding.found) for finding in findings] == [("bad", "not installed: pip install trl")]

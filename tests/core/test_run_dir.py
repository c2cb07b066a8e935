"""Run directories: where they are made, what they refuse, what is written and what is not."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from aligntune.core import environment
from aligntune.core.run_dir import RunDir, jsonable, on_main_process, write_atomic
from aligntune.errors import CheckpointError, ConfigError


def create(path=None, **options):
    return RunDir.create(path, **{"algorithm": "sft", "model_name": "org/Tiny Llama!", **options})


def checkpoint(run, step):
    """The least that counts as a complete checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    torch.save({"a": torch.ones(2)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_no_folder_given_makes_one_named_for_the_run_and_never_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20260101-120000")
    first, second = create(), create()
    assert first.path == tmp_path / "runs/sft-Tiny-Llama-20260101-120000"
    assert second.path == tmp_path / "runs/sft-Tiny-Llama-20260101-120000-2"
    assert first.path.is_dir() and second.path.is_dir()


@pytest.mark.parametrize(("model", "name"), [
    ("builtin:tiny", "tiny"), ("/models/a/b/", "b"), ("../..", "model"), ("x" * 300, "x" * 60),
    ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
])
def test_names_of_models_become_names_of_folders(tmp_path, model, name):
    assert create(model_name=model, root=tmp_path).path.name.startswith(f"sft-{name}-2")


def test_a_folder_with_another_run_is_refused_unless_told(tmp_path):
    run = create(tmp_path / "a")
    assert run.path.is_dir() and not run.holds_a_run()
    run.write_config("seed: 1\n")
    run.append_metrics({"step": 1, "kind": "train"})
    (run.path / "notes.txt").write_text("mine")
    (run.path / "tb").mkdir()
    with pytest.raises(ConfigError, match=r"holds another run \(config.yaml, metrics.*resume=True .*overwrite=True"):
        create(tmp_path / "a")
    again = create(tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in again.path.iterdir()) == ["notes.txt"]


def test_a_config_of_the_users_own_is_never_written_over(tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\n")
    for options in ({}, {"overwrite": True}, {"resume": "x"}):
        with pytest.raises(ConfigError, match="no run wrote"):
            create(tmp_path, **options)
    RunDir(tmp_path).clear()
    assert (tmp_path / "config.yaml").read_text() == "# mine\n"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        create(tmp_path / "a")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_folder_that_cannot_be_written_is_told_by_the_name_that_was_given(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for given, shown in (("/proc/foo", "/proc/foo"), ("/proc", "/proc"), ("/dev/null/a/b", "/dev/null/a/b")):
        with pytest.raises(ConfigError, match=rf"^output_dir: '{shown}' cannot be written: [A-Z][a-z ]+$"):
            create(given, **options)
    with pytest.raises(ConfigError, match="^output_dir: '/proc/runs' cannot be written: "):
        create(root="/proc/runs", **options)
    folder = tmp_path / "ro"
    create(folder).write_config("seed: 1\n")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1/a").write_text("")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", f"{folder}/.tmp")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for more in ({"overwrite": True}, {"resume": "ro/checkpoint-1"}):
        with pytest.raises(ConfigError, match=rf"^output_dir: '{folder}' cannot be written: Permission denied$"):
            create("ro", **more)
    with pytest.raises(ConfigError, match=rf"^output_dir: '{folder}/checkpoint-1' cannot be written: "):
        create(resume="ro/checkpoint-1")
    assert (folder / "checkpoint-1/a").is_file()  # nothing is removed from a folder that cannot be filled


def test_resume_wants_something_to_continue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        create("runs/a", resume=True)
    run = create("runs/a")
    run.append_metrics({"step": 1, "kind": "train"})
    with pytest.raises(CheckpointError, match="no checkpoint-N"):
        create("runs/a", resume=True)
    checkpoint(run.path, 5)
    assert create("runs/a", resume=True).path == run.path
    with pytest.raises(CheckpointError, match="no run runs/sft-Tiny-Llama"):
        create(resume=True)


def test_resume_without_a_folder_takes_the_newest_run_that_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("sft-Tiny-Llama-1", "sft-Tiny-Llama-2", "dpo-Tiny-Llama-3", "sft-Tiny-Llama-4")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if not name.endswith("4"):
            checkpoint(folder, 1)
        os.utime(folder, (age, age))
    assert create(resume=True).path.name == "sft-Tiny-Llama-2"
    given = tmp_path / "runs/sft-Tiny-Llama-1/checkpoint-1"
    assert create(resume=str(given)).path == given.parent


# Writing


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunDir(tmp_path / "a")
    run.write_config("a: 1")
    run.append_metrics({"step": 1})
    run.write_environment()
    run.clear()
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("RANK", "0")
    RunDir(tmp_path / "a").append_metrics({"step": 1})
    assert (tmp_path / "a/metrics.jsonl").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a.json", "new" * 1000)
    assert (tmp_path / "a.json").read_text() == "old"


def test_metrics_survive_a_killed_writer_and_are_cut_at_a_step(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "kind": "train", "loss": 0.1 * step, "bad": float("nan")})
    run.append_metrics({"step": 2, "kind": "eval", "eval_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 2]
    run.cut_metrics(2)
    assert [(record["step"], record["kind"]) for record in run.read_metrics()] == [
        (1, "train"), (2, "train"), (2, "eval")]
    assert run.read_metrics()[1]["loss"] == 0.2 and run.read_metrics()[0]["bad"] is None
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_metrics_of_an_evaluation_alone_are_not_set_aside(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics({"step": 0, "kind": "eval"})
    assert run.set_metrics_aside() is None
    run.append_metrics({"step": 1, "kind": "train"})
    assert run.set_metrics_aside().name == "metrics-1.jsonl"
    run.append_metrics({"step": 1, "kind": "train"})
    assert run.set_metrics_aside().name == "metrics-2.jsonl"
    assert run.read_metrics() == []


def test_json_takes_what_trainers_log():
    import numpy
    import torch

    assert jsonable({"a": torch.tensor(1.5), "b": numpy.float32(2), "c": [float("inf"), (1, {"x"})], "d": True}) == {
        "a": 1.5, "b": 2.0, "c": [None, [1, ["x"]]], "d": True}
    assert json.dumps(jsonable({"k": ValueError("x")})) == '{"k": "x"}'


def test_one_process_decides_for_itself():
    assert on_main_process(lambda: "x") == "x"
    with pytest.raises(ConfigError, match="why"):
        on_main_process(lambda: (_ for _ in ()).throw(ConfigError("why")))


# Secrets


SECRET = "hf_" + "A1b2" * 8


@pytest.mark.parametrize("argv", [
    ["train.py", f"trainer_options.hub_token={SECRET}"], ["train.py", "--hub-token", "s3cr3t-value-1"],
    ["train.py", "--api_key=s3cr3t-value-1"], ["train.py", SECRET], ["x", f"https://user:{SECRET}@host/repo"],
    ["x", "https://user:s3cr3t-value-1@host/repo"],
])
def test_the_command_line_hides_secrets(argv):
    shown = " ".join(environment.command_line(argv))
    assert SECRET not in shown and "s3cr3t" not in shown and shown.startswith(argv[0])


def test_the_command_line_keeps_the_rest():
    argv = ["train.py", "recipe.yaml", "tokenizer_name=a/b", "max_new_tokens=5", "--tokenizer", "x", "lr=1e-4"]
    assert environment.command_line(argv) == argv


def test_environment_has_what_matters_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TORCH_AUTH_TOKEN", "s3cr3t")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_VARIABLE", "x")
    run = RunDir(tmp_path)
    run.write_environment()
    run.write_config(f"hub_token: {SECRET}\n")
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in text and "s3cr3t" not in text
    found = run.read_json("environment.json")
    assert found["flags"]["NCCL_DEBUG"] == "INFO" and "MY_VARIABLE" not in found["flags"]
    assert found["packages"]["torch"] and found["python"] and "gpus" in found


def test_the_commit_is_the_one_of_the_folder(tmp_path):
    assert environment.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    found = environment.commit(tmp_path)
    assert len(found["commit"]) == 40 and found["uncommitted_changes"] is False
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path)["uncommitted_changes"] is True

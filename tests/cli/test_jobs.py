"""Commands that load a model, in this process; and a few real processes: their exit codes, signals and output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aligntune.cli import training
from aligntune.cli.app import app
from tests import small_jobs

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **kwargs: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **kwargs)


def process(*arguments: str, cwd: Path, **kwargs: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a recipe for each algorithm that a test needs."""
    folder = tmp_path_factory.mktemp("shop")
    model = small_jobs.model_folder(folder / "model")
    small_jobs.alpaca(folder / "chat.jsonl")
    small_jobs.pairs(folder / "pairs.jsonl")
    small_jobs.graded(folder / "graded.jsonl")
    shared = {"backend": "trl", "model": {"model_name": model, "device": "cpu"},
              "train": {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2},
              "logging": {"report_to": "none", "logging_steps": 1}}
    small_jobs.write(folder / "sft.yaml", {
        **shared, "algorithm": "sft", "data": {"dataset_name": str(folder / "chat.jsonl"), "max_seq_length": 64},
        "evaluation": {"val_split_ratio": 0.25}})
    small_jobs.write(folder / "dpo.yaml", {
        **shared, "algorithm": "dpo", "data": {"dataset_name": str(folder / "pairs.jsonl"), "max_seq_length": 64},
        "evaluation": {"val_split_ratio": 0.25}})
    return folder


@pytest.fixture(scope="module")
def lora_run(shop: Path) -> Path:
    """A finished run of SFT with adapters, trained by a process of its own."""
    done = process("-m", "aligntune", "train", "sft.yaml", "output_dir=run", "use_peft=true", "lora_r=2", cwd=shop)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert "Traceback" not in err and "Data for sft" in err and "step 2/2" in err
    assert not (shop / "run" / "README.md").exists()  # TRL's card, of a model on the hub
    assert "model: " in out and str(shop / "run" / "checkpoint-2") in out and "loss.png" in out
    assert "%|" not in err, "progress bars in a file"
    return shop / "run"


def test_a_run_folder_generates_like_its_model(lora_run: Path, shop: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.core import tiny

    result = run("generate", str(lora_run), "Say 3", "--max-new-tokens", "6", "--device", "cpu")
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(shop / "model")
    tokenizer = tiny.tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Say 3"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    plain = base.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    trained = PeftModel.from_pretrained(base, lora_run / "checkpoint-2")
    wanted = trained.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert wanted.tolist() != plain.tolist()
    text = tokenizer.decode(wanted[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
    assert result.stdout == text + "\n"
    asked = run("generate", str(lora_run), "--json", "--max-new-tokens", "6", input="Say 3\n\nSay 4\n")
    rows = asked.stdout.splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["Say 3", "Say 4"]
    assert json.loads(rows[0])["answer"] == text
    assert "generate: with transformers; the model is not on a GPU" in result.stderr


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What our engine has drawn since."""
    from aligntune.backends.fast.rollout.engine import RolloutEngine

    drawn: list[Any] = []
    plain = RolloutEngine.generate
    monkeypatch.setattr(RolloutEngine, "generate",
                        lambda self, ids, **kwargs: (drawn.append(plain(self, ids, **kwargs)), drawn[-1])[1])
    return drawn


def test_both_engines_give_the_same_answers(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = watched(monkeypatch)
    asked = ["generate", str(shop / "model"), "Say 3", "and 4", "--max-new-tokens", "9", "--device", "cpu"]
    ours, theirs = run(*asked, "--engine", "fast"), run(*asked, "--engine", "hf")
    assert ours.exit_code == 0 and ours.stdout == theirs.stdout, ours.output
    assert [len(rollout.completion_ids) for rollout in drawn] == [2]
    assert "generate: with" not in ours.stderr + theirs.stderr
    sampled = [run(*asked, "--engine", "fast", "--temperature", "1.5", "--top-k", "20", "--seed", seed).stdout
               for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("engine", ["fast", "hf"])
def test_generate_ends_at_any_stop_string_and_penalises(
    lora_run: Path, shop: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run folder of backend trl and of a plain model."""
    drawn = watched(monkeypatch)
    for model in (lora_run, shop / "model"):
        asked = ["generate", str(model), "Say 3", "--raw", "--max-new-tokens", "24", "--device", "cpu"]
        asked += ["--engine", engine]

        def answer(*flags: str, asked: list[str] = asked) -> str:
            result = run(*asked, *flags)
            assert result.exit_code == 0, result.output
            return result.stdout.removesuffix("\n")

        plain = answer()
        first, second = [letter for letter in dict.fromkeys(plain) if letter.isascii() and letter not in "Say 3"][:2]
        assert 0 < plain.index(second) < len(plain) - 1
        ended = answer("--stop", "not in it", "--stop", second, "--stop", first)
        assert ended == plain[: plain.index(first) + 1]
        assert answer("--stop", second) == plain[: plain.index(second) + 1]
        assert answer("--repetition-penalty", "50") != plain and answer("--repetition-penalty", "1") == plain
        # Only the likeliest token has a probability of all of its own; without a share others are drawn at this heat.
        heat = ("--temperature", "3", "--seed", "1")
        assert answer("--min-p", "1", *heat) == plain != answer("--min-p", "0", *heat)
        assert answer("--min-p", "1", "--seed", "1") == plain  # samples, as --top-p alone does
        assert answer("--top-p", "0.999", "--seed", "1") != plain  # at no --temperature
    assert bool(drawn) == (engine == "fast")


def test_help_says_what_samples() -> None:
    told = " ".join(run("generate", "--help").stdout.split())
    assert "greedy where neither it nor --top-p, --top-k or --min-p is given" in told


@pytest.mark.parametrize("engine", ["fast", "hf"])
def test_generate_samples_as_align_trainer_does(shop: Path, engine: str) -> None:
    from aligntune.core import generation
    from aligntune.core.inference import generator_for, load

    asked = ["generate", str(shop / "model"), "Say 3", "--max-new-tokens", "9", "--device", "cpu", "--engine", engine]
    options: dict[str, Any] = {"temperature": 1.7, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.3,
                               "seed": 5}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = run(*asked, *flags)
    assert result.exit_code == 0, result.output
    model, tokenizer = load(str(shop / "model"), device="cpu")
    generator, _ = generator_for(model, tokenizer, engine)
    wanted = generation.generate(model, tokenizer, ["Say 3"], max_new_tokens=9, generator=generator, **options)
    assert result.stdout == wanted[0] + "\n"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["auto", "fast", "hf"])
def test_on_a_gpu_our_engine_answers(shop: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In captured steps, where it is asked for and where nothing is said; transformers where that is."""
    drawn = watched(monkeypatch)
    result = run("generate", str(shop / "model"), "Say 3", "and 4", "--max-new-tokens", "9", "--engine", engine)
    assert result.exit_code == 0 and result.stdout.count("\n") >= 2, result.output
    assert ("generate: with our engine" in result.stderr) == (engine == "auto")
    assert [(len(rollout.completion_ids), rollout.stats.graphs) for rollout in drawn] == (
        [] if engine == "hf" else [(2, "replayed")])


def parts_of_models(shop: Path) -> None:
    """`reward`, adapters of a reward model; `scorer`, a whole one; `beheaded`, a language model without its head."""
    from tests.core import tiny

    (shop / "reward").mkdir(exist_ok=True)
    (shop / "reward" / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    for name, model in (("scorer", tiny.scorer()), ("beheaded", tiny.llama().model)):
        model.save_pretrained(shop / name)
        tiny.tokenizer().save_pretrained(shop / name)


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (["{shop}", "hi"], 2, "holds no model"), (["./nowhere", "hi"], 2, "no folder here"),
    (["{shop}/model"], 2, "no prompt"),
    (["{shop}/model", "hi", "--temperature", "-1"], 2, "temperature"),
    (["{shop}/model", "hi", "--min-p", "1.5"], 2, "min_p = 1.5: a number >= 0 and <= 1 is wanted"),
    (["{shop}/model", "hi", "--repetition-penalty", "0"], 2, "repetition_penalty = 0.0: a number > 0 is wanted"),
    (["{shop}/model", "hi", "--stop", "a", "--stop", ""], 2, "stop_strings = ['a', '']: a string or a list of"),
    (["{shop}/model", "hi", "--min-p", "2", "--stop", ""], 2, "2 faults"), (["builtin:tniy", "hi"], 2, "builtin:tiny"),
    (["{shop}/model", "hi", "--engine", "vllm"], 2, "unknown engine 'vllm'"),
    (["{shop}/model", "hi", "--device", "banana"], 2, "unknown device 'banana'; valid: auto, cpu, cuda"),
    pytest.param(["{shop}/model", "hi", "--device", "cuda"], 4, "torch sees no CUDA GPU here", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="a GPU is here")),
    (["{shop}/unfinished", "hi"], 6, "a run without a checkpoint"),
    (["runs/none", "hi"], 1, "'runs/none' cannot be loaded (no folder here has this name, so"),
    (["{shop}/reward", "hi"], 2, "'{shop}/reward' holds adapters of a reward model, which `save_model("),
    (["{shop}/beheaded", "hi"], 2, "'{shop}/beheaded' has no lm_head.weight, which would be random: it was not saved"),
    (["{shop}/scorer", "hi"], 2, "'{shop}/scorer' is a reward model (LlamaForSequenceClassification): it has no "
                                 "lm_head.weight, which would be random; reward_model_name takes it"),
    (["{shop}/model", "hi", "\udce9"], 3, "the prompt '<user>\\udce9<eos><assistant>' has a lone surrogate"),
])
def test_generate_says_what_it_cannot_load(
    shop: Path, arguments: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (shop / "unfinished").mkdir(exist_ok=True)
    (shop / "unfinished" / "config.yaml").touch()
    parts_of_models(shop)
    result = run("generate", *(text.format(shop=shop) for text in arguments))
    assert result.exit_code == code and told.format(shop=shop) in result.stderr, result.output


@pytest.mark.parametrize("merged", [False, True])
def test_export_writes_the_model_of_a_run(lora_run: Path, shop: Path, merged: bool, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aligntune.core.inference import load

    result = run("export", str(lora_run), "--output", str(tmp_path / "out"), *["--merged"][:merged])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert ("read back and compared: logits differ by" in result.stderr) is merged
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "model.safetensors" if merged else "adapter_model.safetensors"} <= files
    assert ("adapter_config.json" in files) is not merged
    kind = AutoModelForCausalLM if merged else AutoPeftModelForCausalLM
    exported, tokenizer = kind.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Say 3", return_tensors="pt")
    trained, bare = load(str(lora_run), device="cpu")[0], AutoModelForCausalLM.from_pretrained(shop / "model")
    wanted = trained(**ids).logits
    assert torch.allclose(exported(**ids).logits, wanted, atol=1e-4)
    assert not torch.allclose(bare(**ids).logits, wanted, atol=1e-2)
    again = run("export", str(lora_run), "--output", str(tmp_path / "out"), *["--merged"][merged:])
    assert again.exit_code == 2 and "would load as a mixture" in again.stderr


def test_export_keeps_stored_types_and_score_heads(shop: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.core import tiny

    for name, model in (("bf16", tiny.llama().bfloat16()), ("scorer", tiny.scorer())):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
        result = run("export", str(tmp_path / name), "--output", str(tmp_path / f"{name}-out"), "--merged")
        assert result.exit_code == 0 and "no adapters to merge" in result.stderr, result.output
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-out"))
        assert before.keys() == after.keys() and ("score.weight" in after) is (name == "scorer")
        assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


def test_export_uploads_what_it_would_write(lora_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.core.test_saving import Hub

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    result = run("export", str(lora_run), "--push-to-hub", "me/model", "--private")
    assert result.exit_code == 0 and result.stdout == "https://hub.example/me/model\n", result.output
    assert Hub.calls[1] == ("create", "me/model", True) and "adapter_model.safetensors" in Hub.calls[2][2]


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (["{shop}/model"], 2, "give --output FOLDER, --push-to-hub NAME, or both"),
    (["{shop}/model", "--push-to-hub", "not a repo//id"], 2, "push_to_hub: "),
    (["./nowhere", "--output", "{shop}/none"], 2, "no folder here"),
    (["{shop}/reward", "--output", "{shop}/none"], 2, "holds adapters of a reward model"),
    (["{shop}/beheaded", "--output", "{shop}/none"], 2, "has no lm_head.weight, which would be random"),
])
def test_export_says_what_it_cannot_do(shop: Path, arguments: list[str], code: int, told: str) -> None:
    parts_of_models(shop)
    result = run("export", *(text.format(shop=shop) for text in arguments))
    assert result.exit_code == code and told in result.stderr, result.output
    assert not (shop / "none").exists()


def test_evaluate_scores_the_checkpoint_of_a_run_and_leaves_it_alone(lora_run: Path, shop: Path) -> None:
    before = sorted(path.name for path in lora_run.iterdir())
    trained = json.loads(run("evaluate", str(lora_run), "--json").stdout.splitlines()[-1])
    untrained = json.loads(run("evaluate", str(shop / "sft.yaml"), "--json").stdout.splitlines()[-1])
    assert 0 < trained["eval_loss"] < untrained["eval_loss"] - 0.01
    assert trained["epoch"] > untrained["epoch"] == 0  # of the checkpoint, not of a trainer that is new
    assert sorted(path.name for path in lora_run.iterdir()) == before
    assert not (shop / "runs").exists()
    result = run("evaluate", str(shop / "sft.yaml"), "val_split_ratio=null", f"model_name={shop / 'nowhere'}")
    assert result.exit_code == 3 and "eval_dataset_name" in result.stderr  # before the model is looked for
    result = run("evaluate", str(shop / "nowhere"))
    assert result.exit_code == 2 and "there is no run folder" in result.stderr


def test_evaluate_of_a_dpo_run_compares_with_the_model_it_started_from(shop: Path) -> None:
    """A reference taken from the trained weights would make every margin 0."""
    result = run("train", str(shop / "dpo.yaml"), f"output_dir={shop / 'dpo'}", "max_steps=4")
    assert result.exit_code == 0, result.output
    found = json.loads(run("evaluate", str(shop / "dpo"), "--json").stdout.splitlines()[-1])
    assert abs(found["eval_rewards/margins"]) > 1e-3 and found["eval_loss"] != pytest.approx(0.6931, abs=1e-4)


def test_evaluate_of_a_run_of_grpo_on_backend_fast_draws_with_its_engine(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop / "rewards.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [len({*completion[0]['content']}) + i / 64 for i, completion in enumerate(completions)]\n")
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}"}]} for i in range(4)]
    small_jobs.write(shop / "grpo.yaml", {
        "backend": "fast", "algorithm": "grpo", "model": {"model_name": str(shop / "model")},
        "data": {"dataset_name": small_jobs.rows_file(shop / "prompts.jsonl", rows), "max_seq_length": 64},
        "train": {"batch_size": 4, "max_steps": 1, "learning_rate": 1e-2},
        "rollout": {"num_generations": 4, "max_completion_length": 3}, "rewards": {
            "reward_functions": [f"{shop / 'rewards.py'}:letters"]},
        "evaluation": {"val_split_ratio": 0.25}, "logging": {"report_to": "none"}})
    drawn = watched(monkeypatch)
    trained = run("train", str(shop / "grpo.yaml"), f"output_dir={shop / 'grpo'}", "use_peft=true", "lora_r=2")
    assert trained.exit_code == 0 and drawn, trained.output
    drawn.clear()
    result = run("evaluate", str(shop / "grpo"), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [len(rollout.completion_ids) for rollout in drawn] == [4] and found["eval_rollout/seconds"] > 0
    assert found["eval_reward"] > 6 / 64


def test_preview_says_what_a_reward_lacks(shop: Path) -> None:
    rows = [{"prompt": "Say 3", "topic": "a"}, {"prompt": "Say 4", "topic": "b"}]
    path = small_jobs.rows_file(shop / "topics.jsonl", rows)
    (shop / "own.py").write_text("def close(completions, answer, **columns):\n    return [0.0 for _ in completions]\n")
    about = ("preview", "--dataset", path, "--model", str(shop / "model"), "--algorithm", "grpo")
    # Without a reward of one's own there is nothing to lack.
    plain = run(*about)
    assert plain.exit_code == 0 and "training would stop here" not in plain.stdout
    mine = run(*about, f"reward_functions=[{shop / 'own.py'}:close]")
    told = " ".join(mine.stdout.split())
    assert mine.exit_code == 0 and told.count("training would stop here: reward 'close' needs the column 'answer'") == 1
    assert "its columns: topic" in told
    held_out = run(*about, f"reward_functions=[{shop / 'own.py'}:close]",
                   "val_split_ratio=0.5")
    assert " ".join(held_out.stdout.split()).count("training would stop here: reward 'close'") == 2


def test_preview_shows_the_mask_and_lists_bad_rows(shop: Path) -> None:
    result = run("preview", str(shop / "sft.yaml"))
    assert result.exit_code == 0 and "16 read = 12 trained" not in result.stdout
    assert "> " in result.stdout and "supervised" in result.stdout
    bad = small_jobs.rows_file(shop / "bad.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    arguments = ("--dataset", bad, "--model", str(shop / "model"))
    result = run("preview", *arguments)
    assert result.exit_code == 0 and "bad.jsonl:2" in result.stdout and "training would stop here" in result.stdout
    assert "0 bad" in run("preview", *arguments, "max_samples=1").stdout
    assert run("preview", "--dataset", bad).exit_code == 2
    assert run("preview", str(shop / "sft.yaml"), "--model", "m").exit_code == 2
    assert run("preview").exit_code == 2
    assert run("validate", str(shop / "sft.yaml"), f"dataset_name={bad}", "--data").exit_code == 3


def test_half_a_character_stops_training_or_is_written_down(shop: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "\ud83d"}]
    bad = small_jobs.rows_file(shop / "halved.jsonl", rows)
    asked = ["train", str(shop / "sft.yaml"), f"dataset_name={bad}", "val_split_ratio=null", "max_steps=1"]
    stopped = run(*asked, f"output_dir={shop / 'halved'}")
    assert stopped.exit_code == 3 and f"{bad}:2: output: has a lone surrogate (half a character)" in stopped.stderr
    trained = run(*asked, f"output_dir={shop / 'halved'}", "on_bad_row=quarantine")
    assert trained.exit_code == 0, trained.output
    (written,) = (shop / "halved/bad_rows.jsonl").read_text("utf-8").splitlines()
    assert json.loads(written)["row"] == rows[1]
    assert "has a lone surrogate" in (shop / "halved/data_report.md").read_text("utf-8")


def test_an_unforeseen_error_is_a_line_and_exit_code_1(tmp_path: Path) -> None:
    code = ("import sys, aligntune.core.recipe_run as r\nr.run_recipe = lambda *a: 1 / 0\n"
            "from aligntune.cli import main\nsys.argv = ['aligntune', *sys.argv[1:]]\nmain()")
    done = process("-c", code, "train", "sft-builtin", cwd=tmp_path)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 1
    assert err == "error: unforeseen ZeroDivisionError: division by zero\n`--debug` shows where it happened\n"
    done = process("-c", code, "train", "sft-builtin", "--debug", cwd=tmp_path)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 1 and "Traceback" in err


@pytest.mark.parametrize(("given", "how"), [
    ([], "resume=true"), (["overwrite=true"], "resume=true for overwrite=true")])
def test_what_goes_on_after_ctrl_c(given: list[str], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt("stopped at step 3; call it again")

    monkeypatch.setattr("aligntune.core.recipe_run.run_recipe", stopped)
    with pytest.raises(KeyboardInterrupt, match=f"^stopped at step 3; the same command with {how} goes on$"):
        training.train("sft-builtin", given)


def test_ctrl_c_leaves_a_checkpoint_exits_130_and_resume_goes_on(shop: Path) -> None:
    folder = shop / "stopped"
    started = process("-m", "aligntune", "train", "sft.yaml", f"output_dir={folder}", "max_steps=1000", cwd=shop)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 130, err
    assert "Traceback" not in err and "the same command with resume=true goes on" in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 2 <= summary["steps"] < 1000
    steps = summary["steps"]
    result = run("train", str(shop / "sft.yaml"), f"output_dir={folder}", f"max_steps={steps + 1}", "resume=true")
    assert result.exit_code == 0, result.output
    done = json.loads((folder / "summary.json").read_text())
    assert (done["status"], done["steps"]) == ("finished", steps + 1)
    assert done["resumed_from"].endswith(f"checkpoint-{steps}")

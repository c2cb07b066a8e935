"""Packaged recipes: those over builtin data train; every other one meets rows with its dataset's columns.

What the hub answers stands in memory: one row of the columns that each dataset has, under the splits that it has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from typer.testing import CliRunner

import aligntune
from aligntune.algorithms import ALGORITHMS
from aligntune.backends import BACKENDS
from aligntune.backends.base import supports
from aligntune.cli.app import app
from aligntune.core.backend_factory import choose_backend, data_request
from aligntune.core.recipes import load_plan, packaged, read_recipe
from aligntune.data import prepare
from aligntune.errors import UnsupportedAlgorithmError
from tests.data.tokenizers import make

BUILTIN = [name for name in packaged() if name.endswith("-builtin")]
SOURCED = ("train", "loss", "lora", "rollout")
"""Sections of a recipe for a real model, each value of which tells where it comes from."""
REAL = [name for name in packaged() if not name.endswith("-builtin") and name not in ("quickstart", "tiny-instruct")]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SKY, BLUE, GREEN = turn("user", "The sky?"), turn("assistant", "It is blue."), turn("assistant", "It is green.")

STAND_INS: dict[str, tuple[str | None, tuple[str, ...], dict[str, Any]]] = {
    "tatsu-lab/alpaca": (None, ("train",), {
        "instruction": "Add the numbers.", "input": "12 and 30", "output": "42", "text": "Below is an instruction."}),
    "openai/gsm8k": ("main", ("train", "test"), {"question": "What is 12 + 30?", "answer": "Add.\n#### 42"}),
    "trl-lib/ultrafeedback_binarized": (None, ("train", "test"), {
        "chosen": [SKY, BLUE], "rejected": [SKY, GREEN], "score_chosen": 8.0, "score_rejected": 3.0}),
    "HuggingFaceH4/ultrafeedback_binarized": (
        None, ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"), {
            "prompt": "The sky?", "prompt_id": "0f", "chosen": [SKY, BLUE], "rejected": [SKY, GREEN],
            "messages": [SKY, BLUE], "score_chosen": 8.0, "score_rejected": 3.0}),
    "trl-lib/kto-mix-14k": (None, ("train", "test"), {"prompt": [SKY], "completion": [BLUE], "label": True}),
    "argilla/distilabel-capybara-dpo-7k-binarized": (None, ("train",), {
        "source": "Airoboros", "conversation": [{"input": "The sky?", "output": "It is blue."}],
        "original_response": "It is blue.", "generation_prompt": ["The sky?"], "raw_generation_responses": ["Green."],
        "new_generations": ["Green."], "prompt": "The sky?", "chosen": [SKY, BLUE], "rejected": [SKY, GREEN],
        "rating_chosen": 5, "rating_rejected": 2, "chosen_model": "a", "rejected_model": "b"}),
    "princeton-nlp/llama3-ultrafeedback-armorm": (None, ("train", "test"), {
        "prompt_id": "0f", "prompt": "The sky?", "all_generated_responses": ["It is blue.", "It is green."],
        "all_rm_scores": [0.2, 0.1], "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}),
    "trl-lib/tldr": (None, ("train", "validation", "test"), {
        "prompt": "SUBREDDIT: r/x\n\nTITLE: Sky\n\nPOST: It is blue.\n\nTL;DR:", "completion": " Blue sky."}),
}
"""Dataset: (its configuration, its splits, a row)."""

ROWS = 64


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None = None, **options: Any) -> datasets.DatasetDict:
        wanted, splits, row = STAND_INS[name]
        assert config == wanted
        return datasets.DatasetDict({split: datasets.Dataset.from_list([row] * ROWS) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def family(model: str) -> str:
    """The tokenizer that stands in for the model's: with the chat template of its family."""
    if "Llama" in model:
        return "llama3.1"
    return "qwen3" if "Qwen3" in model else "base"


@pytest.mark.parametrize("name", REAL)
def test_every_other_recipe_meets_the_columns_of_its_dataset(name: str, hub: None) -> None:
    plan = load_plan(name)
    (stage,) = plan.stages
    tokenizer = make(family(stage.job.options.model_name))
    found = prepare(data_request(stage.job), tokenizer)
    assert len(found.train) > 0 and found.report.rows_read == found.report.rows_trained + len(found.report.bad)
    assert not found.report.bad
    assert found.eval is not None and len(found.eval) > 0
    assert len(found.train) + len(found.eval) * (stage.job.options.val_split_ratio is not None) == ROWS
    if stage.job.spec.takes == "sft":
        assert any(label != -100 for label in found.train[0]["labels"])
    if stage.job.spec.takes in ("preference", "reward"):
        assert found.train[0]["chosen_ids"] != found.train[0]["rejected_ids"]
    if stage.job.spec.takes == "prompts" and "gsm8k" in name:
        assert found.train[0]["answer"] == "42"
    if plan.probe is not None:
        assert plan.probe.rows(tokenizer)[0]["answer"] == "42"


@pytest.mark.parametrize("backend", ["trl", "fast"])
@pytest.mark.parametrize("name", REAL)
def test_every_other_recipe_is_valid_on_each_backend_that_runs_its_algorithm(name: str, backend: str) -> None:
    (stage,) = load_plan(name, {"backend": backend}).stages
    verdict = supports(BACKENDS.load(backend), stage.job.spec.name)
    assert stage.job.options.backend == backend
    assert bool(verdict) == ((backend, stage.job.spec.name) != ("fast", "gspo")), verdict.reason
    if verdict:
        try:
            assert choose_backend(stage.job).name == backend
        except aligntune.AlignTuneError as error:  # without a GPU; never for what the recipe asks of it
            assert backend == "fast" and not isinstance(error, UnsupportedAlgorithmError)


def test_each_algorithm_has_a_builtin_recipe_and_one_of_a_real_model() -> None:
    for name in ALGORITHMS.names():
        assert f"{name}-builtin" in BUILTIN
        models = [load_plan(recipe).stages[-1].job.options.model_name for recipe in REAL
                  if read_recipe(recipe).algorithms == (name,)]
        assert any(model.startswith(("meta-llama/Llama-3.2-1B", "Qwen/Qwen3-")) for model in models), name
    assert {load_plan(name).stages[0].job.options.dataset_name for name in REAL} == set(STAND_INS)


@pytest.mark.parametrize("name", REAL)
def test_every_number_of_a_recipe_for_a_real_model_has_its_source_beside_it(name: str) -> None:
    """And every other value of what decides the training: words as well as numbers."""
    text = packaged()[name].read_text()
    section, values = "", 0
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):(?: +([^#\s].*))?", line)
        if found is None:
            continue
        indent, key, value = found.groups()
        section = section if indent else key
        assert indent or not value or section not in SOURCED, f"{name}: a line for each value of {section}"
        if indent and value and (section in SOURCED or re.match(r"-?[\d.]", value)):
            values += 1
            assert re.search(r"\s# \S", value), f"{name}: {line.strip()}"
    parsed = yaml.safe_load(text)
    assert values >= sum(len(parsed.get(block, {})) for block in SOURCED) >= 4
    for word in re.findall(r'"(the \w+)"', text):  # a short name stands for something, and is used
        assert text.count(word) > 1, f"{name}: {word}"
    assert parsed["algorithm"] in name


def test_settings_of_simpo_are_those_that_its_authors_have_for_its_dataset() -> None:
    """Their v2 file; the first one, with beta 2.5 and a ratio of 0.55, trains on other pairs."""
    options = load_plan("simpo-llama-1b").stages[0].job.options
    assert options.dataset_name == "princeton-nlp/llama3-ultrafeedback-armorm"
    assert (options.beta, options.simpo_gamma / options.beta) == (10, pytest.approx(0.3))
    assert "llama-3-8b-instruct-simpo-v2.yaml" in packaged()["simpo-llama-1b"].read_text()


@pytest.mark.parametrize("name", [*BUILTIN, "quickstart", "tiny-instruct"])
def test_a_builtin_recipe_trains_two_steps(name: str, tmp_path: Path) -> None:
    """As it is but for the number of steps and of rows. A model that can add stands in for a first stage that has run,
    and is sampled hot, so that some answers are wrong."""
    algorithm = read_recipe(name).algorithms[-1]
    small = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "max_samples": 256, "report_to": "none"}
    if name != "tiny-instruct":  # which evaluates nothing while it trains
        small["max_eval_samples"] = 8
    staged = read_recipe(name).staged
    if staged:
        small |= {"probe.max_samples": 8, "stages.1.batch_size": 8, "stages.1.model_name": "builtin:tiny-instruct"}
    if ALGORITHMS.load(algorithm).online:
        small |= {"stages.2.temperature": 2.0}
    results = aligntune.run_recipe(name, small)
    result = results[-1]
    assert len(results) == (2 if staged else 1)
    assert (result.algorithm, result.global_step, result.summary["status"]) == (algorithm, 2, "finished")
    assert staged == (result.probe_after is not None)
    folder = Path(result.output_dir)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(entry.get("grad_norm", 0) > 0 for entry in logged)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTIN)
def test_a_packaged_recipe_trains_resumes_and_is_evaluated(name: str, tmp_path: Path) -> None:
    runner, folder = CliRunner(), str(tmp_path / "run")
    result = runner.invoke(app, ["train", name, f"output_dir={folder}", "max_steps=2"])
    assert result.exit_code == 0, result.output
    algorithms = read_recipe(name).algorithms
    if len(algorithms) > 1:
        folder = f"{folder}/{len(algorithms)}-{algorithms[-1]}"
        assert json.loads(Path(folder, "summary.json").read_text())["steps"] == 2
    else:
        result = runner.invoke(app, ["train", name, f"output_dir={folder}", "max_steps=3", "resume=true"])
        assert result.exit_code == 0, result.output
        summary = json.loads(Path(folder, "summary.json").read_text())
        assert (summary["steps"], summary["resumed_from"]) == (3, f"{folder}/checkpoint-2")
    result = runner.invoke(app, ["evaluate", folder, "--json", "max_eval_samples=16"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert any(key in metrics for key in ("eval_perplexity", "eval_reward", "eval_rewards/margins", "eval_margin"))

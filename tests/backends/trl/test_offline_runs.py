"""Methods on fixed data from the factory to the run folder: resume, evaluation, generation, LoRA, QLoRA, reward models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from aligntune import ConfigError, create_reward_trainer, create_rl_trainer, create_sft_trainer
from aligntune.errors import AlignTuneError
from tests.backends.trl.test_quantized import plain  # noqa: F401  a model wide enough for 4 bits
from tests.core import tiny
from tests.core.test_trainer import At, give_up, lines, same, weights

ALGORITHMS = ("sft", "reward", "dpo", "ipo", "kto", "orpo", "simpo", "cpo")
PAIRS = [{"prompt": f"say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(16)]
HELD_OUT = [{"prompt": f"tell {i}", "chosen": f" {i}" * (i % 2 + 1), "rejected": " no" * (i % 3 + 1)} for i in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def make(algorithm: str, source: Any, path: Path, rows: Any = PAIRS, **options: Any) -> Any:
    given: dict[str, Any] = {
        "backend": "trl", "output_dir": str(path), "max_steps": 6, "batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "max_seq_length": 64,
    }
    given |= options
    if algorithm in ("sft", "reward"):
        factory = {"sft": create_sft_trainer, "reward": create_reward_trainer}[algorithm]
        return factory(source, rows, **given)
    return create_rl_trainer(source, rows, algorithm=algorithm, **given)


QUICK = {("kto", False), ("orpo", True), ("reward", True)}
MATRIX = [pytest.param(name, adapters, marks=() if (name, adapters) in QUICK else pytest.mark.slow,
                       id=f"{name}-{'lora' if adapters else 'full'}")
          for name in ALGORITHMS for adapters in (False, True)]


@pytest.mark.parametrize(("algorithm", "adapters"), MATRIX)
def test_a_run_that_was_cut_goes_on_bit_for_bit(algorithm: str, adapters: bool, model: str, tmp_path: Path) -> None:
    """Logged every other step, so that the cut falls between two logs: what they average is in the checkpoint."""
    options: dict[str, Any] = {"save_steps": 3, "logging_steps": 2, "use_peft": adapters}
    if adapters:
        options["lora_r"] = 4
    whole = make(algorithm, model, tmp_path / "whole", **options)
    start = weights(whole.trainer)
    whole.train()
    broken = make(algorithm, model, tmp_path / "run", **options)
    broken.trainer.add_callback(At(5, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = make(algorithm, model, tmp_path / "run", resume=True, **options)
    assert resumed.train().global_step == 6
    assert same(weights(whole.trainer), weights(resumed.trainer))
    assert not same(weights(whole.trainer), start)
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2, 4, 6]


@pytest.mark.parametrize("algorithm", [
    name if name in ("kto", "cpo", "reward") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS])
def test_evaluate_and_generate(algorithm: str, model: str, tmp_path: Path) -> None:
    """Evaluation means are over rows: the same from batches of 4 and 1 as from one of 5."""
    found = []
    for size in (4, 5):
        trainer = make(algorithm, model, tmp_path / str(size), eval_dataset_name=HELD_OUT, eval_batch_size=size,
                       max_steps=3)
        trainer.train()
        metrics = trainer.evaluate()
        timing = ("runtime", "per_second", "num_tokens", "epoch")
        found.append({name: value for name, value in metrics.items() if not name.endswith(timing)})
    names = {"sft": {"eval_loss", "eval_mean_token_accuracy"}, "reward": {"eval_accuracy", "eval_margin"},
             "kto": {"eval_kl", "eval_rewards/margins"}}
    assert names.get(algorithm, {"eval_rewards/accuracies", "eval_rewards/margins"}) <= found[0].keys()
    if algorithm != "kto":  # z_0 is a mean over a batch: its batches are part of the method
        skip = ("min_reward", "max_reward", "logits", "nll", "entropy", "eval_loss", "token_accuracy")
        keys = [name for name in found[0] if not any(part in name for part in skip)]
        if algorithm not in ("orpo", "cpo"):  # their likelihood is a mean over a batch's tokens
            keys.append("eval_loss")
        assert keys
        assert {k: found[0][k] for k in keys} == pytest.approx({k: found[1][k] for k in keys}, rel=1e-4, abs=1e-6)
    if algorithm == "reward":
        with pytest.raises(ConfigError, match="LlamaForSequenceClassification does not generate"):
            trainer.generate(["say 3"])
        return
    texts = trainer.generate(["say 3", "say 12"], max_new_tokens=5)
    assert len(texts) == 2 and texts == trainer.generate(["say 3", "say 12"], max_new_tokens=5)


@pytest.mark.parametrize("algorithm", [
    name if name in ("reward", "simpo") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS])
def test_qlora_on_cpu(algorithm: str, plain: str, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(algorithm, plain, tmp_path / "run", quantization="nf4", use_peft=True, lora_r=4, max_steps=3)
    assert "Linear4bit" in {type(module).__name__ for module in trainer.model.modules()}
    before = weights(trainer.trainer)
    assert trainer.train().global_step == 3
    moved = {name for name, value in weights(trainer.trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "score.modules_to_save" in name for name in moved)
    assert any("score" in name for name in moved) == (algorithm == "reward")
    trainer.save_model(tmp_path / "merged", merge_adapters=True)
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_saved_reward_model_scores_completions_by_its_path(
    adapters: bool, algorithm: str, model: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    trained = make("reward", model, tmp_path / "rm", center_rewards_coefficient=0.01, **options)
    trained.train()
    trained.save_model(tmp_path / "scorer")
    assert (tmp_path / "scorer/adapter_config.json").is_file() == adapters
    online = create_rl_trainer(
        model, [{"prompt": f"say {i}"} for i in range(8)], algorithm=algorithm, backend="trl", max_steps=1,
        batch_size=4, num_generations=4, max_completion_length=5, max_seq_length=64, report_to="none", logging_steps=1,
        reward_model_name=str(tmp_path / "scorer"), output_dir=str(tmp_path / "online"))
    (scorer,) = online.trainer.reward_funcs
    texts = [" 3 3 3", " no no"]
    scores = scorer(prompts=["say 3", "say 3"], completions=texts)
    ids = [tiny.tokenizer()(f"say 3{text}", return_tensors="pt")["input_ids"] for text in texts]
    trained.model.eval()
    with torch.no_grad():
        expected = [trained.model(input_ids=row).logits.item() for row in ids]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 0.01
    assert online.train().global_step == 1
    assert lines(tmp_path / "online")[0]["rewards/scorer/mean"] != 0


def test_adapters_of_another_kind_are_no_reward_model(model: str, tmp_path: Path) -> None:
    trained = make("orpo", model, tmp_path / "run", use_peft=True, lora_r=4, max_steps=1)
    trained.train()
    trained.save_model(tmp_path / "policy")
    with pytest.raises(ConfigError, match="adapters of a model for CAUSAL_LM, which scores nothing"):
        create_rl_trainer(model, PAIRS, algorithm="grpo", backend="trl", reward_model_name=str(tmp_path / "policy"),
                          output_dir=str(tmp_path / "grpo"), report_to="none")


def test_what_cannot_become_a_reward_model(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM object scores no sequences"):
        make("reward", tiny.llama(), tmp_path, tokenizer_name=tiny.tokenizer())
    tiny.scorer(num_labels=3).save_pretrained(tmp_path / "classes")
    tiny.tokenizer().save_pretrained(tmp_path / "classes")
    with pytest.raises(AlignTuneError, match="classes' cannot be loaded"):
        make("reward", str(tmp_path / "classes"), tmp_path / "run")
    with pytest.raises(ConfigError, match="num_labels=3"):
        make("reward", tiny.scorer(num_labels=3), tmp_path / "run", tokenizer_name=tiny.tokenizer())


def test_a_new_score_head_is_drawn_from_the_seed_and_an_old_one_stays(model: str, tmp_path: Path) -> None:
    def head(source: Any, name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(ord(name))  # the state of the process does not matter
        return make("reward", source, tmp_path / name, seed=seed).model.score.weight.detach().clone()

    assert torch.equal(head(model, "a", 1), head(model, "b", 1))
    assert not torch.equal(head(model, "c", 1), head(model, "d", 2))
    scorer = tiny.scorer(seed=7)
    scorer.save_pretrained(tmp_path / "old")
    tiny.tokenizer().save_pretrained(tmp_path / "old")
    assert torch.equal(head(str(tmp_path / "old"), "e", 1), scorer.score.weight)


def test_margins_reach_the_loss(model: str, tmp_path: Path) -> None:
    first = []
    for name, margin in (("plain", None), ("margins", 2.0)):
        rows = [row | ({"margin": margin} if margin else {}) for row in PAIRS]
        make("reward", model, tmp_path / name, rows, max_steps=1).train()
        first.append(lines(tmp_path / name)[0]["loss"])
    assert first[1] > first[0] + 0.5


def test_kto_rows_are_shuffled_once_and_matched_with_their_neighbours(model: str, tmp_path: Path) -> None:
    trainer = make("kto", model, tmp_path / "a", eval_dataset_name=HELD_OUT, eval_batch_size=5).trainer
    labels = list(trainer.train_dataset["label"])
    assert sorted(labels) == [False] * 16 + [True] * 16
    assert labels[:16] != [True] * 16, "pairs come as all good completions, then all bad ones"
    assert labels == list(make("kto", model, tmp_path / "b").trainer.train_dataset["label"])
    assert labels != list(make("kto", model, tmp_path / "c", seed=7).trainer.train_dataset["label"])
    for rows, size in ((trainer.train_dataset, 4), (trainer.eval_dataset, 5)):
        given, wrong = list(rows["completion_ids"]), list(rows["KL_completion_ids"])
        for start in range(0, len(given), size):
            assert wrong[start:start + size] == [given[start:start + size][-1], *given[start:start + size][:-1]]
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["label"].tolist() == labels[:4]


def test_kto_says_what_its_rows_ask_for(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": f" {i}", "label": i % 4 > 0} for i in range(13)]
    trainer = make("kto", model, tmp_path / "run", rows, max_steps=1)
    trainer.train()
    notices = json.loads((tmp_path / "run/summary.json").read_text())["notices"]
    # 9 good, 4 bad: 9 w_D / 4 in [1, 4/3]
    assert any("9 good and 4 bad" in line and "desirable_weight 0.444 to 0.593" in line for line in notices)
    assert any("the last batch of an epoch has one row" in line for line in notices)
    quiet = make("kto", model, tmp_path / "quiet", rows[:12], desirable_weight=0.4, max_steps=1)
    quiet.train()
    notices = json.loads((tmp_path / "quiet/summary.json").read_text())["notices"]
    assert not any("desirable_weight" in line or "last batch" in line for line in notices)
    with pytest.raises(ConfigError, match="batch size must be > 1"):
        make("kto", model, tmp_path / "one", rows, batch_size=1)
    assert make("kto", model, tmp_path / "apo", rows, batch_size=1, loss_type="apo_zero_unpaired", max_steps=1).train()


@pytest.mark.parametrize("algorithm", ["orpo", "cpo", "simpo"])
def test_pair_trainers_see_the_prepared_tokens(algorithm: str, model: str, tmp_path: Path) -> None:
    """No second tokenisation, no cut, no row lost, no BOS put before."""
    trainer = make(algorithm, model, tmp_path).trainer
    assert len(trainer.train_dataset) == 16
    for row, given in zip(trainer.train_dataset, PAIRS, strict=True):
        ids = tiny.tokenizer()(given["prompt"] + given["chosen"], add_special_tokens=False)["input_ids"]
        assert row["chosen_input_ids"] == [*ids, 2]
        prompt = len(given["prompt"])
        assert row["chosen_labels"] == [-100] * prompt + [*ids[prompt:], 2]
        assert row["rejected_labels"][:prompt] == [-100] * prompt


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "sft"])
def test_padding_free_is_refused_where_trl_pads(algorithm: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"TRL's {algorithm} pads all the same"):
        make(algorithm, model, tmp_path, padding_free=True)


def test_a_reference_from_elsewhere_and_precomputed_log_probs_for_kto_and_ipo(model: str, tmp_path: Path) -> None:
    for algorithm in ("kto", "ipo"):
        trainer = make(algorithm, model, tmp_path / algorithm, ref_model_name=model, max_steps=1).trainer
        assert trainer.ref_model is not trainer.model
        assert same(dict(trainer.ref_model.named_parameters()), weights(trainer))
        early = make(algorithm, model, tmp_path / f"{algorithm}-early", precompute_ref_log_probs=True, max_steps=2)
        late = make(algorithm, model, tmp_path / f"{algorithm}-late", max_steps=2)
        early.train(), late.train()
        mine, its = (lines(tmp_path / f"{algorithm}-{name}")[1]["loss"] for name in ("early", "late"))
        assert mine == pytest.approx(its, rel=1e-5)


def test_a_hub_reward_model_class_is_what_was_saved(model: str, tmp_path: Path) -> None:
    trained = make("reward", model, tmp_path / "run", max_steps=1)
    trained.train()
    trained.save_model(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.config.num_labels == 1
    assert same({n: p.detach() for n, p in again.named_parameters()}, weights(trained.trainer))

"""Backend trl on prepared rows: what arrives in TRL's trainers, and that they train."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer, rloo_trainer

from aligntune import create_rl_trainer, create_sft_trainer
from aligntune.algorithms import ALGORITHMS as TABLE
from aligntune.backends import _compat
from aligntune.backends.base import Prepared, require
from aligntune.backends.trl.build import build
from aligntune.backends.trl.offline import Quiet
from aligntune.backends.trl.support import BACKEND
from aligntune.backends.trl.trainers import TRAINERS, reference_from_memory
from aligntune.core.resolve import Job, resolve
from aligntune.core.rules import DIVERGENCES, VLLM_CHOICES
from aligntune.errors import BackendUnavailableError, ConfigError, DataError, UnsupportedAlgorithmError
from tests.core import tiny

ONLINE = ("rloo", "grpo", "gspo", "dapo", "dr_grpo")
OFFLINE = ("sft", "reward", "dpo", "ipo", "kto", "orpo", "simpo", "cpo")
ALGORITHMS = (*OFFLINE, *ONLINE)
SFT_LOSS = 5.6252174
DPO_LOSS = 1.1806706
"""First losses of the seeded model on the rows below, as first computed (torch 2.13, fp32)."""


def longest(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Different completions of one prompt get different rewards, so advantages are not all zero."""
    return [float(len(set(text))) for text in completions]


def rows(algorithm: str, count: int = 16) -> Dataset:
    tokenizer = tiny.tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    takes = TABLE.load(algorithm).takes
    if takes == "sft":
        made = [{"input_ids": ids(f"ask {i}: ") + ids(f"say {i * i}") + [2],
                 "labels": [-100] * len(ids(f"ask {i}: ")) + ids(f"say {i * i}") + [2]} for i in range(count)]
    elif takes in ("preference", "reward"):
        made = [{"prompt_ids": ids(f"say {i}"), "chosen_ids": ids(f" {i}" * (i % 3 + 1)) + [2],
                 "rejected_ids": ids(" no" * (i % 2 + 1)) + [2]} for i in range(count)]
        if takes == "reward":
            made = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in made]
    elif takes == "unpaired":
        made = [{"prompt_ids": ids(f"say {i}"), "completion_ids": ids(f" {i}" * (i % 3 + 1)) + [2],
                 "label": i % 3 > 0} for i in range(count)]
    else:
        made = [{"prompt": f"count to {i}:", "answer": str(i)} for i in range(count)]
    return Dataset.from_list(made)


def job_of(algorithm: str, tmp_path: Any, model: Any = None, **options: Any) -> Job:
    made = tiny.scorer if algorithm == "reward" else tiny.llama
    given: dict[str, Any] = {
        "model_name": model if model is not None else made(), "dataset_name": "in memory",
        "algorithm": algorithm, "backend": "trl", "output_dir": str(tmp_path), "max_steps": 3, "batch_size": 4,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "tokenizer_name": tiny.tokenizer(),
    }
    if algorithm in ONLINE:
        given |= {"reward_functions": [longest], "num_generations": 4, "max_completion_length": 6,
                  "max_seq_length": 64}
    return resolve({**given, **options})


def trainer_of(algorithm: str, tmp_path: Any, model: Any = None, count: int = 16, **options: Any) -> Any:
    job = job_of(algorithm, tmp_path, model, **options)
    return build(job, Prepared(tiny.tokenizer(), rows(algorithm, count), None)).trainer


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_trains_three_steps(algorithm: str, adapters: bool, tmp_path: Any) -> None:
    options: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    trainer = trainer_of(algorithm, tmp_path, **options)
    before = parameters(trainer.model)
    out = trainer.train()
    assert out.global_step == 3
    assert torch.isfinite(torch.tensor(out.training_loss))
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    assert all(("lora_" in name or "score.modules_to_save" in name) == adapters for name in moved)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_seven_changed_values_of_a_yaml_arrive(tmp_path: Any) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("""
train:
  learning_rate: 3.0e-4
  gradient_accumulation_steps: 3
  lr_scheduler: cosine
  weight_decay: 0.07
  adam_beta2: 0.97
  max_grad_norm: 0.4
logging: {save_total_limit: 5, report_to: none}
""")
    args = create_sft_trainer(tiny.llama(), tiny.text_rows(), backend="trl", tokenizer_name=tiny.tokenizer(),
                              output_dir=str(tmp_path / "run"), config=path).trainer.args
    assert args.learning_rate == 3e-4
    assert args.gradient_accumulation_steps == 3
    assert args.lr_scheduler_type == "cosine"
    assert args.weight_decay == 0.07
    assert args.adam_beta2 == 0.97
    assert args.max_grad_norm == 0.4
    assert args.save_total_limit == 5


def test_one_epoch_of_eight_rows_at_batch_four_is_two_steps(tmp_path: Any) -> None:
    assert trainer_of("sft", tmp_path, count=8, max_steps=-1).train().global_step == 2


@pytest.mark.parametrize(("algorithm", "expected"), [
    ("grpo", {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.04, "epsilon": 0.2,
              "scale_rewards": "group", "use_bias_correction_kl": False}),
    ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 3e-4,
              "epsilon_high": 4e-4, "steps_per_generation": 4}),
    ("dapo", {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "epsilon": 0.2,
              "epsilon_high": 0.28, "mask_truncated_completions": False, "reward_weights": [1.0, 1.0]}),
    ("rloo", {"beta": 0.05, "epsilon": 0.2, "epsilon_high": None, "normalize_advantages": False,
              "reward_clip_range": None, "num_iterations": 1}),
    ("dr_grpo", {"loss_type": "dr_grpo", "importance_sampling_level": "token", "beta": 0.0, "scale_rewards": "none"}),
])
def test_published_constants_reach_trl(algorithm: str, expected: dict, tmp_path: Any) -> None:
    args = trainer_of(algorithm, tmp_path).args
    assert {name: getattr(args, name) for name in expected} == expected


def test_cpu_runs_in_fp32_without_recompute(tmp_path: Any) -> None:
    args = trainer_of("sft", tmp_path).args
    assert (args.bf16, args.fp16, args.gradient_checkpointing, args.use_cpu) == (False, False, False, True)


def test_sft_loss_is_pinned(tmp_path: Any) -> None:
    """The first loss on fixed weights and rows; a change of masking, shift or reduction moves it."""
    trainer = trainer_of("sft", tmp_path, max_steps=1, batch_size=16, learning_rate=0.0)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    model, total, count = tiny.llama(), 0.0, 0
    for row in rows("sft"):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        total, count = total + losses.sum().item(), count + int((labels != -100).sum())
    assert logged == pytest.approx(total / count, rel=1e-5)
    assert logged == pytest.approx(SFT_LOSS, rel=1e-4)


def test_dpo_loss_is_pinned_with_beta_and_a_moved_policy(tmp_path: Any) -> None:
    """The policy is moved away from the reference first: at the start the loss is log 2 whatever beta is."""
    reference = tiny.llama()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for index, value in enumerate(policy.parameters()):
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index)))
    trainer = trainer_of("dpo", tmp_path, policy, max_steps=1, batch_size=16, learning_rate=0.0, beta=0.3,
                         ref_model_name=reference)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]

    def log_prob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].float()
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()

    losses = []
    with torch.no_grad():
        for row in rows("dpo"):
            prompt = row["prompt_ids"]
            margin = sum(sign * (log_prob(policy, prompt, row[key]) - log_prob(reference, prompt, row[key]))
                         for sign, key in ((1, "chosen_ids"), (-1, "rejected_ids")))
            losses.append(-torch.nn.functional.logsigmoid(0.3 * margin))
    expected = torch.stack(losses).mean().item()
    assert abs(expected - 0.6931) > 0.01
    assert logged == pytest.approx(expected, rel=1e-4)
    assert logged == pytest.approx(DPO_LOSS, rel=1e-3)


def test_the_dpo_reference_of_an_in_memory_model_is_a_copy_that_stays(tmp_path: Any) -> None:
    model = tiny.llama(seed=5)
    trainer = trainer_of("dpo", tmp_path, model)
    reference = trainer.ref_model
    assert reference is not None and reference is not model
    before = parameters(reference)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in reference.named_parameters())
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


def test_the_grpo_reference_comes_from_memory_and_kl_grows(tmp_path: Any) -> None:
    model = tiny.llama(seed=6)
    model.config._name_or_path = "no/such-checkpoint"
    trainer = trainer_of("grpo", tmp_path, model, beta=0.1, learning_rate=1e-2)
    assert model.config._name_or_path == "no/such-checkpoint"
    before = parameters(tiny.llama(seed=6))
    assert all(torch.equal(before[name], value) for name, value in trainer.ref_model.named_parameters())
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-5


@pytest.mark.parametrize("module", [grpo_trainer, rloo_trainer], ids=["grpo", "rloo"])
def test_the_reference_comes_to_the_gpu_of_the_policy(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Not to wherever among several GPUs it fits; and TRL does not say that this is ignored."""
    told = logging.getLogger(module.__name__)
    warning = "You passed `model_init_kwargs` to the `%s`, but your model is already instantiated."
    assert warning[:30] in inspect.getsource(module)
    args = SimpleNamespace(device=torch.device("cuda", 1), model_init_kwargs=None)
    with pytest.raises(KeyError), reference_from_memory(tiny.llama(), args):
        assert args.model_init_kwargs == {"device_map": {"": torch.device("cuda", 1)}}
        told.warning(warning, "Config")
        told.warning("another")
        raise KeyError
    assert args.model_init_kwargs is None and [record.getMessage() for record in caplog.records] == ["another"]
    told.warning(warning, "Config")
    assert len(caplog.records) == 2
    args.device = torch.device("cpu")
    with reference_from_memory(tiny.llama(), args):
        assert args.model_init_kwargs is None


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_model_on_loan_from_another_trainer_trains_as_a_fresh_one(algorithm: str, tmp_path: Any) -> None:
    used = tiny.llama()
    trainer_of("sft", tmp_path / "a", used, learning_rate=0.0).train()
    # Each is trained before the next is built: building seeds the generator that rollouts draw from.
    fresh = trainer_of(algorithm, tmp_path / "b")
    fresh.train()
    again = trainer_of(algorithm, tmp_path / "c", used)
    again.train()
    for (name, one), (_, two) in zip(fresh.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("second", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_adapters_that_another_trainer_had_get_a_reference_of_their_own(second: str, tmp_path: Any) -> None:
    """TRL leaves the first reference on the model, as an adapter "ref", and then fails to add another."""
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer_of("dpo", tmp_path / "first", model, learning_rate=0.1).train()
    left = {name: value.clone() for name, value in model.named_parameters() if ".ref." in name}
    trained = {name: value.clone() for name, value in model.named_parameters() if ".default." in name}
    assert left and any(not torch.equal(value, trained[name.replace(".ref.", ".default.")])
                        for name, value in left.items())
    job = job_of(second, tmp_path / "second", model, **({"beta": 0.1} if second in ("grpo", "rloo") else {}))
    trainer = build(job, Prepared(tiny.tokenizer(), rows(second), None)).trainer
    reference = {name: value for name, value in model.named_parameters() if ".ref." in name}
    assert bool(reference) == (second != "sft")
    assert all(torch.equal(value, trained[name.replace(".ref.", ".default.")]) for name, value in reference.items())
    assert any("adapter 'ref'" in notice for notice in job.notices)
    assert trainer.train().global_step == 3


def test_a_run_of_given_adapters_is_resumed_with_its_reference(tmp_path: Any) -> None:
    """The reference is in the checkpoint: that of the adapters given now is another, and does not count."""
    def made(seed: int, **options: Any) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = tiny.llama()
        torch.manual_seed(seed)
        pairs = [{"prompt": f"{i}?", "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(16)]
        return create_rl_trainer(
            get_peft_model(model, config), pairs, algorithm="dpo", backend="trl", tokenizer_name=tiny.tokenizer(),
            batch_size=4, learning_rate=1e-2, lr_scheduler="constant", report_to="none", **options)

    whole = made(1, max_steps=3, output_dir=str(tmp_path / "whole"))
    whole.train()
    made(1, max_steps=2, output_dir=str(tmp_path / "run")).train()
    resumed = made(2, max_steps=3, output_dir=str(tmp_path / "run"), resume=True)
    assert resumed.train().global_step == 3
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_nothing_is_reported_to_the_hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    def caught(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(base, "send_telemetry", caught)
    for algorithm in ALGORITHMS:
        trainer_of(algorithm, tmp_path / algorithm)


def test_a_tied_head_is_no_missing_weight_of_a_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.modules.module import _IncompatibleKeys

    assert all(issubclass(TRAINERS[name], Quiet) for name in TABLE.names())
    trainer = trainer_of("sft", tmp_path, tiny.llama(tie_word_embeddings=True))
    warned: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", warned.append)
    trainer._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight"], []))
    assert warned == []
    trainer._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight", "model.norm.weight"], ["x"]))
    assert len(warned) == 2 and "['model.norm.weight']" in warned[0] and "['x']" in warned[1]


def test_a_checkpoint_has_a_model_card_for_the_hub_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cards() -> int:
        return len(list(tmp_path.rglob("README.md")))

    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_: None)
    trainer = trainer_of("sft", tmp_path)
    trainer._save_checkpoint(trainer.model, None)
    assert cards() == 0
    trainer.create_model_card(model_name="m")
    assert cards() == 1, "asked for by hand"
    (tmp_path / "README.md").unlink()
    trainer.hub_model_id = "me/m"
    trainer._save_checkpoint(trainer.model, None)
    assert cards() == 1


def test_trainer_options_are_checked_against_the_real_class(tmp_path: Any) -> None:
    assert trainer_of("sft", tmp_path, trainer_options={"neftune_noise_alpha": 5.0}).args.neftune_noise_alpha == 5.0
    assert trainer_of("sft", tmp_path, trainer_options={"adam_beta1": 0.8}).args.adam_beta1 == 0.8
    with pytest.raises(ConfigError, match=r"neftune_noise_alph: SFTConfig has no such field; did you mean"):
        trainer_of("sft", tmp_path, trainer_options={"neftune_noise_alph": 5.0})
    with pytest.raises(ConfigError, match="learning_rate is given too"):
        trainer_of("sft", tmp_path, trainer_options={"learning_rate": 5.0})
    with pytest.raises(ConfigError, match="gspo is defined by 'sequence'"):
        trainer_of("gspo", tmp_path, trainer_options={"importance_sampling_level": "token"})
    with pytest.raises(ConfigError, match="model_init_kwargs: TRL gets a model that is loaded already: .*model_dtype"):
        trainer_of("sft", tmp_path, trainer_options={"model_init_kwargs": {"dtype": "bfloat16"}})


def test_trainer_options_of_a_wrong_type_are_all_told_at_creation(tmp_path: Any) -> None:
    right = {"max_grad_norm": 1, "optim_args": None, "lr_scheduler_kwargs": {"a": 1}, "dataloader_num_workers": 0,
             "label_names": ["labels"], "save_only_model": True, "hub_strategy": "end", "neftune_noise_alpha": 5.0}
    args = trainer_of("sft", tmp_path, trainer_options=right).args
    assert trainer_of("sft", tmp_path, trainer_options={"max_grad_norm": None}).args.max_grad_norm is None
    assert args.max_grad_norm == 1 and args.lr_scheduler_kwargs == {"a": 1} and args.save_only_model is True
    wrong = {"max_grad_norm": "x", "dataloader_num_workers": 1.5, "save_only_model": "no", "label_names": "labels",
             "neftune_noise_alpha": True, "accelerator_config": 3}
    with pytest.raises(ConfigError) as caught:
        trainer_of("sft", tmp_path, trainer_options=wrong)
    told = dict(fault.removeprefix("train.trainer_options.").split(" = ", 1) for fault in caught.value.faults)
    assert list(told) == list(wrong)
    assert told["max_grad_norm"] == "'x': must be a float" and told["save_only_model"] == "'no': must be a bool"
    assert told["label_names"] == "'labels': must be a list or None"
    assert told["neftune_noise_alpha"] == "True: must be a float or None"


@pytest.mark.parametrize(("options", "told"), [
    ({"lora_target_modules": ["q_proj", "v_prj"]},
     ["lora.lora_target_modules: unknown module 'v_prj'; did you mean 'v_proj'?"]),
    ({"lora_target_modules": ["self_attn.q_prj"], "modules_to_save": ["lm_hed"]},
     ["lora.lora_target_modules: unknown module 'self_attn.q_prj'",
      "lora.modules_to_save: unknown module 'lm_hed'; did you mean 'lm_head'?"]),
    ({"lora_target_modules": "q_proj"}, ["lora.lora_target_modules = 'q_proj': fits no module's whole name"]),
])
def test_modules_that_the_model_lacks_are_told(options: dict, told: list, tmp_path: Any) -> None:
    """peft drops a name that fits nothing without a word, as long as another one fits."""
    with pytest.raises(ConfigError) as caught:
        trainer_of("sft", tmp_path, use_peft=True, **options)
    assert len(caught.value.faults) == len(told)
    assert all(fault.startswith(start) for fault, start in zip(caught.value.faults, told, strict=True))


@pytest.mark.parametrize("targets", [["self_attn.q_proj", "down_proj"], r".*\.q_proj", "all-linear", None])
def test_modules_are_named_by_the_end_of_their_path_or_by_a_pattern(targets: Any, tmp_path: Any) -> None:
    model = trainer_of("sft", tmp_path, use_peft=True, lora_target_modules=targets, modules_to_save=["lm_head"]).model
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())


def test_too_few_prompts_for_a_round_of_generation(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="1 prompts, but one round of generation takes 2"):
        trainer_of("grpo", tmp_path, count=1, batch_size=8)


def test_packing_says_what_a_step_holds(tmp_path: Any) -> None:
    job = job_of("sft", tmp_path, packing=True, max_seq_length=64)
    trainer = build(job, Prepared(tiny.tokenizer(), rows("sft"), None)).trainer
    assert 0 < len(trainer.train_dataset) < 16
    assert any("rows of" in notice and "a step of 4 sequences" in notice for notice in job.notices)
    assert trainer.train().global_step == 3


def test_packing_says_no_more_than_there_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def notice(count: int) -> str:
        job = job_of("sft", tmp_path, packing=True, max_seq_length=64)
        ids = [[3, 4, 5]] * count
        prepared = Prepared(tiny.tokenizer(), Dataset.from_dict({"input_ids": ids, "labels": ids}), None)
        build(job, prepared)
        return next(text for text in job.notices if text.startswith("packing: "))

    assert notice(10) == ("packing: 10 rows of 30 tokens fill 1 sequence of up to 64; a step of 1 sequence holds about "
                          "10.0 rows and 30 tokens a device")
    monkeypatch.setattr("aligntune.backends.trl.build.world_size", lambda: 2)
    assert "fill 5 sequences of up to 64; a step of 3 sequences holds about 63.0 rows and 189 tokens" in notice(105)


def test_gates_of_the_backend() -> None:
    with pytest.raises(UnsupportedAlgorithmError, match="TRL generates with"):
        require(BACKEND, "grpo", {"rollout_engine": "fast"})
    with pytest.raises(UnsupportedAlgorithmError, match="memory_budget_gib"):
        require(BACKEND, "sft", {"memory_budget_gib": 3.0})
    with pytest.raises(UnsupportedAlgorithmError, match="backend='trl', strict=True: TRL has no kernels of ours"):
        require(BACKEND, "sft", {"strict": True})
    require(BACKEND, "sft", vars(SimpleNamespace(memory_budget_gib=None, strict=False)))


def test_what_trl_has_not_or_wants_installed_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("grpo", tmp_path, sync_ref_model=True, beta=0.1)
    job.set("use_peft", True)  # adapters that are known when the model is loaded
    with pytest.raises(ConfigError, match="GRPOTrainer: .*sync_ref_model=True"):
        build(job, Prepared(tiny.tokenizer(), rows("grpo"), None))
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="RLOOTrainer: vLLM is not available"):
        trainer_of("rloo", tmp_path, rollout_engine="vllm")


def test_the_divergences_and_the_ways_of_vllm_are_trls() -> None:
    """The rule would refuse one that a later TRL adds."""
    source = inspect.getsource(DPOTrainer)
    assert set(re.findall(r'self\.f_divergence_type == "(\w+)"', source)) == set(DIVERGENCES)
    compared = {"vllm_mode": re.findall(r'self\.mode == "(\w+)"', inspect.getsource(VLLMGeneration)),
                "vllm_importance_sampling_mode": re.findall(r'"((?:token|sequence)_(?:mask|truncate))"',
                                                            inspect.getsource(GRPOTrainer))}
    assert {field: set(found) for field, found in compared.items()} == {
        field: set(choices) for field, choices in VLLM_CHOICES.items()}


def test_overlong_filtering_leaves_truncated_completions_out(tmp_path: Any) -> None:
    """No completion may end, so every one is cut: nothing may move."""
    trainer = trainer_of("dapo", tmp_path, mask_truncated_completions=True,
                         trainer_options={"generation_kwargs": {"suppress_tokens": [2]}})
    before = parameters(trainer.model)
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


@pytest.mark.parametrize(("installed", "loads"), [("5.17.0", True), ("5.22.2", True), ("5.23.0", False)])
def test_the_adapter_at_the_top_of_a_checkpoint_of_several_is_loaded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, installed: str, loads: bool,
) -> None:
    """transformers up to 5.22 loads those in subfolders alone, and the policy would train on as it was given."""
    def adapted(seed: int) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = tiny.llama()
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
        model.add_adapter("ref", config)
        return model

    def values(model: Any, adapter: str) -> list[torch.Tensor]:
        return [value for name, value in model.named_parameters() if f".{adapter}." in name]

    saved, given = adapted(1), adapted(2)
    saved.save_pretrained(str(tmp_path))
    before = {name: [value.clone() for value in values(given, name)] for name in ("default", "ref")}
    monkeypatch.setattr(_compat, "version", lambda name: installed)
    _compat.load_top_adapter(given, str(tmp_path))
    wanted = values(saved, "default") if loads else before["default"]
    assert all(map(torch.equal, values(given, "default"), wanted)) and len(wanted) == 4
    assert not any(map(torch.equal, before["default"], values(saved, "default")))
    # The rest is transformers' own.
    assert all(map(torch.equal, values(given, "ref"), before["ref"]))
    assert given.active_adapters == ["default"] and all(value.requires_grad for value in values(given, "default"))
    _compat.load_top_adapter(tiny.llama(), str(tmp_path))  # no adapters: nothing to do

"""Our options and the fields of TRL's config classes: a field and the option that makes it are not both given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aligntune.algorithms import ALGORITHMS
from aligntune.backends.loading import Precision
from aligntune.backends.trl import options as table
from aligntune.backends.trl.options import CONFIGS, FIXED, MADE_OF, SAME_FIELD, trl_config
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.core.resolve import Job, option_table, resolve
from aligntune.errors import ConfigError

MADE_BY = MADE_OF | {field: (option,) for option, field in SAME_FIELD.items()}
GPU = Precision("bf16", "cuda", "of a test")


def job_of(name: str, folder: Path, **options: Any) -> Job:
    reward = {"reward_functions": ["exact_match"]} if ALGORITHMS.load(name).needs_reward else {}
    return resolve({"algorithm": name, "backend": "trl", "model_name": "m", "dataset_name": "d",
                    "output_dir": str(folder), **reward, **options})


def fields_of(name: str) -> set[str]:
    return {item.name for item in dataclasses.fields(CONFIGS[name])}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_field_that_is_set_names_the_options_that_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever every way through `trl_config` sets: a field without an entry could overrule its option in silence."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(table, "_pass_through", lambda job, cls, names, kwargs: made.update(kwargs))
    monkeypatch.setattr(table, "config_kwargs", lambda cls, kwargs: {"output_dir": str(tmp_path), "use_cpu": True})
    every = {"val_split_ratio": 0.5, "eval_steps": 1, "report_to": "none", "use_peft": True, "lora_dropout": 0.1}
    trl_config(job_of(name, tmp_path, **every, **({"packing": True} if name == "sft" else {})), GPU, eval_rows=4)
    assert {"optim", "eval_steps", "output_dir"} <= set(made) and len(made) > 30
    assert made.keys() - MADE_BY.keys() - FIXED.get(name, {}).keys() == set()
    assert made.keys() <= fields_of(name)


def test_every_entry_is_of_options_and_fields_that_exist() -> None:
    options, fields = set(option_table(None)), set().union(*map(fields_of, CONFIGS))
    assert {option for made_of in MADE_BY.values() for option in made_of} <= options
    # Those that only some versions of transformers have.
    assert MADE_BY.keys() - fields <= {"activation_checkpointing", "warmup_ratio"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_field_overrules_an_option_that_is_given(name: str, tmp_path: Path) -> None:
    tried = 0
    for field in sorted(MADE_BY.keys() & fields_of(name) - FIXED.get(name, {}).keys()):
        for option in MADE_BY[field]:
            job = job_of(name, tmp_path, trainer_options={field: None})
            if option not in vars(job.options):
                continue
            for origin in ("argument", "config"):
                job.origin[option] = origin
                with pytest.raises(ConfigError, match=f"trainer_options.{field}: {option} is given too; give one of"):
                    trl_config(job, GPU, eval_rows=0)
            for origin in ("default", "algorithm default"):
                job.origin[option] = origin
                kwargs: dict[str, Any] = {}
                table._pass_through(job, CONFIGS[name], fields_of(name), kwargs)
                assert kwargs == {field: None}
            tried += 1
    assert tried > 35


@pytest.mark.parametrize(("name", "options", "fields", "option"), [
    ("sft", {"optimizer": "adamw_8bit"}, {"optim": "sgd"}, "optimizer"),
    ("sft", {"gradient_checkpointing": "offload"}, {"gradient_checkpointing": False}, "gradient_checkpointing"),
    ("dpo", {"gradient_checkpointing": False}, {"gradient_checkpointing": True}, "gradient_checkpointing"),
    ("sft", {"warmup_ratio": 0.1}, {"warmup_steps": 7}, "warmup_ratio"),
    ("sft", {"warmup_steps": 3}, {"warmup_steps": 7}, "warmup_steps"),
    ("kto", {"precision": "fp32"}, {"bf16": True}, "precision"),
    ("sft", {"precision": "bf16"}, {"fp16": True}, "precision"),
    ("sft", {"save_steps": 5}, {"save_strategy": "no"}, "save_steps"),
    ("sft", {"eval_steps": 5, "val_split_ratio": 0.5}, {"eval_strategy": "epoch"}, "eval_steps"),
    ("sft", {"eval_batch_size": 5}, {"per_device_eval_batch_size": 2}, "eval_batch_size"),
    ("reward", {"logging_steps": 5}, {"logging_strategy": "epoch"}, "logging_steps"),
    ("cpo", {"lr_scheduler": "cosine"}, {"lr_scheduler_type": "linear"}, "lr_scheduler"),
    ("sft", {"report_to": "none"}, {"report_to": ["wandb"]}, "report_to"),
    ("sft", {"seed": 5}, {"seed": 6}, "seed"),
    ("dpo", {"max_seq_length": 64}, {"max_length": 32}, "max_seq_length"),
    ("grpo", {"rollout_engine": "hf"}, {"use_vllm": True}, "rollout_engine"),
    ("ppo", {"log_completions": True}, {"log_completions": False}, "log_completions"),
    ("orpo", {"use_peft": True, "lora_dropout": 0.1}, {"disable_dropout": True}, "lora_dropout"),
])
def test_give_one_of_the_two(
    name: str, options: dict[str, Any], fields: dict[str, Any], option: str, tmp_path: Path,
) -> None:
    job = job_of(name, tmp_path, trainer_options=fields, **options)
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}: {option} is given too; give one of the two"):
        trl_config(job, GPU, eval_rows=4)
    job.options.trainer_options = {}  # the option alone is no fault
    trl_config(job, Precision("fp32", "cpu", "of a test"), eval_rows=4)


def test_a_field_beside_an_option_at_its_default_is_taken(tmp_path: Path) -> None:
    fields = {"optim": "sgd", "warmup_steps": 7, "save_strategy": "no", "per_device_eval_batch_size": 2}
    args = trl_config(job_of("sft", tmp_path, trainer_options=fields, batch_size=4),
                      Precision("fp32", "cpu", "of a test"), eval_rows=4)
    assert (args.optim, args.warmup_steps, args.save_strategy, args.per_device_eval_batch_size) == ("sgd", 7, "no", 2)


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if "activation_offloading" in fields_of(name)))
def test_activations_are_offloaded_from_a_gpu(name: str, tmp_path: Path) -> None:
    """Without one TRL would look for a stream of it when its trainer is made."""
    job = job_of(name, tmp_path, trainer_options={"activation_offloading": True})
    with pytest.raises(ConfigError, match="activation_offloading=True: no GPU is used here"):
        trl_config(job, CPU, eval_rows=0)
    job.options.trainer_options = {"activation_offloading": False}
    assert trl_config(job, CPU, eval_rows=0).activation_offloading is False


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if "disable_dropout" in fields_of(name)))
def test_the_dropout_that_is_asked_for_is_not_turned_off(name: str, tmp_path: Path) -> None:
    cpu = Precision("fp32", "cpu", "of a test")
    left = trl_config(job_of(name, tmp_path), cpu, eval_rows=0).disable_dropout
    assert left is {item.name: item.default for item in dataclasses.fields(CONFIGS[name])}["disable_dropout"]
    asked = job_of(name, tmp_path, use_peft=True, lora_dropout=0.1)
    assert trl_config(asked, cpu, eval_rows=0).disable_dropout is False


CPU = Precision("fp32", "cpu", "of a test")


@pytest.mark.parametrize(("given", "message"), [
    ({"temprature": 0.1}, "temprature: transformers' GenerationConfig has no such field; did you mean the option "
                          "'temperature'"),
    ({"num_beam": 2}, "num_beam: .*; did you mean 'num_beams'"), ({"stop": "a"}, "did you mean 'stop_strings'"),
    ({"_from_model_config": True}, "no such field"), ({"zzz": 1}, "no such field$"),
    ({"temperature": 0.1}, "temperature: give the option temperature, which the loss goes by too"),
    ({"max_new_tokens": 9}, "give the option max_completion_length"), ({"max_length": 9}, "max_completion_length"),
    ({"top_k": 9, "n": 2, "num_beams": 0}, "3 faults in generation_kwargs(.|\n)*num_beams = 0: a whole number >= 1"),
    ({"stop_strings": [""]}, r"stop_strings = \[''\]: a string or a list"), ("beams", "'beams': must be a mapping"),
    ({"stop_strings": ["\n"]}, "stop_strings: TRL on transformers' generate takes the padding behind .*; "
                               "backend='fast' with rollout_engine='fast' ends completions so"),
])
@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_generation_kwargs_that_cannot_be(name: str, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trl_config(job_of(name, tmp_path, trainer_options={"generation_kwargs": given}), CPU, eval_rows=0)


def test_ends_that_the_engine_of_fast_alone_takes(tmp_path: Path) -> None:
    def args_of(given: dict[str, Any], **options: Any) -> Any:
        job = job_of("grpo", tmp_path, trainer_options={"generation_kwargs": given}, **options)
        return trl_config(job, CPU, eval_rows=0)

    for name, end in (("stop_strings", "x"), ("eos_token_id", [7])):
        for engine in ("auto", "fast"):
            assert args_of({name: end}, backend="fast", rollout_engine=engine).generation_kwargs == {name: end}
        with pytest.raises(ConfigError, match=f"{name}: TRL on .*completion; rollout_engine='fast' ends completions"):
            args_of({name: end}, backend="fast", rollout_engine="hf")
        with pytest.raises(ConfigError, match=f"{name}: our engine alone .* has no num_beams, typical_p"):
            args_of({name: end, "typical_p": 0.5, "num_beams": 2}, backend="fast")
    assert args_of({"stop_strings": None}).generation_kwargs == {"stop_strings": None}
    assert args_of({"do_sample": False, "num_beams": 2, "suppress_tokens": [3]}).generation_kwargs["num_beams"] == 2
    # vLLM's names are its own, and those that are options here are so there too.
    assert args_of({"stop": ["x"], "seed": 1}, rollout_engine="vllm").generation_kwargs["stop"] == ["x"]
    with pytest.raises(ConfigError, match="max_tokens: give the option max_completion_length"):
        args_of({"max_tokens": 3}, rollout_engine="vllm")


def test_generation_kwargs_are_looked_at_before_a_model_is(tmp_path: Path) -> None:
    stops = {"generation_kwargs": {"stop_strings": "x"}}
    with pytest.raises(ConfigError, match="stop_strings: TRL on transformers' generate"):
        create_rl_trainer("no/model", [{"prompt": "a"}], algorithm="grpo", backend="trl", output_dir=str(tmp_path),
                          reward_functions=["exact_match"], trainer_options=stops)

"""Our options and the fields of TRL's config classes: a field and the option that makes it are not both given."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOTrainer, RLOOTrainer

from aligntune.algorithms import ALGORITHMS
from aligntune.backends.loading import Precision
from aligntune.backends.trl import options as table
from aligntune.backends.trl.options import CONFIGS, FIXED, MADE_OF, SAME_FIELD, trl_config
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.core.resolve import Job, option_table, resolve
from aligntune.core.rules import GENERATE_FIELDS
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


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_an_evaluation_batch_holds_whole_groups(name: str, tmp_path: Path) -> None:
    def args_of(group: int, eval_rows: int, batch: int = 4) -> Any:
        job = job_of(name, tmp_path, trainer_options={"num_generations_eval": group}, num_generations=4, batch_size=4,
                     eval_batch_size=batch)
        return trl_config(job, CPU, eval_rows=eval_rows)

    with pytest.raises(ConfigError, match="num_generations_eval"):
        args_of(3, 5)
    assert args_of(3, 6, 6).num_generations_eval == 3 and args_of(2, 5).num_generations_eval == 2
    if name != "ppo":  # which looks at it itself, whether anything evaluates or not
        assert args_of(3, 0).num_generations_eval == 3


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


def stops_of(given: Any = None, *, folder: Path, name: str = "grpo", stops: Any = "x", **options: Any) -> Any:
    """`generation_kwargs` as TRL gets them, made of those given and the option."""
    fields = {} if given is None else {"trainer_options": {"generation_kwargs": given}}
    job = job_of(name, folder, stop_strings=stops, **fields, **options)
    return trl_config(job, CPU, eval_rows=0).generation_kwargs


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "rloo", "ppo", "gspo"])
@pytest.mark.parametrize("stops", ["x", ["x", "\n"]])
def test_stop_strings_under_the_name_of_the_engine(name: str, stops: Any, tmp_path: Path) -> None:
    listed = ["x"] if stops == "x" else stops
    given: dict[str, Any] = {"folder": tmp_path, "name": name, "stops": stops}
    for engine in ("auto", "fast") if name != "gspo" else ():
        ours = given | {"backend": "fast", "rollout_engine": engine}
        assert stops_of(**ours) == {"stop_strings": listed}
        assert stops_of({"eos_token_id": 7}, **ours) == {"eos_token_id": 7, "stop_strings": listed}
    for backend in ("trl", "fast"):
        assert stops_of({"seed": 1}, rollout_engine="vllm", backend=backend, **given) == {"seed": 1, "stop": listed}
        by_field = job_of(name, tmp_path, stop_strings=stops, backend=backend, trainer_options={"use_vllm": True})
        assert trl_config(by_field, CPU, eval_rows=0).generation_kwargs == {"stop": listed}
    assert stops_of({"seed": 1}, rollout_engine="vllm", **given | {"stops": None}) == {"seed": 1}
    assert stops_of(**given | {"stops": None}) is None


@pytest.mark.parametrize(("backend", "engine"), [("trl", "hf"), ("trl", "auto"), ("fast", "hf")])
@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "gspo"])
def test_stop_strings_do_not_go_with_transformers_generate(
    name: str, backend: str, engine: str, tmp_path: Path) -> None:
    ours = "backend='fast' with rollout_engine='fast' or " if backend == "trl" else "rollout_engine='fast' or "
    told = (r"^rollout\.stop_strings: TRL on transformers' generate takes the padding behind .* completion; "
            f"{ours * (name != 'gspo')}rollout_engine='vllm' ends completions so$")
    with pytest.raises(ConfigError, match=told):
        stops_of(folder=tmp_path, name=name, backend=backend, rollout_engine=engine)


def test_stop_strings_beside_generation_kwargs(tmp_path: Path) -> None:
    fast = {"folder": tmp_path, "backend": "fast", "stops": ["x", "y"]}
    vllm = {"folder": tmp_path, "rollout_engine": "vllm", "stops": ["x", "y"]}
    both = r"rollout\.stop_strings = \['x', 'y'\] and train\.trainer_options\.generation_kwargs\.{} = .*: give one of"
    for other in ("x", ["x"], ["x", "y", "z"], ["x", "z"], [["x"]]):
        with pytest.raises(ConfigError, match=both.format("stop_strings")):
            stops_of({"stop_strings": other}, **fast)
        for name in ("stop", "stop_strings"):
            with pytest.raises(ConfigError, match=both.format(name)):
                stops_of({name: other}, **vllm)
    assert stops_of({"stop_strings": ["y", "x"]}, **fast) == {"stop_strings": ["x", "y"]}
    assert stops_of({"stop": ["y", "x"], "stop_strings": None}, **vllm) == {"stop": ["x", "y"]}
    with pytest.raises(ConfigError, match=r"^rollout\.stop_strings: our engine ends completions so, and it has no nu"):
        stops_of({"num_beams": 2}, **fast)
    with pytest.raises(ConfigError, match="3 faults in generation_kwargs"):
        stops_of({"stop_strings": "z", "num_beam": 2}, **fast | {"stops": ["z"]})
    with pytest.raises(ConfigError, match="stop_strings: give the option stop_strings, which is vLLM's stop"):
        stops_of({"stop_strings": "z"}, **vllm | {"stops": None})


@pytest.mark.parametrize(("name", "options"), [
    ("grpo", {"mask_truncated_completions": True}), ("rloo", {"mask_truncated_completions": True}),
    ("gspo", {"mask_truncated_completions": True}), ("ppo", {"missing_eos_penalty": 1.0}),
])
def test_what_trl_takes_for_cut_off_is_neither_masked_nor_penalised(
    name: str, options: dict[str, Any], tmp_path: Path) -> None:
    field = next(iter(options))
    way = "$" if name == "gspo" else ", or take backend='fast' with rollout_engine='fast', which counts it as ended"
    with pytest.raises(ConfigError, match=rf"rollout\.stop_strings with {field} = .*; leave {field} out{way}"):
        stops_of(folder=tmp_path, name=name, rollout_engine="vllm", **options)
    if name != "gspo":
        assert stops_of(folder=tmp_path, name=name, backend="fast", **options) == {"stop_strings": ["x"]}


@pytest.mark.parametrize("options", [
    {"trainer_options": {"generation_kwargs": {"stop_strings": "x"}}}, {"stop_strings": "x"}], ids=["field", "option"])
@pytest.mark.parametrize("engine", ["hf", "auto"])
def test_ends_of_completions_are_looked_at_before_a_model_is(
    options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stop_strings: TRL on transformers' generate"):
        create_rl_trainer("no/model", [{"prompt": "a"}], algorithm="grpo", backend="trl", output_dir=str(tmp_path),
                          reward_functions=["exact_match"], rollout_engine=engine, **options)


def test_fields_that_transformers_generate_alone_reads_are_trls() -> None:
    """The rule would take another default for a wish; and what the rest of a trainer reads is not idle."""
    for name in ("grpo", "rloo", "ppo"):
        fields = {item.name: item.default for item in dataclasses.fields(CONFIGS[name])}
        assert {field: fields[field] for field in GENERATE_FIELDS} == GENERATE_FIELDS
    for trainer in (GRPOTrainer, RLOOTrainer):
        source, own = inspect.getsource(trainer), inspect.getsource(trainer._generate_single_turn)
        assert own.count("ds3_gather_for_generation") == source.count("ds3_gather_for_generation") == 2
        read = {field: len(re.findall(rf"args\.{field}\b", source)) for field in GENERATE_FIELDS}
        assert read == {"cache_implementation": 1, "ds3_gather_for_generation": 2, "use_transformers_paged": 0,
                        "use_transformers_continuous_batching": 2, "transformers_continuous_batching_config": 1}

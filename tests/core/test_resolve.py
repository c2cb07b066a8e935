"""Layers, precedence and faults, over every option of every algorithm."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from types import NoneType, SimpleNamespace

import pytest
from omegaconf import OmegaConf

from aligntune.algorithms import ALGORITHMS
from aligntune.core.options import UNSET, OptionInfo
from aligntune.core.resolve import INSTEAD, OLD_NAMES, OLD_VALUES, option_table, read_config, resolve, takers
from aligntune.core.rules import DIVERGENCES, GENERATE_FIELDS, TRACKERS, VLLM_STOPS
from aligntune.errors import ConfigError

BASE = {"model_name": "m", "dataset_name": "d"}
REWARD = {"reward_functions": ["exact_match"]}
ALGORITHM_NAMES = ALGORITHMS.names()


def needs(algorithm: str) -> dict:
    return {**BASE, "algorithm": algorithm, **(REWARD if ALGORITHMS.load(algorithm).needs_reward else {})}


def two_values(row: OptionInfo) -> tuple:
    """Two valid values of the option, neither its default."""
    special = {
        "algorithm": None, "backend": ("trl", "fast"), "reward_functions": (["math"], ["format"]),
        "reward_function_weights": ([2.0], [3.0]), "num_generations": (4, 2), "batch_size": (16, 32),
        "steps_per_generation": (2, 4), "gradient_accumulation_steps": (2, 4), "max_completion_length": (11, 12),
        "max_seq_length": (5000, 6000), "loss_type": None, "warmup_steps": (3, 4), "eval_steps": (3, 4),
        "max_steps": (3, 4), "report_to": ("wandb", ["mlflow"]), "val_split_ratio": (0.1, 0.2),
        "trainer_options": ({"a": 1}, {"b": 2}), "delta": (1.5, 2.5),
    }
    if row.name in special and special[row.name]:
        return special[row.name]
    candidates: list = []
    if row.choices:
        candidates = [c for c in row.choices if c != row.default]
    kinds = row.kinds
    if bool in kinds:
        candidates += [True, False]
    if int in kinds:
        low = int(row.ge if row.ge is not None else (row.gt or 0) + 1)
        candidates += [low + 1, low + 2, low + 3]
    if float in kinds:
        high = row.lt if row.lt is not None else (row.le if row.le is not None else 1.0)
        candidates += [high * 0.25, high * 0.4, high * 0.3]
    if str in kinds and not row.choices:
        candidates += ["one", "two"]
    if list in kinds:
        candidates += [[1.0], [2.0]] if row.item is float else [["a"], ["b"]]
    if dict in kinds:
        candidates += [{"a": "b"}, {"c": "d"}]
    if NoneType in kinds and row.default is not None:
        candidates.append(None)
    found = [c for i, c in enumerate(candidates) if c != row.default and c not in candidates[:i]]
    if len(found) == 1:
        found.append(row.default)
    return found[0], found[1]


def around(name: str) -> dict:
    """What must stand beside an option for it to be valid."""
    if name.startswith("lora_") or name in ("modules_to_save", "use_dora", "use_rslora", "base_precision"):
        return {"use_peft": True}
    if name == "eval_steps":
        return {"val_split_ratio": 0.1}
    return {}


EVERY = [(algorithm, row) for algorithm in ALGORITHM_NAMES for row in option_table(algorithm).values()
         if row.name not in ("algorithm", "stop_metric", "stop_value")]


@pytest.mark.parametrize(("algorithm", "row"), EVERY, ids=[f"{a}-{r.name}" for a, r in EVERY])
def test_explicit_beats_config_beats_algorithm_default_beats_default(algorithm: str, row: OptionInfo) -> None:
    spec = ALGORITHMS.load(algorithm)
    base = {key: value for key, value in needs(algorithm).items() if key != row.name} | around(row.name)
    required = {key: value for key, value in needs(algorithm).items() if key == row.name}
    first, second = two_values(row)
    assert first != second
    plain = resolve({**base, **required}).options
    default = spec.defaults.get(row.name, row.default)
    if not required and not around(row.name):
        assert getattr(plain, row.name) == default
    nested = {row.section: {row.name: first}} if row.section else {row.name: first}
    if row.name == "backend":
        assert resolve({**base, "backend": second}, nested).options.backend == second
        return
    for config in (nested, {row.name: first}, {row.path: first}):
        job = resolve(base, config)
        assert getattr(job.options, row.name) == first
        assert job.origin[row.name] == "config"
    job = resolve({**base, row.name: second}, nested)
    assert getattr(job.options, row.name) == second
    assert job.origin[row.name] == "argument"
    written = OmegaConf.to_container(OmegaConf.select(job.config, row.section) if row.section else job.config)
    assert written[row.name] == second
    if row.default is not None or row.name not in ("model_name", "dataset_name"):
        if row.name in ("reward_functions", "model_name", "dataset_name"):
            return
        # The default value, said out loud, beats another value in the YAML.
        stated = resolve({**base, row.name: default}, nested)
        assert getattr(stated.options, row.name) == default
        assert stated.origin[row.name] == "argument"


@pytest.mark.parametrize(("name", "first", "second"), [("stop_metric", "loss", "reward"), ("stop_value", 0.5, 0.6)])
def test_precedence_of_the_two_that_need_each_other(name: str, first: object, second: object) -> None:
    config = {"evaluation": {"val_split_ratio": 0.1, "eval_steps": 2, "stop_metric": "loss", "stop_value": 0.5}}
    base = {**BASE, "algorithm": "sft"}
    assert getattr(resolve(base).options, name) is None
    assert getattr(resolve(base, config).options, name) == first
    assert getattr(resolve({**base, name: second}, config).options, name) == second


def test_unset_counts_as_not_given() -> None:
    job = resolve({**BASE, "algorithm": "sft", "batch_size": UNSET}, {"batch_size": 3})
    assert job.options.batch_size == 3


def test_every_fault_is_told_at_once_with_its_path_and_the_nearest_name() -> None:
    config = {"data": {"max_seq_lenght": 3, "learning_rate": 2.0}, "trainn": {"x": 1}, "lora": 7,
              "train": {"max_steps": True}}
    explicit = {"model_name": "m", "lerning_rate": 3, "algorithm": "grpo", "model.strct": True, "batch_size": "8",
                "beta": math.nan, "temperature": 0}
    with pytest.raises(ConfigError) as caught:
        resolve(explicit, config)
    text = str(caught.value)
    for expected in (
        "data.max_seq_lenght: unknown option; did you mean 'data.max_seq_length'?",
        "data.learning_rate: belongs to section train: train.learning_rate",
        "trainn: unknown section; did you mean 'train'?",
        "lora = 7: a section is a mapping",
        "lerning_rate: unknown option; did you mean 'train.learning_rate'?",
        "model.strct: unknown option; did you mean 'model.strict'?",
        "train.batch_size = '8': must be an integer >= 1 (write 8 without quotes)",
        "loss.beta = nan: must be a number >= 0",
        "rollout.temperature = 0.0: must be a number > 0",
        "train.max_steps = True: must be an integer >= -1",
    ):
        assert expected in text
    assert len(caught.value.faults) == 10


@pytest.mark.parametrize("algorithm", ["grpo", "gropo"])
def test_names_of_every_kind_are_told_at_once(algorithm: str) -> None:
    explicit = {"algorithm": algorithm, "backend": "fsat", "lerning_rate": 1,
                "reward_functions": ["exact_mach", {"name": "maath"}, "rewards.py:mine", len]}
    with pytest.raises(ConfigError) as caught:
        resolve(explicit, {"trainn": {"x": 1}, "data": {"max_seq_lenght": 3}})
    text = str(caught.value)
    for expected in ("backend: unknown backend 'fsat'; did you mean 'fast'?",
                     "rewards.reward_functions: unknown reward 'exact_mach'; did you mean 'exact_match'?",
                     "rewards.reward_functions: unknown reward 'maath'; did you mean 'math'?",
                     "lerning_rate: unknown option; did you mean 'train.learning_rate'?",
                     "trainn: unknown section; did you mean 'train'?", "data.max_seq_lenght: unknown option"):
        assert expected in text
    assert len(caught.value.faults) == (6 if algorithm == "grpo" else 7)
    assert ("'gropo'" in text) == (algorithm != "grpo")


@pytest.mark.parametrize(("name", "value"), [
    ("use_peft", 1), ("use_peft", "true"), ("max_steps", 2.5), ("max_steps", "8"), ("learning_rate", "1e-4"),
    ("learning_rate", math.inf), ("learning_rate", -1e-4), ("precision", "bf-16"), ("lora_dropout", 1.0),
    ("column_mapping", ["a"]), ("batch_size", 0), ("seed", -1), ("modules_to_save", [3]), ("packing", "yes"),
])
def test_a_wrong_type_or_range_names_option_value_and_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**BASE, "algorithm": "sft", name: value})
    assert name in str(caught.value)
    assert "must be" in str(caught.value)


def test_an_option_of_another_algorithm_says_so() -> None:
    with pytest.raises(ConfigError, match=r"num_generations: sft does not take this option; .*grpo, gspo, dapo"):
        resolve({**BASE, "algorithm": "sft", "num_generations": 4})
    with pytest.raises(ConfigError, match=r"packing: dpo does not take this option; sft do"):
        resolve({**BASE, "algorithm": "dpo", "packing": True})


def test_algorithm_names() -> None:
    assert resolve({**needs("dr_grpo"), "algorithm": "DrGRPO"}).spec.name == "dr_grpo"
    assert resolve({**needs("dr_grpo"), "algorithm": "dr-grpo"}).spec.name == "dr_grpo"
    with pytest.raises(ConfigError, match=r"unknown algorithm 'grpoo'; did you mean 'grpo'\?"):
        resolve({**BASE, "algorithm": "grpoo"})
    with pytest.raises(ConfigError, match="create_sft_trainer makes sft"):
        resolve({**BASE}, {"algorithm": "dpo"}, algorithms=("sft",), what="create_sft_trainer")
    with pytest.raises(ConfigError, match="none given"):
        resolve(BASE)


def test_backend_unsloth_is_named_fast() -> None:
    with pytest.raises(ConfigError, match="backend='fast'"):
        resolve({**BASE, "algorithm": "sft", "backend": "unsloth"})
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        resolve({**BASE, "algorithm": "sft", "backend": "fsat"})


@pytest.mark.parametrize("old", sorted(OLD_NAMES))
def test_names_of_old_scripts_are_known_and_said(old: str) -> None:
    new = OLD_NAMES[old]
    algorithm = "dpo" if new == "ref_model_name" else ("grpo" if new.startswith("reward") else "sft")
    row = option_table(algorithm)[new]
    value = True if old == "load_in_4bit" else two_values(row)[0]
    base = {key: item for key, item in needs(algorithm).items() if key != new} | around(new)
    job = resolve({**base, old: value})
    assert getattr(job.options, new) == ("nf4" if old == "load_in_4bit" else value)
    assert any(old in notice and new in notice for notice in job.notices)


@pytest.mark.parametrize(("name", "old"), [(name, old) for name, values in OLD_VALUES.items() for old in values])
def test_values_of_old_scripts_are_known_and_said(name: str, old: str) -> None:
    job = resolve({**BASE, "algorithm": "sft", "backend": "fast", name: old})
    assert getattr(job.options, name) == OLD_VALUES[name][old]
    assert any(repr(old) in notice and repr(OLD_VALUES[name][old]) in notice for notice in job.notices)


def test_names_that_are_said_in_another_way_name_it() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**BASE, "algorithm": "sft", "bf16": True, "train.use_cpu": True, "load_best_model_at_end": True})
    assert caught.value.faults == (
        "bf16: unknown option; here it is precision='bf16'",
        "train.use_cpu: unknown option; here it is device='cpu'",
        "load_best_model_at_end: unknown option; here it is trainer_options={'load_best_model_at_end': ...}",
    )
    fields = {field.name for field in dataclasses.fields(pytest.importorskip("trl").SFTConfig)}
    options = option_table(None)
    for old, said in INSTEAD.items():
        assert old not in options and old not in OLD_NAMES
        named = re.match(r"trainer_options=\{'(\w+)'", said)
        assert named[1] in fields if named else said.startswith(("`", "one")) or re.match(r"\w+", said)[0] in options


@pytest.mark.parametrize("value", ["loftq", "LoftQ"])
def test_values_that_are_not_here_name_what_is(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora_init = '{value}': .*'pissa' .*replace_lora_weights_loftq\(model\)"):
        resolve({**BASE, "algorithm": "sft", "use_peft": True, "lora_init": value})


def test_an_option_given_twice_by_two_names_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        resolve({**BASE, "algorithm": "sft", "max_seq_length": 5, "max_length": 6})


@pytest.mark.parametrize(("given", "expected"), [
    ({}, (8, 8, 1)),
    ({"batch_size": 16}, (16, 8, 1)),
    ({"batch_size": 4}, (4, 4, 1)),
    ({"batch_size": 6}, (6, 6, 1)),
    ({"batch_size": 9}, (9, 3, 1)),
    ({"batch_size": 1}, (1, 8, 8)),
    ({"batch_size": 11}, (11, 8, 8)),
    ({"batch_size": 1, "gradient_accumulation_steps": 4}, (1, 4, 4)),
    ({"num_generations": 5}, (5, 5, 1)),
    ({"num_generations": 4, "batch_size": 12}, (12, 4, 1)),
])
def test_online_batches_hold_whole_groups(given: dict, expected: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    job = resolve({**needs("grpo"), **given})
    options = job.options
    assert (options.batch_size, options.num_generations, options.gradient_accumulation_steps) == expected
    changed = expected[:2] != (given.get("batch_size", 8), given.get("num_generations", 8)) or expected[2] != given.get(
        "gradient_accumulation_steps", 1)
    assert bool(job.notices) == changed


def test_processes_count_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = resolve({**needs("grpo"), "batch_size": 2}).options
    assert (options.batch_size, options.num_generations) == (2, 8)


def test_two_explicit_incompatible_values_name_the_nearest_pairs() -> None:
    with pytest.raises(ConfigError, match=r"nearest: batch_size 6 with num_generations 3 or batch_size 4 with"):
        resolve({**needs("grpo"), "batch_size": 6, "num_generations": 4})


def test_four_bit_turns_lora_on_and_says_so_but_never_against_the_user() -> None:
    job = resolve({**BASE, "algorithm": "sft", "quantization": "nf4"})
    assert job.options.use_peft is True
    assert any("LoRA is turned on" in notice for notice in job.notices)
    with pytest.raises(ConfigError, match="use_peft = False with quantization"):
        resolve({**BASE, "algorithm": "sft", "quantization": "nf4", "use_peft": False})


def test_lora_options_without_lora_are_a_fault() -> None:
    with pytest.raises(ConfigError, match="pass use_peft=True"):
        resolve({**BASE, "algorithm": "sft", "lora_r": 4})
    for given, names in (({"lora_r": 4}, "lora_r is"), ({"lora_r": 4, "lora_alpha": 8}, "lora_r, lora_alpha are")):
        told = resolve({**BASE, "algorithm": "sft", "use_peft": False, **given}).notices
        assert told == [f"use_peft is false: {names} not used"]


def test_embeddings_among_the_targets_become_modules_to_save() -> None:
    job = resolve({**BASE, "algorithm": "sft", "use_peft": True,
                   "lora_target_modules": ["q_proj", "embed_tokens", "lm_head"]})
    assert job.options.lora_target_modules == ["q_proj"]
    assert job.options.modules_to_save == ["embed_tokens", "lm_head"]
    assert job.config.lora.modules_to_save == ["embed_tokens", "lm_head"]
    assert any("trained whole" in notice for notice in job.notices)


@pytest.mark.parametrize(("options", "message"), [
    ({"eval_steps": 5}, "no evaluation data"),
    ({"stop_value": 5.0}, "give both or neither"),
    ({"stop_value": 5.0, "stop_metric": "loss"}, "give eval_steps"),
    ({"val_split_ratio": 0.1, "eval_split": "test"}, "one source of evaluation data"),
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, "one of the two"),
    ({"resume": True, "overwrite": True}, "resume and overwrite: give one of the two"),
    ({"resume": "runs/a/checkpoint-3", "overwrite": True}, "resume and overwrite: give one of the two"),
    *(({"lr_scheduler": "warmup_stable_decay", "trainer_options": given}, "wants num_decay_steps.*trainer_options="
       "{'lr_scheduler_kwargs': {'num_decay_steps': 100}}") for given in ({}, {"lr_scheduler_kwargs": {"min_lr": 0}})),
    *(({"lr_scheduler": "cosine_with_min_lr", "trainer_options": given}, "wants min_lr_rate or min_lr, and one of them")
      for given in ({}, {"lr_scheduler_kwargs": {"min_lr_rate": 0.1, "min_lr": 1e-6}})),
    ({"model_name": ""}, "model_name: none given"),
    ({"max_steps": 0}, "^train.max_steps = 0: must be an integer >= 1, or -1, which leaves it to num_epochs$"),
    ({"trainer_options": {"max_steps": 0}}, "^train.trainer_options.max_steps = 0: must be an integer >= 1, or -1"),
    ({"completion_only": False, "assistant_turns": "last"},
     "data.completion_only = False and data.assistant_turns = 'last': .* leave one of the two out"),
])
def test_contradictions(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({**BASE, "algorithm": "sft", **options})


def test_the_words_on_warmup_steps_are_true_of_both() -> None:
    told = option_table("sft")["warmup_steps"].help
    assert "in the place of warmup_ratio" in told and "wins" not in told  # both are an error, as above


def test_schedules_with_their_numbers_are_left_alone() -> None:
    for schedule, numbers in (("warmup_stable_decay", {"num_decay_steps": 2}), ("cosine_with_min_lr", {"min_lr": 0.0}),
                              ("cosine_with_min_lr", '{"min_lr_rate": 0.1}'), ("cosine", None)):
        resolve({**BASE, "algorithm": "sft", "lr_scheduler": schedule,
                 "trainer_options": {"lr_scheduler_kwargs": numbers}})


def test_a_run_is_resumed_from_its_own_config_whatever_that_overwrote() -> None:
    assert resolve({**BASE, "algorithm": "sft", "resume": True}, {"overwrite": True}).options.resume is True
    for config in ({"resume": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(ConfigError, match="resume and overwrite"):
            resolve({**BASE, "algorithm": "sft", "overwrite": True}, config)


_SYNC = {"sync_ref_model": True}


@pytest.mark.parametrize(("algorithm", "options", "message"), [
    *((name, {**_SYNC, "use_peft": True}, "loss.sync_ref_model = True with LoRA") for name in (
        "grpo", "rloo", "gspo", "dapo", "dr_grpo")),
    ("grpo", {**_SYNC, "quantization": "nf4"}, "loss.sync_ref_model = True with LoRA.*use_peft=False"),
    ("dpo", {"trainer_options": _SYNC, "use_peft": True}, "train.trainer_options.sync_ref_model = True with LoRA"),
    ("kto", {"trainer_options": _SYNC, "model_name": SimpleNamespace(peft_config={})}, "sync_ref_model = True with"),
    ("dpo", {"loss_type": []}, r"loss.loss_type = \[\]: at least one form"),
    ("dpo", {"trainer_options": {"loss_type": []}}, r"train.trainer_options.loss_type = \[\]"),
    ("dpo", {"loss_weights": [1, 2]}, "^loss.loss_weights: 2 weights for 1 form of loss_type$"),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, "^loss.loss_weights: 1 weights for 2 forms of"),
    ("dpo", {"loss_weights": [], "loss_type": "hinge"}, "^loss.loss_weights: 0 weights for 1 form"),
    ("dpo", {"loss_type": ["sft"], "trainer_options": {"loss_weights": [1.0, 2.0]}},
     "^train.trainer_options.loss_weights: 2 weights for 1 form"),
    ("dpo", {"loss_weights": [1.0], "trainer_options": {"loss_type": ["sft", "ipo"]}}, "^loss.loss_weights: 1 weights"),
    ("ipo", {"trainer_options": {"loss_weights": [1.0, 2.0]}}, "2 weights for 1 form"),
    ("dpo", {"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "loss.use_weighting = True with .*'aot'"),
    ("dpo", {"trainer_options": {"f_divergence_type": "reverse"}}, "'reverse_kl', .*did you mean 'reverse_kl'"),
    ("ipo", {"trainer_options": {"f_divergence_type": "js-divergence"}}, "did you mean 'js_divergence'"),
    ("dpo", {"trainer_options": {"f_divergence_type": 3}}, "f_divergence_type = 3: must be one of"),
    ("grpo", {"trainer_options": {"loss_type": "bnppo"}}, "trainer_options.loss_type = 'bnppo'.*did you mean 'bnpo'"),
    ("dapo", {"trainer_options": {"importance_sampling_level": "sequence_token"}}, "'sequence_token': must be one of"),
    ("dr_grpo", {"trainer_options": {"scale_rewards": "groups"}}, "scale_rewards = 'groups'.*did you mean 'group'"),
    ("grpo", {"trainer_options": {"multi_objective_aggregation": "normalise_then_sum"}}, "mean 'normalize_then_sum'"),
    ("sft", {"trainer_options": SimpleNamespace()}, "train.trainer_options: a mapping is wanted, not a SimpleN"),
    *((name, {"rollout_engine": "vllm", "trainer_options": {"vllm_mode": "servr"}}, "vllm_mode = 'servr': must be one "
       "of 'colocate', 'server'; did you mean 'server'") for name in ("grpo", "rloo", "ppo")),
    ("grpo", {"trainer_options": {"use_vllm": True, "vllm_importance_sampling_mode": "token"}},
     "'token': must be one of 'token_truncate',"),
    ("grpo", {"trainer_options": {"vllm_mode": "server", "vllm_server_port": 1}}, "trainer_options.vllm_mode is given "
     "and rollout.rollout_engine is not: pass rollout_engine='vllm'"),
])
def test_what_trl_tells_later_or_never(algorithm: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({**needs(algorithm), "algorithm": algorithm, **options})


def test_what_trl_takes_is_left_alone() -> None:
    for algorithm, options in (
        ("grpo", {**_SYNC, "use_peft": False}), ("dpo", {"trainer_options": _SYNC}), ("grpo", {"use_peft": True}),
        ("sft", {"max_steps": -1}), ("sft", {"max_steps": 1}), ("sft", {"trainer_options": {"max_steps": 1}}),
        ("sft", {"completion_only": False, "assistant_turns": "split"}), ("sft", {"assistant_turns": "last"}),
        ("sft", {"completion_only": True, "assistant_turns": "last"}), ("sft", {"completion_only": False}),
        ("dpo", {"loss_weights": [2.0]}), ("dpo", {"loss_type": ["sft", "ipo"], "loss_weights": [1, 2]}),
        ("dpo", {"trainer_options": {"loss_type": ["sft", "ipo"], "loss_weights": [1.0, 2.0]}}),
        ("dpo", {"loss_type": ["aot"]}), ("dpo", {"loss_type": ["sft"], "use_weighting": True}),
        *(("dpo", {"trainer_options": {"f_divergence_type": kind}}) for kind in DIVERGENCES),
        ("grpo", {"rollout_engine": "vllm", "trainer_options": {"vllm_mode": "server", "vllm_server_port": 1}}),
        ("rloo", {"trainer_options": {"use_vllm": True, "vllm_mode": "colocate"}}),
        ("grpo", {"trainer_options": {"loss_type": "bnpo", "scale_rewards": False}}),
        ("grpo", {"trainer_options": {"multi_objective_aggregation": "normalize_then_sum"}}),
    ):
        assert not resolve({**needs(algorithm), "algorithm": algorithm, **options}).notices
    told = resolve({**needs("grpo"), "rollout_engine": "hf", "trainer_options": {"vllm_mode": "server"}}).notices
    assert told == ["rollout_engine is 'hf': nothing reads vllm_mode of trainer_options"]
    for engine in ("hf", "vllm", "fast", "auto"):
        told = resolve({**needs("grpo"), "rollout_engine": engine, "rollout_memory_gib": 1.0}).notices
        idle = [f"rollout_engine is {engine!r}: nothing reads rollout_memory_gib"]
        assert told == (idle if engine in ("hf", "vllm") else [])


@pytest.mark.parametrize(("given", "told"), [
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"use_transformers_continuous_batching": True, "ds3_gather_for_generation": False, "optim": "sgd"},
     "ds3_gather_for_generation, use_transformers_continuous_batching"),
    (dict(GENERATE_FIELDS), None), ({"cache_implementation": None}, None),
], ids=str)
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_fields_that_transformers_generate_alone_reads(algorithm: str, given: dict, told: str | None) -> None:
    for engine in ("fast", "vllm", "hf", "auto"):
        found = resolve({**needs(algorithm), "rollout_engine": engine, "trainer_options": given}).notices
        idle = told is not None and engine in ("fast", "vllm")
        assert found == [f"rollout_engine is {engine!r}: nothing reads {told} of trainer_options"] * idle
    found = resolve({**needs(algorithm), "trainer_options": given | {"use_vllm": True}}).notices
    assert found == [f"rollout_engine is 'vllm': nothing reads {told} of trainer_options"] * (told is not None)


@pytest.mark.parametrize("value", ["", [], [""], ["a", ""], ["a", 3], [["a"]], 3, True, {"a": "b"}], ids=repr)
def test_stop_strings_that_cannot_be(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**needs("grpo"), "stop_strings": value, "temperature": 0}, {"rollout": {"top_p": 2}})
    must = "must be a non-empty string or a non-empty list of non-empty strings or null"
    assert f"rollout.stop_strings = {value!r}: {must}" in caught.value.faults
    assert len(caught.value.faults) == 3, "all at once"


def test_stop_strings() -> None:
    takes = ["rloo", "grpo", "gspo", "dapo", "dr_grpo", "ppo"]
    assert takers("stop_strings") == takes
    for algorithm in takes:
        config = {"rollout": {"stop_strings": ["a", "\n"]}}
        job = resolve(needs(algorithm), config)
        assert job.options.stop_strings == ["a", "\n"] == OmegaConf.to_container(job.config)["rollout"]["stop_strings"]
        assert resolve({**needs(algorithm), "stop_strings": ("b", "c")}, config).options.stop_strings == ["b", "c"]
        assert resolve({**needs(algorithm), "stop_strings": None}, config).options.stop_strings is None
        for engine in ("vllm", "fast", "auto"):
            told = resolve({**needs(algorithm), "rollout_engine": engine, "stop_strings": "b"}).notices
            assert told == [VLLM_STOPS] * (engine == "vllm")
    with pytest.raises(ConfigError, match="stop_sequences: unknown option; here it is stop_strings"):
        resolve({**needs("grpo"), "stop_sequences": ["a"]})


@pytest.mark.parametrize(("algorithm", "options", "told"), [
    ("dpo", {}, "loss_type is 'sigmoid': label_smoothing is not used (it is by 'robust', 'exo_pair', 'aot', "),
    ("dpo", {"loss_type": ["hinge", "sft"]}, "loss_type is 'hinge', 'sft': label_smoothing is not used"),
    ("cpo", {"loss_type": "ipo"}, "loss_type is 'ipo': label_smoothing is not used (it is by 'sigmoid')"),
    ("dpo", {"loss_type": ["sigmoid", "robust"]}, None), ("cpo", {}, None),
])
def test_smoothing_that_the_loss_does_not_read_is_said(algorithm: str, options: dict, told: str | None) -> None:
    for given in ({"label_smoothing": 0.1}, {"trainer_options": {"label_smoothing": 0.1}}):
        notices = resolve({**needs(algorithm), **given, **options}).notices
        assert len(notices) == (told is not None) and all(notice.startswith(told or "") for notice in notices)
    assert not resolve({**needs(algorithm), "label_smoothing": 0.0, **options}).notices


@pytest.mark.parametrize(("algorithm", "options", "told", "reader"), [
    ("ppo", {"kl_goal": 3.0, "kl_gain": 0.2}, "kl_control is 'fixed': nothing reads kl_goal and kl_gain",
     {"kl_control": "adaptive"}),
    ("ppo", {"kl_goal": 3.0}, "kl_control is 'fixed': nothing reads kl_goal", {"kl_control": "adaptive"}),
    ("dapo", {"max_resample_rounds": 3, "dynamic_sampling": False},
     "dynamic_sampling is False: nothing reads max_resample_rounds", {"dynamic_sampling": True}),
    ("sft", {"max_eval_samples": 3, "eval_batch_size": 2},
     "no evaluation data: nothing reads max_eval_samples and eval_batch_size", {"eval_split": "test"}),
    ("grpo", {"eval_batch_size": 2}, "no evaluation data: nothing reads eval_batch_size", {"eval_dataset_name": "e"}),
    ("sft", {"max_steps": 4, "num_epochs": 2}, "max_steps is 4: num_epochs is not used", {"max_steps": -1}),
    ("dpo", {"trainer_options": {"max_steps": 4}, "num_epochs": 2}, "max_steps is 4: num_epochs is not used",
     {"trainer_options": {}}),
    ("sft", {"max_steps": 4, "trainer_options": {"num_train_epochs": 2}}, "max_steps is 4: num_train_epochs is not "
     "used", {"max_steps": -1}),
    ("sft", {"dataset_name": "builtin:arithmetic", "dataset_config": "main"},
     "no dataset of the hub: nothing reads dataset_config", {"eval_dataset_name": "an/id"}),
    ("grpo", {"dataset_name": __file__, "eval_dataset_name": "builtin:arithmetic", "dataset_config": "main"},
     "no dataset of the hub: nothing reads dataset_config", {"dataset_name": "an/id"}),
    ("sft", {"model_name": "builtin:tiny", "model_revision": "v2"},
     "model_name is 'builtin:tiny': nothing reads model_revision", {"model_name": "an/id"}),
    ("sft", {"model_name": os.curdir, "model_revision": "v2"}, "model_name is '.': nothing reads model_revision",
     {"model_name": "an/id"}),
])
def test_options_that_nothing_reads_are_said(algorithm: str, options: dict, told: str, reader: dict) -> None:
    job = resolve({**needs(algorithm), **options})
    assert job.notices == [told]
    assert not resolve({**needs(algorithm), **options, **reader}).notices
    assert told in resolve({}, OmegaConf.to_container(job.config)).notices
    switched = {name: value for name, value in options.items() if isinstance(value, bool)}
    plain = resolve({**needs(algorithm), **switched})  # the others at their defaults, in the run's own config too
    assert "nothing reads" not in "".join(resolve({}, OmegaConf.to_container(plain.config)).notices)


def test_passes_over_the_data_that_somebody_wants_beside_steps() -> None:
    def told(explicit: dict, **config: object) -> list[str]:
        return resolve({**BASE, "algorithm": "sft", **explicit}, {"train": config}).notices

    notice = ["max_steps is 4: num_epochs is not used"]
    assert told({"num_epochs": 1}, max_steps=4) == notice == told({"max_steps": 4}, num_epochs=3)
    assert told({}, max_steps=4, num_epochs=1.0) == told({"max_steps": 4}) == []
    assert told({"num_epochs": 3}, max_steps=-1) == []


def test_rows_in_memory_have_no_configuration() -> None:
    notices = resolve({"model_name": "m", "dataset_name": [{"text": "a"}], "algorithm": "sft",
                       "dataset_config": "main"}).notices
    assert notices == ["no dataset of the hub: nothing reads dataset_config"]


@pytest.mark.parametrize(("wanted", "told"), [
    ("tensorbord", "report_to = 'tensorbord': must be one of 'tensorboard', 'wandb', .*; did you mean 'tensorboard'?"),
    (["wandb", "mlflw"], "report_to = 'mlflw': must be one of .*; did you mean 'mlflow'?"),
    ("none,tensorboard", "report_to = 'none,tensorboard': 'none' stands alone; leave it out, or the others"),
    (["tensorboard", "none"], r"report_to = \['tensorboard', 'none'\]: 'none' stands alone"),
    (["all", "wandb"], r"report_to = \['all', 'wandb'\]: 'all' stands alone"),
    ("wandb, tensorboard", r"report_to = 'wandb, tensorboard': several trackers are a list: \[wandb, tensorboard\]"),
])
def test_trackers_that_are_none(wanted: object, told: str) -> None:
    for given, path in (({"report_to": wanted}, "logging"),
                        ({"trainer_options": {"report_to": wanted}}, "train.trainer_options")):
        with pytest.raises(ConfigError, match=rf"^2 faults(?s:.*) {path}.{told}"):
            resolve({**BASE, "algorithm": "sft", "lerning_rate": 1, **given})


def test_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) >= set(INTEGRATION_TO_CALLBACK) >= {"tensorboard", "wandb"}
    for wanted in (*TRACKERS, "none", "all", [], ["none"], ["all"], list(TRACKERS)):
        assert resolve({**BASE, "algorithm": "sft", "report_to": wanted}).options.report_to == wanted


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "Infinity", "1e999"])
def test_what_is_not_finite_is_no_better_without_quotes(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.learning_rate = '{text}': must be a number >= 0$"):
        resolve({**BASE, "algorithm": "sft", "learning_rate": text})


def test_lengths_of_online_methods() -> None:
    assert resolve({**needs("grpo"), "max_seq_length": 100}).options.max_completion_length == 50
    assert resolve({**needs("grpo"), "max_completion_length": 2000}).options.max_seq_length == 3024
    with pytest.raises(ConfigError, match="must be below"):
        resolve({**needs("grpo"), "max_completion_length": 200, "max_seq_length": 200})


def test_rewards_are_required_and_weights_counted() -> None:
    with pytest.raises(ConfigError, match="grpo needs reward_functions or reward_model_name"):
        resolve({**BASE, "algorithm": "grpo"})
    with pytest.raises(ConfigError, match="2 weights for 1 rewards"):
        resolve({**needs("grpo"), "reward_function_weights": [1.0, 2.0]})
    assert resolve({**needs("grpo"), "reward_model_name": "rm", "reward_function_weights": [1, 2]})


def test_objects_are_kept_and_shown_by_label() -> None:
    def my_reward(prompts: list, completions: list, **columns: object) -> list:
        return [0.0] * len(prompts)

    rows = [{"prompt": "a"}]
    job = resolve({"model_name": "m", "dataset_name": rows, "algorithm": "grpo", "reward_functions": my_reward})
    assert job.options.dataset_name is rows
    assert job.options.reward_functions == [my_reward]
    assert job.config.data.dataset_name == "<object: 1 rows>"
    assert job.config.rewards.reward_functions == ["<object: my_reward>"]
    assert set(job.objects) == {"dataset_name", "reward_functions"}


def test_an_object_where_none_is_taken_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        resolve({**BASE, "algorithm": "sft", "learning_rate": object()})


def test_yaml_interpolates_and_arguments_are_literal(tmp_path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("algorithm: sft\nmodel: {model_name: m}\ntrain: {learning_rate: 1e-4}\n"
                    "data: {dataset_name: d, system_prompt: 'use ${model.model_name}'}\n")
    job = resolve({}, path)
    assert job.options.system_prompt == "use m"
    assert job.options.learning_rate == 1e-4
    literal = resolve({"system_prompt": "${model.model_name}"}, path)
    assert literal.options.system_prompt == "${model.model_name}"
    again = tmp_path / "again.yaml"
    again.write_text(OmegaConf.to_yaml(literal.config))
    assert resolve({}, again).options.system_prompt == "${model.model_name}"


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n- b\n", "a mapping of options is wanted"), ("a: [1, 2\n", "job.yaml"), ("x: ${nope}\n", "nope"),
])
def test_a_broken_yaml_file_is_named(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_a_missing_file_and_a_recipe_with_stages(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="has stages"):
        resolve({}, {"stages": []})


def test_the_resolved_yaml_resolves_to_itself(tmp_path) -> None:
    for algorithm in ALGORITHM_NAMES:
        job = resolve({**needs(algorithm), "max_samples": 3})
        path = tmp_path / f"{algorithm}.yaml"
        path.write_text(OmegaConf.to_yaml(job.config))
        again = resolve({}, path)
        assert vars(again.options) == vars(job.options)


def test_set_reaches_options_and_tree() -> None:
    job = resolve({**BASE, "algorithm": "sft"})
    assert job.config.lora.use_peft is False
    job.set("use_peft", True)
    assert job.options.use_peft is True
    assert job.config.lora.use_peft is True
    with pytest.raises(Exception, match="read-only"):
        job.config.lora.use_peft = False


def test_the_config_of_a_run_with_warmup_steps_can_be_run_again() -> None:
    job = resolve({**BASE, "algorithm": "sft", "warmup_steps": 7})
    again = resolve({}, OmegaConf.to_container(job.config))
    assert (again.options.warmup_steps, again.options.warmup_ratio) == (7, 0.0)

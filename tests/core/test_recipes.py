"""Recipes: found, read, merged, and every fault of every stage told before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import aligntune
from aligntune.core.recipes import load_plan, over, packaged, read_recipe, recipe_path
from aligntune.core.resolve import takers
from aligntune.errors import ConfigError
from tests.small_jobs import write

SFT = {"algorithm": "sft", "data": {"dataset_name": "rows"}}
GRPO = {"algorithm": "grpo", "model": {"model_name": "previous"}, "data": {"dataset_name": "prompts"},
        "rewards": {"reward_functions": ["exact_match"]}}


def staged(*stages: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"defaults": {"model": {"model_name": "m"}}, "stages": list(stages or (SFT, GRPO)), **top}


def faults(recipe: Any, overrides: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_plan(recipe, overrides)
    return caught.value.faults


# Finding

@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_packaged_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = read_recipe(name)
    plan = load_plan(recipe)
    assert recipe.summary
    assert recipe.algorithms == tuple(stage.job.spec.name for stage in plan.stages)
    assert not recipe.summary.startswith("#")


def test_each_algorithm_of_the_trl_backend_has_a_packaged_recipe() -> None:
    names = {name for recipe in aligntune.list_recipes() for name in recipe.algorithms}
    assert names >= {"sft", "dpo", "grpo", "gspo", "dapo", "dr_grpo"}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'sft-bultin'; did you mean 'sft-builtin'"):
        recipe_path("sft-bultin")
    with pytest.raises(ConfigError, match="did you mean 'grpo-builtin'"):
        read_recipe("grpo_builtin")


def test_a_missing_file_names_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", SFT)
    with pytest.raises(ConfigError, match=r"no file .*mien\.yaml.*; did you mean .*mine\.yaml"):
        read_recipe(tmp_path / "mien.yaml")
    with pytest.raises(ConfigError, match="no file .*no/where/x.yaml"):
        read_recipe("no/where/x.yaml")


def test_a_folder_is_not_a_recipe_and_a_run_folder_says_where_its_config_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; a YAML file is wanted"):
        read_recipe(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"is a folder; its configuration is .*config\.yaml"):
        read_recipe(str(tmp_path))


def test_a_packaged_name_wins_over_a_file_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft-builtin").write_text("algorithm: dpo\n")
    Path("own").write_text("# Mine.\nalgorithm: dpo\n")
    assert read_recipe("sft-builtin").algorithms == ("sft",)
    assert read_recipe(f".{os.sep}sft-builtin").algorithms == ("dpo",)
    assert (read_recipe("own").name, read_recipe("own").summary) == ("own", "Mine.")


@pytest.mark.parametrize(("text", "what"), [
    ("algorithm: [sft\n", "x.yaml"), ("- sft\n", "a mapping of options is wanted"), ("a: 1\na: 2\n", "duplicate key"),
    ("a: ${nope}\n", "nope"),
])
def test_broken_yaml_is_a_config_error_that_names_the_file(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        load_plan(tmp_path / "x.yaml")


# Merging

def test_the_upper_layer_wins_whichever_way_either_writes_an_option() -> None:
    below = {"train": {"batch_size": 1, "max_steps": 2}, "learning_rate": 3.0, "data.max_samples": 4}
    above = {"batch_size": 10, "train.learning_rate": 30.0, "data": {"max_samples": 40}}
    assert over(below, above) == {"train.max_steps": 2, "batch_size": 10, "train.learning_rate": 30.0,
                                  "data.max_samples": 40}


def test_old_names_are_the_same_option() -> None:
    assert over({"train": {"num_epochs": 1}}, {"num_train_epochs": 2}) == {"num_train_epochs": 2}


def test_trainer_options_merge_key_by_key_and_other_mappings_are_taken_whole() -> None:
    merged = over({"trainer_options": {"a": 1, "b": 2}, "column_mapping": {"x": "y"}},
                  {"train": {"trainer_options": {"b": 3}}, "column_mapping": {"z": "y"}})
    assert merged["train.trainer_options"] == {"a": 1, "b": 3}
    assert merged["column_mapping"] == {"z": "y"}


def test_an_empty_section_changes_nothing() -> None:
    plan = load_plan(staged({**SFT, "model": None}))
    assert plan.stages[0].job.options.model_name == "m"


# Stages

def test_stages_are_resolved_over_the_defaults() -> None:
    recipe = staged(SFT, {**GRPO, "train": {"batch_size": 16}}, output_dir="out")
    recipe["defaults"] |= {"train": {"batch_size": 4, "learning_rate": 1e-3}, "rollout": {"num_generations": 2}}
    plan = load_plan(recipe)
    first, second = (stage.job.options for stage in plan.stages)
    assert [stage.name for stage in plan.stages] == ["1-sft", "2-grpo"]
    assert [stage.continues for stage in plan.stages] == [False, True]
    assert (first.batch_size, second.batch_size) == (4, 16)
    assert (first.learning_rate, second.learning_rate) == (1e-3, 1e-3)
    assert second.num_generations == 2 and not hasattr(first, "num_generations")
    assert (first.output_dir, plan.output_dir, plan.resume) == (None, "out", False)
    assert plan.stages[1].job.spec.name == "grpo"


def test_a_recipe_without_stages_is_one_job() -> None:
    plan = load_plan({**SFT, "model_name": "m", "output_dir": "o", "resume": "o/checkpoint-3"}, {"max_steps": 7})
    assert [stage.name for stage in plan.stages] == [""]
    assert (plan.output_dir, plan.resume) == ("o", "o/checkpoint-3")
    assert plan.stages[0].job.options.max_steps == 7
    assert plan.probe is None and not plan.recipe.staged


def test_an_override_goes_to_every_stage_that_takes_it_or_to_the_one_it_names() -> None:
    plan = load_plan(staged(), {"train.batch_size": 16, "stages.2.batch_size": 32, "num_generations": 4,
                                "stages.1.train.max_steps": 5, "packing": True})
    first, second = (stage.job.options for stage in plan.stages)
    assert (first.batch_size, second.batch_size) == (16, 32)
    assert (first.max_steps, second.max_steps) == (5, load_plan(staged()).stages[1].job.options.max_steps)
    assert second.num_generations == 4 and first.packing is True


def test_another_model_is_for_the_first_stage_and_previous_stays() -> None:
    plan = load_plan(staged(), {"model_name": "other"})
    assert [stage.job.options.model_name for stage in plan.stages] == ["other", "previous"]
    plan = load_plan(staged(), {"stages.2.model_name": "other"})
    assert [stage.job.options.model_name for stage in plan.stages] == ["m", "other"]
    assert not plan.stages[1].continues


def test_every_fault_of_every_stage_is_told_at_once_under_its_stage() -> None:
    first = {**SFT, "train": {"lerning_rate": 1e-3, "max_steps": "many"}}
    second = {**GRPO, "loss": {"bta": 0.1}, "rollout": {"temperature": -1.0}}
    found = faults(staged(first, second))
    assert len(found) == 4
    assert found[0].startswith("stages.1.train.lerning_rate: unknown option; did you mean 'train.learning_rate'")
    assert found[1].startswith("stages.1.train.max_steps = 'many'")
    assert found[2].startswith("stages.2.loss.bta: unknown option")
    assert found[3].startswith("stages.2.rollout.temperature = -1.0")


def test_a_fault_of_the_defaults_or_of_a_shared_override_is_told_once() -> None:
    recipe = staged()
    recipe["defaults"]["train"] = {"btch_size": 2}
    found = faults(recipe, {"lernin_rate": 1.0})
    assert len(found) == 2
    assert found[0].startswith("train.btch_size: unknown option")
    assert found[1].startswith("lernin_rate: unknown option")


def test_a_stage_may_not_have_what_its_algorithm_does_not_take() -> None:
    assert faults(staged({**SFT, "rollout": {"num_generations": 4}}, GRPO)) == (
        f"stages.1.rollout.num_generations: sft does not take this option; {', '.join(takers('num_generations'))} do",)
    assert "stages.1.num_generations" in faults(staged(), {"stages.1.num_generations": 4})[0]


@pytest.mark.parametrize(("recipe", "overrides", "told"), [
    (staged({**SFT, "model": {"model_name": "previous"}}), {}, "stages.1.model.model_name = 'previous': there is no"),
    (staged(SFT, {"algorithm": "gropo"}), {}, "stages.2.algorithm: unknown algorithm 'gropo'; did you mean 'grpo'"),
    (staged(SFT, {}), {}, "stages.2.algorithm: none given"),
    (staged(SFT, {**GRPO, "output_dir": "x"}), {}, "output_dir: belongs to the whole recipe"),
    (staged(SFT, {**GRPO, "resume": True}), {}, "resume: belongs to the whole recipe"),
    (staged(train={"max_steps": 3}), {}, "train: in a recipe with stages, shared options stand under `defaults`"),
    (staged(stage=[]), {}, "unknown key 'stage'; did you mean 'stages'"),
    ({"stages": []}, {}, "stages: a list of at least one config"),
    ({"stages": [SFT, "grpo"]}, {}, "stages: a list of at least one config"),
    ({"stages": [SFT], "defaults": 3}, {}, "defaults: a mapping"),
    (staged(), {"algorithm": "dpo"}, "algorithm: each stage has its own"),
    (staged(), {"stages.3.max_steps": 1}, "stages.3.max_steps: this recipe has the stages 1 to 2"),
    (staged(), {"stages.0.max_steps": 1}, "stages.0.max_steps: this recipe has the stages 1 to 2"),
    (staged(), {"2.max_steps": 1}, "2.max_steps: this recipe has the stages 1 to 2; stages.N.name=value"),
    (staged(), {"resume": "runs/x"}, "resume = 'runs/x': a recipe with stages resumes with resume=true"),
    (staged(), {"output_dir": 3}, "output_dir = 3: must be"),
    (staged(), {"overwrite": "yes"}, "overwrite = 'yes': must be"),
    ({**staged(), "overwrite": True}, {"resume": True}, "resume and overwrite: give one of the two"),
    ({**SFT, "model_name": "m"}, {"stages.1.max_steps": 1}, "stages.1.max_steps: this recipe has no stages"),
])
def test_what_a_recipe_may_not_be(recipe: dict, overrides: dict, told: str) -> None:
    found = faults(recipe, overrides)
    assert any(told in fault for fault in found), found


def test_the_yaml_interpolates_and_an_override_does_not(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("defaults:\n  model_name: m\n  system_prompt: 'say ${defaults.model_name}'\n"
                    "stages: [{algorithm: sft, data: {dataset_name: d}}]\n")
    assert load_plan(path).stages[0].job.options.system_prompt == "say m"
    plan = load_plan(path, {"system_prompt": "${defaults.model_name}"})
    assert plan.stages[0].job.options.system_prompt == "${defaults.model_name}"


# The probe

def test_a_probe_is_validated_like_everything_else() -> None:
    found = faults(staged(probe={"dataset_nam": "x", "max_samples": 0, "reward": "exact_mach", "max_new_tokens": True}))
    assert [fault.partition(":")[0] for fault in found] == [
        "probe.dataset_nam", "probe.max_samples = 0", "probe.max_new_tokens = True",
        "probe.dataset_name", "probe.reward",
    ]
    assert "did you mean 'probe.dataset_name'" in found[0] and "did you mean 'exact_match'" in found[4]
    assert faults(staged(probe="arithmetic"))[0].startswith("probe = 'arithmetic': a mapping is wanted")


def test_a_probe_takes_overrides_and_null_turns_it_off() -> None:
    recipe = staged(probe={"dataset_name": "p", "max_samples": 5})
    probe = load_plan(recipe, {"probe.max_samples": 7}).probe
    assert probe is not None and (probe.dataset_name, probe.max_samples, probe.reward) == ("p", 7, "exact_match")
    assert load_plan(recipe, {"probe": None}).probe is None
    assert load_plan({**SFT, "model_name": "m", "probe": {"dataset_name": "p"}}).probe is not None

"""Order of the runs, what each is told, and how a process that fails is told of."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import aligntune
from aligntune.compare import peers
from aligntune.compare.arm import ArmSpec, attribute
from aligntune.compare.protocol import (
    announced,
    environment,
    execute,
    in_a_fresh_process,
    in_this_process,
    interpreter,
    order,
    plan,
    spec_of,
    write_spec,
)
from aligntune.compare.reach import require
from aligntune.compare.run import one_stage, read_baseline
from aligntune.compare.settings import Arm, Settings, read_arm
from aligntune.core.recipes import read_recipe
from aligntune.errors import BackendUnavailableError, ComparisonError, ConfigError
from tests import small_jobs
from tests.core import tiny


def settings(**options: Any) -> Settings:
    return Settings("x", {"algorithm": "sft"}, {"learning_rate": 1e-3}, **{
        "a": read_arm("trl"), "b": read_arm("fast,train.learning_rate=2e-3"), **options})


def test_a_b_b_a() -> None:
    assert order(1) == [("a", 0), ("b", 0)]
    assert order(2) == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert order(3)[4:] == [("a", 2), ("b", 2)]


def test_the_oracle_comes_first_and_the_yardstick_last() -> None:
    roles = [(run.role, run.arm.options.get("model.attn_implementation")) for run in plan(settings(), attention=None)]
    assert roles == [("oracle", "eager"), ("a", None), ("b", None), ("b", None), ("a", None), ("yardstick", "eager")]
    other = plan(settings(a=read_arm("fast")), attention=None)
    assert [run.arm.options["model.attn_implementation"] for run in other if run.role == "yardstick"] == ["eager",
                                                                                                         "sdpa"]
    assert plan(settings(), attention="eager")[-1].arm.options["model.attn_implementation"] == "sdpa"
    assert {run.role for run in plan(settings(oracle=False), attention=None)} == {"a", "b"}


def test_oracle_and_yardstick_train_what_arm_a_trains_however_it_does() -> None:
    runs = plan(settings(a=read_arm("trl,quantization=nf4,loss.beta=0.3,padding_free=true,precision=bf16")),
                attention=None)
    oracle, *_, last = runs
    assert oracle.arm.options == {"quantization": "nf4", "loss.beta": 0.3, "model.precision": "fp32",
                                  "model.model_dtype": "fp32", "model.attn_implementation": "eager"}
    assert last.arm.options == {"quantization": "nf4", "loss.beta": 0.3, "model.attn_implementation": "sdpa"}


def test_how_many_runs_and_how_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [0.0], []
    monkeypatch.setattr("aligntune.compare.protocol.time.time", lambda: clock[0])

    def runner(spec: ArmSpec, arm: Arm) -> dict[str, Any]:
        clock[0] += {"oracle": 50.0, "a": 20.0, "b": 30.0}.get(spec.role, 10.0)
        return {"status": "ok", "repeat": spec.repeat}

    found = execute(settings(a=read_arm("liger")), tmp_path, runner=runner, say=said.append, seed=0, online=False,
                    peft=False, attention=None)
    assert {role: len(runs) for role, runs in found.items()} == {"a": 2, "b": 2, "oracle": 1, "yardstick": 2}
    assert said[0] == ("7 runs, one after the other: 4 timed, and 3 that parity is judged by (oracle, yardstick, "
                       "yardstick), which --no-oracle leaves out")
    assert [line.partition(" (about ")[2] for line in said[1:4]] == ["", "", "100 s left)"]
    assert said[4] == "[4/7] b2: fast,train.learning_rate=2e-3 (about 120 s left)"
    assert said[7] == "[7/7] yardstick2: yardstick (trl, sdpa) (about 30 s left)"
    short = plan(settings(oracle=False, repeats=1), attention=None)
    assert announced(short) == "2 runs, one after the other: 2 timed"


def test_an_arms_own_option_wins_whichever_way_it_is_written(tmp_path: Path) -> None:
    runs = plan(settings(steps=9), attention=None)
    specs = {(run.role, run.repeat): spec_of(settings(steps=9), run, tmp_path, seed=7, online=False, peft=True)
             for run in runs}
    a, b, oracle = specs["a", 0], specs["b", 1], specs["oracle", 0]
    assert a.overrides["learning_rate"] == 1e-3 and "train.learning_rate" not in a.overrides
    assert b.overrides["train.learning_rate"] == 2e-3 and "learning_rate" not in b.overrides
    assert a.overrides["max_steps"] == 9 and a.overrides["backend"] == "trl" and b.overrides["backend"] == "fast"
    assert a.gradient_steps == [1, 3] and b.gradient_steps == [] and oracle.stop_after == 3 and oracle.hypotheses
    assert (a.seed, b.seed) == (7, 7) and a.folder != b.folder
    online = spec_of(settings(), runs[3], tmp_path, seed=7, online=True, peft=False)
    assert online.seed == 8 == online.overrides["seed"]
    again = replace(settings(), config={"algorithm": "sft", "resume": True})  # a run's own config.yaml may say so
    assert spec_of(again, runs[1], tmp_path, seed=7, online=False, peft=False).overrides["resume"] is False


def test_a_process_without_a_result_is_told_with_its_last_words(tmp_path: Path) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\necho the last words\nexit 3\n")
    dead.chmod(0o755)
    spec = ArmSpec("b", "b", 0, {}, {}, str(tmp_path / "arm"), 0)
    with pytest.raises(ComparisonError, match=r"exit code 3(.|\n)*the last words"):
        in_a_fresh_process(spec, Arm("b", "trl", python=str(dead)))
    with pytest.raises(ConfigError, match="cannot be started"):
        in_a_fresh_process(spec, Arm("b", "trl", python=str(tmp_path / "nowhere")))


def test_setup_names() -> None:
    assert attribute("os:path.join") is os.path.join
    for name, words in (("os", "not module:function"), ("nowhere_at_all:f", "No module"), ("os:nope", "nope")):
        with pytest.raises(ConfigError, match=words):
            attribute(name)


def test_one_stage_of_several(tmp_path: Path) -> None:
    shared = {"defaults": {"train": {"batch_size": 4}}, "stages": [
        {"algorithm": "sft", "model": {"model_name": "builtin:tiny"}},
        {"algorithm": "dpo", "model": {"model_name": "previous"}}]}
    recipe = read_recipe(shared)
    assert one_stage(recipe, 1, {})["algorithm"] == "sft"
    assert one_stage(recipe, 2, {"model.model_name": "builtin:tiny"})["train.batch_size"] == 4
    for stage, words in ((None, r"1 \(sft\), 2 \(dpo\)"), (3, "--stage N .from Python stage=N."), (2, "model_name")):
        with pytest.raises(ConfigError, match=words):
            one_stage(recipe, stage, {})
    with pytest.raises(ConfigError, match="no stages"):
        one_stage(read_recipe({"algorithm": "sft"}), 1, {})


@pytest.mark.parametrize(("given", "words"), [
    ({"overrides": {"lerning_rate": 1}}, "learning_rate"),
    ({"b": "fast,packin=true"}, "arm 'fast,packin=true': packin: unknown option; .*packing"),
    ({"b": "fast,packin=true,lerning_rate=1"}, "2 faults in arm 'fast,packin=true,lerning_rate=1'"),
    ({"overrides": {"output_dir": "foo"}}, "^output_dir: each run has a folder .* which --output-dir names"),
    ({"overrides": {"resume": True}}, "^resume: each run starts anew"),
    ({"overrides": {"overwrite": True}}, "^overwrite: each run starts anew"),
    ({"overrides": {"backend": "fast"}}, "^backend: the arms say it: --a and --b"),
    ({"overrides": {"output_dir": "foo", "resume": True}}, "^2 faults in the comparison"),
    ({"overrides": {"report_to": "wandb"}}, "^report_to = 'wandb': every run of a comparison has report_to = 'none'"),
    ({"overrides": {"logging.progress": True}}, "^logging.progress = True: every run .* progress = False"),
    ({"b": "trl,stop_value=1.0"}, "^arm 'trl,stop_value=1.0': stop_value = 1.0: every run"),
    ({"overrides": {"max_steps": 9}, "steps": 12}, "^max_steps = 9: the comparison is given steps = 12 too; give one"),
    ({"b": "trl,train.max_steps=9", "steps": 12}, "^arm 'trl,train.max_steps=9': train.max_steps = 9: the comparison"),
    ({"b": "fastt"}, "fast"), ({"asserts": ["speed>=1"]}, "speedup"), ({"baseline": "nowhere.json"}, "no file"),
    ({"repeats": 0}, "repeats"), ({"steps": 3}, "warmup"), ({"price": -1.0}, "price"),
    ({"target_loss": float("nan")}, "target_loss"), ({"python_b": "/nowhere/python"}, "cannot be started"),
    ({"python_b": "false"}, "no Python that works"), ({"setup_b": "nowhere_at_all:f"}, "no module 'nowhere_at_all'"),
    ({"setup_a": "tests.compare.faults"}, "not module:function"),
])
def test_faults_are_told_before_anything_runs(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("an arm was started")

    with pytest.raises(ConfigError, match=words):
        aligntune.compare("sft-builtin", **{"b": "trl", "runner": never, "output_dir": tmp_path / "out", **given})
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_here_is_told_before_anything_runs(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho trl unsloth\n")  # what it does not find
    other.chmod(0o755)
    for python, words in ((None, "unsloth not found by this interpreter; pip install unsloth"),
                          (str(tmp_path), f"unsloth not found by '{tmp_path}'; pip install unsloth"),
                          (str(other), "trl, unsloth not found by .*python'; pip install trl unsloth")):
        with pytest.raises(BackendUnavailableError, match=words):
            aligntune.compare("sft-builtin", b="unsloth", python_b=python, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").touch()
    require(read_arm("unsloth", python=str(tmp_path)))
    require(read_arm("trl", python=sys.executable, setup="tests.compare.faults:eager"))


@pytest.mark.parametrize("given", ["overrides", "recipe"])
def test_a_model_and_a_tokenizer_in_memory_are_written_down_for_the_arms(given: str, tmp_path: Path) -> None:
    import torch

    model, tokenizer = tiny.llama().to(torch.bfloat16), tiny.tokenizer()
    recipe = {"algorithm": "sft", "model": {"model_name": "builtin:tiny"}, "train": {"max_steps": 3, "batch_size": 2},
              "data": {"dataset_name": small_jobs.alpaca(tmp_path / "rows.jsonl"), "max_seq_length": 64}}
    objects = {"model_name": model, "tokenizer_name": tokenizer}
    if given == "recipe":
        recipe["model"] = objects
    specs = []

    def runner(spec: ArmSpec, arm: Arm) -> dict[str, Any]:
        write_spec(spec)  # JSON, as a process would read it
        specs.append(spec)
        return in_this_process(spec, arm)

    report = aligntune.compare(recipe, a="trl", b="trl", repeats=1, warmup=1, oracle=False, runner=runner,
                               overrides={f"model.{name}": value for name, value in objects.items()}
                               if given == "overrides" else {}, output_dir=tmp_path / "out", asserts=["parity", "data"])
    assert report.exit_code == 0, report.verdict
    start = str(tmp_path / "out/start")
    assert len(specs) == 2 and all(spec.overrides["model_name"] == spec.overrides["tokenizer_name"] == start
                                   and spec.overrides["model_dtype"] == "bf16" for spec in specs)
    trained = aligntune.create_sft_trainer(model_name=start, dataset_name=[{"text": "a"}], output_dir=tmp_path / "run",
                                           backend="trl", model_dtype="bf16", max_steps=1)
    for (name, value), (other, wanted) in zip(trained.model.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(value, wanted) and value.dtype == torch.bfloat16
    assert len(trained.tokenizer) == len(tokenizer)


@pytest.mark.parametrize(("given", "words"), [
    ({"overrides": {"dataset_name": [{"text": "a"}]}}, "dataset_name: arms run in processes"),
    ({"b": {"backend": "trl", "model_name": tiny.llama()}}, "model_name: arms run in processes"),
    ({"overrides": {"model_name": get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])),
                    "tokenizer_name": tiny.tokenizer()}}, "adapters in it"),
])
def test_objects_that_arms_cannot_take(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        aligntune.compare("sft-builtin", output_dir=tmp_path / "out", **{"b": "trl", **given})
    assert not (tmp_path / "out").exists()


def test_a_builtin_model_is_written_before_the_arms_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path / "cache"))

    def runner(spec: ArmSpec, arm: Arm) -> dict[str, Any]:
        assert len(list((tmp_path / "cache/builtin").glob("tiny-*/model.safetensors"))) == 1
        assert spec.overrides.get("model_name") is None
        raise ComparisonError("seen")

    with pytest.raises(ComparisonError, match="seen"):
        aligntune.compare("sft-builtin", b="trl", runner=runner, output_dir=tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a comparison"):
        aligntune.compare("sft-builtin", b="trl", output_dir=tmp_path)


def test_a_baseline_that_is_none(tmp_path: Path) -> None:
    for text, words in (("{", "not JSON"), ("{}", "schema")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_baseline(tmp_path)


FAKE_UNSLOTH = '''
import sys

FIRST = "torch" not in sys.modules


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit, full_finetuning, use_gradient_checkpointing, dtype):
        from transformers import AutoModelForCausalLM
        import os
        import torch

        assert os.environ["UNSLOTH_COMPILE_LOCATION"].endswith("b-1/compiled")
        assert use_gradient_checkpointing == "unsloth"
        torch.rand(7)  # adapters that are drawn after it are others
        assert FIRST and max_seq_length == 64 and not load_in_4bit
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        model.config.fake_peer = True
        return model, None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, target_modules, random_state, use_gradient_checkpointing):
        from peft import LoraConfig, get_peft_model

        assert len(target_modules) == 7
        return get_peft_model(model, LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules,
            task_type="CAUSAL_LM"))
'''


@pytest.mark.slow
def test_a_peer_in_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is this one behind a script, the package a stand-in that loads through transformers."""
    (tmp_path / "site" / "unsloth").mkdir(parents=True)
    (tmp_path / "site" / "unsloth" / "__init__.py").write_text(FAKE_UNSLOTH)
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    recipe = {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(tmp_path / "model")},
              "data": {"dataset_name": small_jobs.alpaca(tmp_path / "rows.jsonl"), "max_seq_length": 64},
              "train": {"max_steps": 4, "batch_size": 2}}
    report = aligntune.compare(recipe, a="trl", b="unsloth", python_b=str(other), repeats=1, warmup=1, oracle=False,
                               output_dir=tmp_path / "out", asserts=["parity", "data"])
    assert report.exit_code == 0, report.verdict
    assert "aligntune.compare.arm" in (tmp_path / "calls").read_text()
    arm = report.data["arms"]["b"]
    assert arm["peer"] == "unsloth" and arm["python"] == str(other)
    assert "fake_peer" not in str(report.data["arms"]["a"]["config"])


@pytest.mark.slow
def test_a_peer_in_a_folder_of_packages_with_adapters_of_its_own(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "unsloth").mkdir(parents=True)
    (site / "unsloth" / "__init__.py").write_text(FAKE_UNSLOTH)
    recipe = {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(tmp_path / "model")},
              "data": {"dataset_name": small_jobs.alpaca(tmp_path / "rows.jsonl"), "max_seq_length": 64},
              "train": {"max_steps": 4, "batch_size": 2}, "lora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}}
    report = aligntune.compare(recipe, a="trl", b="unsloth", python_b=str(site), repeats=1, warmup=1, oracle=False,
                               output_dir=tmp_path / "out", asserts=["parity", "data"])
    assert report.exit_code == 0, report.verdict
    assert report.data["parity"]["losses"]["steps"] == 4


def test_the_environment_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "/before")
    plain = environment(Arm("trl", "trl"), tmp_path)
    assert (plain["CUDA_VISIBLE_DEVICES"], plain["CUDA_DEVICE_ORDER"]) == ("0", "PCI_BUS_ID")
    assert plain["PYTHONPATH"] == "/before" and interpreter(Arm("trl", "trl")) == sys.executable
    (tmp_path / "nvidia" / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "lib" / "libcudart.so.12").touch()
    peer = Arm("unsloth", "trl", peer="unsloth", python=str(tmp_path), environment={"UNSLOTH_PADDING_CHOICE": "padded"})
    found = environment(peer, tmp_path / "arm")
    assert interpreter(peer) == sys.executable
    assert found["PYTHONPATH"] == f"{tmp_path}:{Path(aligntune.__file__).parents[1]}:/before"
    assert found["LD_LIBRARY_PATH"] == f"{tmp_path}/nvidia/lib" and found["UNSLOTH_PADDING_CHOICE"] == "padded"
    assert found["UNSLOTH_COMPILE_LOCATION"] == f"{tmp_path}/arm/compiled"
    assert interpreter(Arm("b", "trl", python="/other/python")) == "/other/python"
    for given, wanted in (("", ""), ("2,3", "2")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert environment(Arm("trl", "trl"), tmp_path)["CUDA_VISIBLE_DEVICES"] == wanted


def test_adapters_are_drawn_from_seed_and_name() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    def adapters(noise: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(noise)
        model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(1.0)
        assert peers.draw_adapters(model, seed) == 4
        return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora" in name}

    one, two, other = adapters(1, 5), adapters(2, 5), adapters(1, 6)
    assert len(one) == 8 and all(torch.equal(one[name], two[name]) for name in one)
    for name, values in one.items():
        if "lora_A" in name:
            assert not torch.equal(values, other[name])
            # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(inputs)
            bound = values.shape[1] ** -0.5
            assert 0.7 * bound < float(values.abs().max()) <= bound and abs(float(values.mean())) < 0.3 * bound
        else:
            assert not values.any()
    assert len({tuple(values.flatten().tolist()) for name, values in one.items() if "lora_A" in name}) == 4


def test_adapters_are_drawn_anew_only_beside_a_peer_that_makes_its_own(tmp_path: Path) -> None:
    for b, wanted in (("unsloth", True), ("liger", False), ("fast", False)):
        given = settings(b=read_arm(b))
        specs = [spec_of(given, run, tmp_path, seed=0, online=False, peft=True) for run in plan(given, attention=None)]
        assert {spec.draw_adapters for spec in specs} == {wanted}


@pytest.mark.slow
def test_a_missing_peer_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    spec = ArmSpec("liger", "b", 0, {}, {}, str(tmp_path), 0, peer="liger")
    write_spec(spec)
    found = in_a_fresh_process(spec, Arm("liger", "trl", peer="liger"))
    assert found["status"] == "error" and found["exit_code"] == 4 and "pip install liger-kernel" in found["message"]

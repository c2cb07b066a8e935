"""Arms, assertions and counts as people type them; every typo is told with what is meant."""

from __future__ import annotations

import pytest

from aligntune.compare.settings import check_counts, read_arm, read_assertion, split
from aligntune.errors import ConfigError


def test_an_arm_is_a_name_and_its_options() -> None:
    arm = read_arm("trl,packing=true,train.learning_rate=1e-4,lora_target_modules=[q_proj,v_proj]")
    assert (arm.backend, arm.peer) == ("trl", None)
    assert arm.options == {"packing": True, "train.learning_rate": 1e-4, "lora_target_modules": ["q_proj", "v_proj"]}
    assert arm.label == "trl,packing=true,train.learning_rate=1e-4,lora_target_modules=[q_proj,v_proj]"
    assert read_arm(arm) is arm
    assert read_arm({"backend": "fast", "strict": True}).options == {"strict": True}


def test_peers_run_through_trl() -> None:
    arm = read_arm("unsloth", python="/opt/other/bin/python")
    assert (arm.backend, arm.peer, arm.python) == ("trl", "unsloth", "/opt/other/bin/python")


@pytest.mark.parametrize(("text", "words"), [
    ("fats", "did you mean 'fast'"), ("", "unknown backend or peer"), ("trl,packing", "name=value"),
    ("trl,seed=3", "the comparison sets this itself"), ("fast,output_dir=x", "sets this itself"),
    ("trl,", "^arm 'trl,': '': name=value or section.name=value is wanted$"),
    ("fast,a,b", "(?s)^2 faults in .*1. arm 'fast,a,b': 'a': name=value .*2. arm 'fast,a,b': 'b': name=value"),
])
def test_arms_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_arm(text)


def test_commas_inside_brackets_and_quotes_part_nothing() -> None:
    assert split("a,b=[1,2],c={x: 1, y: 2},d='p,q'") == ["a", "b=[1,2]", "c={x: 1, y: 2}", "d='p,q'"]
    assert split("") == []


@pytest.mark.parametrize(("text", "name", "relation", "bound"), [
    ("speedup>=1.3", "speedup", ">=", 1.3), (" kl < 1e-4 ", "kl", "<", 1e-4), ("parity", "parity", "", 0.0),
])
def test_assertions(text: str, name: str, relation: str, bound: float) -> None:
    found = read_assertion(text)
    assert (found.name, found.relation, found.bound) == (name, relation, bound)


@pytest.mark.parametrize(("text", "words"), [
    ("speedup", "a bound is wanted"), ("sppedup>=1", "did you mean 'speedup'"), ("parity>=1", "takes no bound"),
    ("paritty", "did you mean 'parity'.*top1[.] Numbers"), ("speedup=>1", "unknown assertion.*[.] Numbers take"),
    ("speedup>=1.2.3", "not a number"), ("speedup>=", "unknown assertion"),
])
def test_assertions_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_assertion(text)


def test_counts() -> None:
    check_counts(steps=7, repeats=1, warmup=5)
    with pytest.raises(ConfigError, match="3 faults") as error:
        check_counts(steps=-1, repeats=0, warmup=-1)
    assert len(error.value.faults) == 3
    with pytest.raises(ConfigError, match="at least warmup"):
        check_counts(steps=6, repeats=2, warmup=5)

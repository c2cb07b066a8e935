"""`name=value`: numbers, lists, nothing, and text that YAML would misread."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.cli.overrides import parse, value_of
from aligntune.errors import ConfigError


@pytest.mark.parametrize(("name", "text", "value"), [
    ("learning_rate", "1e-4", 1e-4), ("train.learning_rate", "5", 5), ("max_steps", "-1", -1),
    ("max_samples", "null", None), ("max_samples", "~", None), ("system_prompt", "", None), ("use_peft", "true", True),
    ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("lora_target_modules", "all-linear", "all-linear"),
    ("trainer_options", "{adam_beta2: 0.95}", {"adam_beta2": 0.95}), ("resume", "true", True), ("resume", "a/b", "a/b"),
    # An option that is text keeps what is written: a commit hash is no number, a colon makes no mapping.
    ("run_name", "42", "42"), ("model_revision", "12e4567", "12e4567"), ("split", "true", "true"),
    ("system_prompt", "Answer: yes # or no", "Answer: yes # or no"), ("data.system_prompt", "- be brief", "- be brief"),
    ("system_prompt", "${HOME}", "${HOME}"), ("unknown", "${a}", "${a}"), ("unknown", "a: b", "a: b"),
    ("unknown", "[${a}, 1]", None), ("run_name", '"quoted"', "quoted"),
    ("unknown", "&x", "&x"), ("unknown", "???", "???"),
    ("unknown", "2024-01-01", "2024-01-01"), ("stages.2.learning_rate", "1e-4", 1e-4), ("stages.2.run_name", "7", "7"),
    ("tokenizer", "123", "123"),
])
def test_values(name: str, text: str, value: Any) -> None:
    if value is None and "[" in text:
        with pytest.raises(ConfigError, match="cannot be read as YAML"):  # as in a YAML file: { opens a mapping
            value_of(name, text)
        return
    found = value_of(name, text)
    assert found == value and type(found) is type(value)


def test_an_equals_sign_in_the_value_is_part_of_it() -> None:
    assert parse(["system_prompt=a=b", "data.split=train[:1%]"]) == {"system_prompt": "a=b", "data.split": "train[:1%]"}


def test_every_wrong_argument_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["batch_size", "--learning-rate=1e-3", "a=1", "a=2", "trainer_options={x", "=3"])
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "'batch_size'", "'--learning-rate=1e-3'", "a", "trainer_options", "'=3'"]
    assert "did you mean learning_rate=1e-3?" in caught.value.faults[1]
    assert "given twice" in caught.value.faults[2]

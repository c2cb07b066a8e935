"""The public surface, pinned: options, names, defaults. A change here is made on purpose."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import aligntune
from aligntune.algorithms import ALGORITHMS
from aligntune.core.options import UNSET, infos
from aligntune.core.resolve import option_table

PIN = Path(__file__).with_name("public_surface.json")


def surface() -> dict:
    options = {row.path: row.default for row in option_table(None).values() if row.section != "loss"}
    algorithms = {}
    for name in ALGORITHMS.names():
        spec = ALGORITHMS.load(name)
        algorithms[name] = {"takes": spec.takes, "defaults": dict(spec.defaults),
                            "options": {row.name: row.default for row in infos(spec.options, "loss")}}
    return {"names": sorted(aligntune.__all__), "options": options, "algorithms": algorithms}


def test_names_options_and_defaults_are_the_pinned_ones() -> None:
    assert json.loads(json.dumps(surface())) == json.loads(PIN.read_text()), (
        "the public surface changed; if on purpose: python -m tests.test_public_surface")


def test_factories_take_keywords_only_after_model_and_dataset_and_default_to_unset() -> None:
    for factory in (aligntune.create_sft_trainer, aligntune.create_reward_trainer, aligntune.create_rl_trainer):
        parameters = list(inspect.signature(factory).parameters.values())
        assert [p.name for p in parameters[:2]] == ["model_name", "dataset_name"]
        for parameter in parameters[2:]:
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
            if parameter.name not in ("config", "callbacks", "options"):
                assert parameter.default is UNSET, parameter.name


def test_help_shows_every_option_with_its_default() -> None:
    factories = ((aligntune.create_sft_trainer, ["sft"]), (aligntune.create_reward_trainer, ["reward"]),
                 (aligntune.create_rl_trainer, ["dpo", "kto", "simpo", "grpo"]))
    for factory, algorithms in factories:
        text = inspect.getdoc(factory)
        for algorithm in algorithms:
            for row in option_table(algorithm).values():
                if row.audience != "sft" or algorithm == "sft":
                    assert f"{row.name} (default {row.default!r})" in text, row.name


@pytest.mark.parametrize("name", aligntune.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(aligntune, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = aligntune.nope
    from aligntune.core.backend_factory import create_sft_trainer

    assert create_sft_trainer is aligntune.create_sft_trainer


if __name__ == "__main__":
    PIN.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n")

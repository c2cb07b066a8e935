"""Lazy registries: names, aliases, collisions, missing packages."""

from __future__ import annotations

import pytest

from aligntune.core.registry import Registry, Support
from aligntune.errors import AlignTuneError, ConfigError


def made() -> Registry:
    registry: Registry = Registry("thing")
    registry.register("alpha_one", "aligntune.errors:ConfigError", aliases=("a1",))
    registry.register("beta", 3)
    return registry


def test_names_aliases_case_and_dashes_resolve() -> None:
    registry = made()
    assert registry.load("alpha_one") is ConfigError
    assert {registry.resolve(name) for name in ("alpha_one", "Alpha-One", "a1", "A1")} == {"alpha_one"}
    assert registry.load("beta") == 3
    assert "a1" in registry and "nope" not in registry and 3 not in registry


def test_unknown_names_list_the_choices_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'alpha_one'\? Valid: alpha_one, beta"):
        made().load("alpha_on")
    with pytest.raises(ConfigError, match=r"unknown thing 7; valid: alpha_one, beta"):
        made().load(7)


@pytest.mark.parametrize(("name", "aliases"), [("beta", ()), ("a1", ()), ("gamma", ("beta",)), ("gamma", ("a1",))])
def test_a_taken_name_is_a_collision(name: str, aliases: tuple) -> None:
    with pytest.raises(ConfigError, match="registered already"):
        made().register(name, 1, aliases=aliases)


def test_replace_drops_the_old_aliases() -> None:
    registry = made()
    registry.register("alpha_one", 5, aliases=("uno",), replace=True)
    assert registry.load("uno") == 5
    assert "a1" not in registry


def test_a_missing_package_prints_the_install_line() -> None:
    registry: Registry = Registry("thing")
    registry.register("x", "no_such_package_here.module:thing", install='pip install "aligntune[x]"')
    with pytest.raises(AlignTuneError, match=r'pip install "aligntune\[x\]"'):
        registry.load("x")


def test_support_is_a_truth_value_with_reasons() -> None:
    assert Support("supported")
    no = Support("unavailable", "no GPU", "an NVIDIA GPU", "pip install gpu")
    assert not no
    assert str(no) == "unavailable: no GPU (needs an NVIDIA GPU); install: pip install gpu"

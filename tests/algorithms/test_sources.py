"""Each loss names its paper's equation, or the section where it stands without a number that is worth citing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from aligntune.algorithms import ALGORITHMS
from aligntune.algorithms.dpo import FORMS

ROOT = Path(__file__).resolve().parents[2]
NAMED = r"equations?\s+\d+|of no\s+paper's equation"
BY_SECTION = {"nca_pair", "robust", "bco_pair", "aot", "aot_unpaired"}
"""Forms of DPO whose papers are cited by section."""


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_an_algorithm_names_its_equation(name: str) -> None:
    assert re.search(NAMED, ALGORITHMS.load(name).paper), ALGORITHMS.load(name).paper
    module = importlib.import_module(f"aligntune.algorithms.{name}")
    if name != "ppo":  # whose functions name one each
        assert re.search(NAMED, module.__doc__ or ""), module.__doc__


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_dpo_names_its_equation(form: str) -> None:
    text = FORMS[form].__doc__ or ""
    assert re.search(r"section \d" if form in BY_SECTION else rf"(?i){NAMED}", text), text
    assert re.search(r"arXiv \d{4}\.\d{5}|DPO equation|AOT|no\s+paper", text), text


def test_no_number_is_given_that_nobody_looked_up() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "aligntune").rglob("*.py"), *(ROOT / "aligntune").rglob("*.yaml")]
    assert len(pages) > 100
    for path in pages:
        assert not re.search(r"not\s+verified|unverified\s+(equation|number)", path.read_text()), path

"""Each loss names its paper's equation, or says that the number is not verified."""

from __future__ import annotations

import importlib
import re

import pytest

from aligntune.algorithms import ALGORITHMS
from aligntune.algorithms.dpo import FORMS

NAMED = r"equations?\s+(number not\s+verified|\d+)|of no\s+paper's equation"


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_an_algorithm_names_its_equation(name: str) -> None:
    assert re.search(NAMED, ALGORITHMS.load(name).paper), ALGORITHMS.load(name).paper
    module = importlib.import_module(f"aligntune.algorithms.{name}")
    if name != "ppo":  # whose functions name one each
        assert re.search(NAMED, module.__doc__ or ""), module.__doc__


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_dpo_names_its_equation(form: str) -> None:
    text = FORMS[form].__doc__ or ""
    assert re.search(rf"(?i){NAMED}", text), text
    assert re.search(r"arXiv \d{4}\.\d{5}|DPO equation|AOT|no\s+paper", text), text

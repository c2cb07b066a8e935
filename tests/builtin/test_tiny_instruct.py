"""`builtin:tiny-instruct` as it is shipped: small, in the package, and able to add."""

import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aligntune
from aligntune.builtin import arithmetic, load_model, load_tokenizer, model_path
from aligntune.builtin.store import LIMIT_BYTES

FOLDER = model_path("builtin:tiny-instruct")


def test_what_is_on_disk_is_small_and_bfloat16():
    stored = load_file(FOLDER / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert sum(value.numel() for value in stored.values()) == 2_590_464
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert 5_000_000 < size <= LIMIT_BYTES == 6_000_000


def test_it_lies_in_the_package_and_the_wheel_takes_it():
    """hatchling packs every file of the packages named in pyproject that git does not ignore."""
    package = Path(aligntune.__file__).parent
    assert package / "builtin" / "tiny-instruct" == FOLDER
    assert {file.name for file in FOLDER.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    project = package.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the package is installed without its sources")
    targets = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]
    for kind, names in (("wheel", "packages"), ("sdist", "include")):
        assert "aligntune" in targets[kind][names], kind
        assert not any(FOLDER.match(pattern) for pattern in targets[kind].get("exclude", [])), kind
    ignore = package.parent / ".gitignore"
    assert not ignore.is_file() or "safetensors" not in ignore.read_text()


def test_it_adds_numbers_that_it_has_not_seen():
    """50 of 50 when it was stored (508 of all 510); chance is below 1 in 100."""
    model, tokenizer = load_model("builtin:tiny-instruct"), load_tokenizer("builtin:tiny-instruct")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    tokenizer.padding_side = "left"
    problems = arithmetic.problems("test")[:50]
    assert not {problem.key for problem in problems} & {problem.key for problem in arithmetic.problems("train")}
    asked = [[{"role": "user", "content": problem.question}] for problem in problems]
    given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", padding=True,
                                          return_dict=True)
    made = model.generate(**given, do_sample=False, max_new_tokens=6)[:, given["input_ids"].shape[1]:]
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    right = sum(said == str(problem.answer) for said, problem in zip(answers, problems, strict=True))
    assert right >= 45, f"{right} of {len(problems)}"

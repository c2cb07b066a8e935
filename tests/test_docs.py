"""The documentation is run: code blocks of each page in order, generated pages compared, links and pages present."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligntune.algorithms import ALGORITHMS
from aligntune.core.option_docs import default, markdown
from aligntune.core.resolve import option_table
from tests.pages import Runner

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [*sorted(DOCS.rglob("*.md")), README]
OPTIONS = DOCS / "options.md"
FAMILIES_PAGE = DOCS / "families.md"
CONFIGURATION = DOCS / "configuration.md"
SCALE = {"learning rate": "learning_rate", "batch": "batch_size", "group": "num_generations",
         "longest row": "max_seq_length", "longest completion": "max_completion_length"}  # fmt: skip


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def options_page() -> str:
    return ("# Options\n\nGenerated from the config dataclasses; `aligntune options ALGORITHM` prints one algorithm's. "
            "`null` in YAML is `None` in Python.\n\n" + markdown())


def families_page() -> str:
    """The fast backend's table of model families, a row each."""
    from aligntune.backends.fast.families import FAMILIES

    head = ["family", "`model_type`", "RMSNorm", "norms lie", "q and k norm", "q, k, v", "MLP", "of its own"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for family in FAMILIES:
        own = [
            *(f"attention {name}" for name, _ in family.attention_options),
            *(["layers without rotary embedding"] if family.optional_rope else []),
            *(["scaled residual"] if family.residual_scale else []),
            *(["dropout on branches"] if family.branch_dropouts else []),
            *(["scaled logits"] if family.logits_divisor else []),
            *(["capped logits"] if family.logits_softcap else []),
        ]
        cells = [family.title, f"`{family.model_type}`", family.norm, family.layer, family.qk_norm or "none",
                 family.attention, family.mlp, ", ".join(own).replace("_", " ") or "-"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "# Families\n\nGenerated from `aligntune/backends/fast/families.py`: how the modules of each model family are "
        "laid out, which decides the op that each takes.\n\n" + "\n".join(lines) + "\n\n"
        "A family is recognised by the `forward` that its modules run. A model outside the table gets what its "
        "structure shows: a module is probed on a few numbers and taken only if it computes what the op computes. "
        "What runs eager is named in the attestation, with the reason; `strict=True` makes it an error. "
        "Experts of mixtures keep their "
        "own modules; norms, rotary embedding, attention and head are ours.\n"
    )


def scale() -> str:
    """The defaults of each algorithm's scale, a row for those that share them; which rates are not TRL's."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in ALGORITHMS.names():
        options = option_table(name)
        cells = (default(options[one], name) if one in options else "" for one in SCALE.values())
        shown = (f"{cell:g}".replace("e-0", "e-") if isinstance(cell, float) else str(cell) for cell in cells)
        rows.setdefault(tuple(shown), []).append(name)
    lines = ["| " + " | ".join(("algorithm", *SCALE)) + " |", "|---" * (len(SCALE) + 1) + "|"]
    lines += ["| " + " | ".join((", ".join(names), *cells)) + " |" for cells, names in rows.items()]
    others = [f"* {name}: {line}" for name in ALGORITHMS.names() for line in ALGORITHMS.load(name).differs
              if line.startswith("learning_rate")]
    told = ("These rates are TRL's (`ppo`'s is that of TRL's last one), for full training, but for those listed here.\n"
            "LoRA usually wants about ten times as much.")
    return "\n".join([*lines, "", told, "", *others]) + "\n"


def with_scale(page: str) -> str:
    return re.sub(r"(<!-- scale -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}\n{scale()}\n{match[2]}", page,
                  flags=re.S)


WITH_CODE = [page for page in PAGES if page.exists() and python_blocks(page.read_text())]
# What the variable decides is decided when Triton is imported.
ALONE = [page for page in WITH_CODE if page == README or "TRITON_INTERPRET" in "".join(python_blocks(page.read_text()))]


def check(page: Path, status: int, out: str, err: str) -> None:
    assert status == 0, err[-3000:]
    shown = re.findall(r"^```text\n(.*?)^```", page.read_text(), re.M | re.S)
    for text in shown:
        for line in text.strip().splitlines():
            assert line.strip() in out, line


@pytest.mark.parametrize("page", [pytest.param(page, marks=() if page == README else pytest.mark.slow, id=page.name)
                                  for page in ALONE])  # fmt: skip
def test_the_code_of_a_page_runs_in_a_process_of_its_own(page: Path, tmp_path: Path) -> None:
    """As a reader would type it, in an empty folder."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(python_blocks(page.read_text())))
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=600)
    check(page, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as running:
        yield running


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in ALONE], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path, runner: Runner, tmp_path: Path) -> None:
    """A process and an empty folder each as well, forked from one that has done the imports that all of them share."""
    (tmp_path / "page.py").write_text("\n".join(python_blocks(page.read_text())))
    check(page, *runner(tmp_path))


@pytest.mark.parametrize("name", [page.stem for page in sorted((DOCS / "algorithms").glob("*.md"))])
def test_an_algorithms_page_trains_that_algorithm_from_python(name: str) -> None:
    factory = {"sft": "create_sft_trainer", "reward": "create_reward_trainer"}.get(name, "create_rl_trainer")
    blocks = python_blocks((DOCS / "algorithms" / f"{name}.md").read_text())
    calls = [node for block in blocks for node in ast.walk(ast.parse(block))
             if isinstance(node, ast.Call) and getattr(node.func, "id", None) == factory]
    given = [{each.arg: each.value.value for each in call.keywords if isinstance(each.value, ast.Constant)}
             for call in calls]
    own = [options for options in given if factory != "create_rl_trainer" or options.get("algorithm") == name]
    assert own and all(options["max_steps"] <= 20 for options in own)
    assert any(".train()" in block for block in blocks)


@pytest.mark.parametrize(("code", "status", "said"), [
    ("print('well')", 0, ""), ("print('well')\n1 / 0", 1, "ZeroDivisionError"), ("import sys\nsys.exit(7)", 7, ""),
    ("import os\nos.kill(os.getpid(), 9)", -9, ""),
])
def test_a_page_that_fails_is_told(code: str, status: int, said: str, runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(code)
    found, out, err = runner(tmp_path)
    assert found == status and said in err and out == ("well\n" if "print" in code else "")


def test_the_options_page_is_the_table() -> None:
    assert OPTIONS.read_text() == options_page(), "regenerate it: python -m tests.test_docs"


def test_the_scale_of_each_algorithm_is_the_codes() -> None:
    page = CONFIGURATION.read_text()
    assert with_scale(page) == page, "write it anew: python -m tests.test_docs"
    shown = page[page.index("<!-- scale -->"):]
    listed = [name for row in re.findall(r"^\| ([a-z_, ]+) \| \d", shown, re.M) for name in row.split(", ")]
    assert sorted(listed) == sorted(ALGORITHMS.names())


def test_the_families_page_is_the_table() -> None:
    assert FAMILIES_PAGE.read_text() == families_page(), "regenerate it: python -m tests.test_docs"


def test_every_extra_for_users_is_said_where_it_is_needed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    said = "".join(path.read_text() for path in [*PAGES, *(ROOT / "aligntune").rglob("*.py")])
    for name in set(extras) - {"docs", "dev"}:
        assert f"aligntune[{name}]" in said, name


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation, page
        for target in re.findall(r"\]\(([\w./-]+\.md)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
    for name in re.findall(r": ([\w/-]+\.md)$", navigation, re.M):
        assert (DOCS / name).is_file(), name


if __name__ == "__main__":
    OPTIONS.write_text(options_page())
    FAMILIES_PAGE.write_text(families_page())
    CONFIGURATION.write_text(with_scale(CONFIGURATION.read_text()))

"""The walls of the house, held by reading the imports and the syntax tree."""

from __future__ import annotations

import ast
import re
from types import ModuleType

import pytest

from tests.source import Module, functions, imports, is_kernel, modules

MODULES = modules()
FILE_CAP, FUNCTION_CAP = 500, 60

# (files it holds for, imports that may not be there, only at module level)
WALLS = [
    (r"aligntune/algorithms/", r"(aligntune\.backends|trl|triton)\b", False),
    (r"aligntune/algorithms/", r"(torch|transformers|datasets|peft)\b", True),
    (r"aligntune/backends/trl/", r"aligntune\.backends\.fast\b", False),
    (r"aligntune/backends/[^/]+\.py", r"aligntune\.backends\.(fast|trl)\b", False),
    (r"aligntune/backends/fast/ops/", r"(trl|transformers|peft|accelerate|datasets|bitsandbytes)\b", False),
    (r"aligntune/backends/fast/ops/", r"aligntune\.(?!errors\b|backends(\.fast(\.ops)?)?\b)", False),
    (r"aligntune/data/", r"aligntune\.(backends|core\.(?!registry|options))", False),
    (r"aligntune/data/", r"(trl|triton)\b", True),
    (r"aligntune/rewards/", r"aligntune\.backends\b", False),
    (r"aligntune/(__init__|__main__|errors|_version)\.py", r"(torch|transformers|trl|datasets|peft|omegaconf)\b", True),
    (r"aligntune/core/(options|config|resolve|rules|registry|introspection|backend_factory|recipes)\.py",
     r"(torch|transformers|trl|datasets|peft)\b", True),
    (r"aligntune/cli/", r"(torch|transformers|trl|datasets|peft|matplotlib)\b", True),
]


def broken(module: Module) -> list[str]:
    found = []
    for where, what, top_only in WALLS:
        if re.match(where, module.name):
            found += [f"{module.name}:{line} imports {name}" for name, line, top in imports(module.tree)
                      if re.match(what, name) and (top or not top_only)]
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_no_wall_is_crossed(module: Module) -> None:
    assert not broken(module)


def test_the_wall_test_sees_a_broken_wall() -> None:
    bad = "import trl\ndef f():\n    from aligntune.backends.fast import attach\n"
    assert broken(Module("aligntune/algorithms/x.py", bad, ast.parse(bad)))
    assert broken(Module("aligntune/backends/trl/x.py", bad, ast.parse(bad)))
    lazy = "def f():\n    import torch\n"
    assert not broken(Module("aligntune/algorithms/x.py", lazy, ast.parse(lazy)))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_caps(module: Module) -> None:
    assert module.text.count("\n") <= FILE_CAP
    long = []
    for function in functions(module.tree):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        size = function.end_lineno - body[0].lineno + 1 if body else 0
        if size > FUNCTION_CAP and not is_kernel(function):
            long.append(f"{function.name}: {size} lines")
    assert not long


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_no_blanket_except_no_exec_no_stub(module: Module) -> None:
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            kind = ast.unparse(node.type) if node.type else "bare"
            if re.search(r"\b(bare|Exception|BaseException)\b", kind):
                found.append(f"line {node.lineno}: except {kind}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
            found.append(f"line {node.lineno}: {node.func.id}()")
        if isinstance(node, ast.Attribute) and node.attr in ("getsource", "getsourcelines"):
            found.append(f"line {node.lineno}: reads source")
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            found.append(f"line {node.lineno}: a stub")
    found += [f"line {number}: {match.group()}" for number, line in enumerate(module.text.splitlines(), 1)
              if (match := re.search(r"\b(TODO|FIXME|XXX|placeholder)\b", line))]
    assert not found


def absent(module: Module) -> list[str]:
    """Names of `torch.a.b...` that torch has not: of what only runs on a GPU no other test here would tell."""
    import torch

    found = []
    for node in ast.walk(module.tree):
        said = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        names = said.split(".") if re.fullmatch(r"torch[\w.]+", said) else []
        held: object = torch
        for name in names[1:]:
            if not isinstance(held, ModuleType):
                break
            if not hasattr(held, name):
                found.append(f"line {node.lineno}: {'.'.join(names)}")
                break
            held = getattr(held, name)
    return sorted(set(found))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_torch_has_what_is_asked_of_it(module: Module) -> None:
    assert not absent(module)


def test_a_name_that_torch_has_not_is_seen() -> None:
    bad = "import torch\ntorch.cuda.is_current_stream_capturing()\nx = torch.cuda.is_current_streamcapturing\n"
    assert absent(Module("x.py", bad, ast.parse(bad))) == ["line 3: torch.cuda.is_current_streamcapturing"]


def raised(function: ast.AST) -> set[str]:
    """Names of the errors that the function itself raises, not one that is defined in it."""
    found, waiting = set(), list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.add(ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc))
        waiting += ast.iter_child_nodes(node)
    return {name for name in found if "Error" in name and name != "AssertionError"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_public_functions_say_which_errors_they_raise(module: Module) -> None:
    if module.name.startswith("aligntune/cli/"):
        return  # a command's docstring is its --help
    silent = []
    for function in module.tree.body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_") and raised(function):
            told = ast.get_docstring(function) or ""
            if not re.search(r"\b[Rr]aises?\b", told) and not told.startswith("See "):
                silent.append(function.name)
    assert not silent


def test_version_differences_live_in_one_module() -> None:
    """Only `_compat` compares versions of upstream packages."""
    found = [m.name for m in MODULES if m.name != "aligntune/backends/_compat.py"
             and re.search(r"Version\(|version\.parse|parse_version|__version__\s*[<>]", m.text)]
    assert not found


def test_every_module_says_what_it_is() -> None:
    assert [m.name for m in MODULES if not ast.get_docstring(m.tree)] == []

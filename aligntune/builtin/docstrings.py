"""Questions and answers made from the docstrings of the running Python's standard library.

The source files are read and parsed with `ast`; nothing is imported or run. The rows are real prose of very uneven
length (4 to over 6,000 characters), which is what padding, packing and truncation have to be tried on.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

# Tests, vendored or generated code and other people's packages; names with a leading underscore are left out as well.
SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib",
     "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
QUESTIONS = {
    "module": "What is the module `{}` for?",
    "class": "What is the class `{}`?",
    "function": "What does `{}` do?",
}
TEST_SHARE = 20  # one row in 20 is held out


def description() -> str:
    """One line that says whose docstrings these are; it goes into the dataset's info."""
    return f"Docstrings of the standard library of {platform.python_implementation()} {platform.python_version()}"


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of every public module below `root`, sorted by name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        module = parts[:-1] if parts[-1] == "__init__" else parts
        if module and not any(part in SKIPPED or part.startswith("_") for part in module):
            found[".".join(module)] = path
    yield from sorted(found.items())


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(kind, qualified name, docstring) of `node` and the public classes and functions inside it, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield kind, name, ast.get_docstring(child) or ""
            if kind == "class":  # functions inside functions cannot be asked about by name
                yield from _definitions(child, name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _definitions(child, prefix)


def _questions(root: Path) -> Iterator[tuple[str, str, str]]:
    """(qualified name, question, answer); the first definition wins where `if`/`else` define a name twice."""
    seen = set()
    for module, path in _sources(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # files kept broken on purpose, in some distributions
        entries = [("module", module, ast.get_docstring(tree) or ""), *_definitions(tree, module)]
        for kind, name, text in entries:
            if text.strip() and name not in seen:
                seen.add(name)
                yield name, QUESTIONS[kind].format(name), text.strip()


@lru_cache(maxsize=2)
def _all(root: Path) -> tuple[tuple[str, str, str], ...]:
    return tuple(_questions(root))


def chat_rows(split: str, root: Path | None = None) -> list[dict[str, Any]]:
    """`messages`: a question about a name and its docstring; "test" holds one row in 20, chosen by a hash of the name.

    Args:
        split: "train" or "test".
        root: the folder to read; default: the running Python's standard library.
    """
    rows = []
    for name, question, answer in _all(root or Path(sysconfig.get_paths()["stdlib"])):
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % TEST_SHARE == 0
        if held_out == (split == "test"):
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows

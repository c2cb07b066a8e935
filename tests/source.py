"""The package's own source as the wall, cap and surface tests read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aligntune"


@dataclass(frozen=True)
class Module:
    """One file of the package, parsed; `name` is its path from the repository's root, with slashes."""

    name: str
    text: str
    tree: ast.Module


def modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Module(path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    return found


def imports(tree: ast.AST, *, type_checking: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at module level) of each import; those under `if TYPE_CHECKING` only when asked for."""
    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, top
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"relative import, line {child.lineno}"
                yield child.module or "", child.lineno, top
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", child.lineno, top
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING") and not type_checking:
                for other in child.orelse:
                    yield from walk(other, top)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, top and not inside)

    yield from walk(tree, True)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(item) or ast.unparse(item) == "kernel" or ast.unparse(item).endswith(".kernel")
               for item in function.decorator_list)

"""Breaks losses, op wrappers and masks on purpose, one place at a time, and counts how often the tests notice.

    python -m tests.mutation --sample 40            # 40 mutants drawn over all targets
    python -m tests.mutation --target mask          # every mutant of one target
    python -m tests.mutation --list                 # how many there are

The package and its tests are copied to a temporary folder and broken there. A mutant is killed if a test fails, or does
not end in time; those that no test notices are listed with their line. Some of these change nothing that matters (a
message, a size that is rounded up anyway): they are read, not counted away.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = "aligntune/backends/fast/ops"
TESTS = "tests/backends/fast"

# target: (file, tests that should notice)
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "policy_gradient": ("aligntune/algorithms/policy_gradient.py", ("tests/algorithms",)),
    "log_probs": ("aligntune/algorithms/log_probs.py", ("tests/algorithms",)),
    "ppo": ("aligntune/algorithms/ppo.py", ("tests/algorithms",)),
    "mask": ("aligntune/data/mask.py", ("tests/data/test_mask.py", "tests/data/test_trl_parity.py")),
    "packing": ("aligntune/backends/fast/packing.py", (f"{TESTS}/test_rows_end_to_end.py",)),
    "rms_norm": (f"{OPS}/rms_norm.py", (f"{TESTS}/ops/test_rms_norm.py",)),
    "rope": (f"{OPS}/rope.py", (f"{TESTS}/ops/test_rope.py",)),
    "glu": (f"{OPS}/glu.py", (f"{TESTS}/ops/test_glu.py",)),
    "cross_entropy": (f"{OPS}/cross_entropy.py", (f"{TESTS}/ops/test_cross_entropy.py",)),
    "head": (f"{OPS}/head.py", (f"{TESTS}/ops/test_head.py", f"{TESTS}/test_head_contract.py")),
    "adamw": (f"{OPS}/adamw.py", (f"{TESTS}/ops/test_adamw.py",)),
    "lora": (f"{OPS}/lora.py", (f"{TESTS}/ops/test_lora.py", f"{TESTS}/ops/test_lora_mlp.py")),
    "compare_stats": ("aligntune/compare/stats.py", ("tests/compare/test_stats.py",)),
    "compare_batches": ("aligntune/compare/batches.py", ("tests/compare/test_batches.py",)),
    "compare_gradients": ("aligntune/compare/gradients.py", ("tests/compare/test_report.py",)),
}
KINDS = ("sign", "scale", "off by one", "dropped term", "mean for sum")
_SLOWEST = 600


@dataclass(frozen=True)
class Mutant:
    """One broken place: the module's text with it, and what was there before."""

    target: str
    kind: str
    line: int
    before: str
    after: str
    source: str


def mutants(source: str, target: str = "") -> Iterator[Mutant]:
    """Every mutant of a module's functions; messages, assertions and annotations stay as they are."""
    for kind in KINDS:
        number = 0
        while True:
            tree = ast.parse(source)
            breaker = Breaker(kind, number)
            breaker.visit(tree)
            if breaker.broken is None:
                break
            line, before, after = breaker.broken
            yield Mutant(target, kind, line, before, after, ast.unparse(ast.fix_missing_locations(tree)))
            number += 1


class Breaker(ast.NodeTransformer):
    """Breaks the `number`-th place of its kind."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number
        self.broken: tuple[int, str, str] | None = None
        self.inside = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.inside += 1
        documented = ast.get_docstring(node) is not None
        node.body = [*node.body[:documented], *(self.visit(one) for one in node.body[documented:])]
        self.inside -= 1
        return node

    def _as_it_is(self, node: ast.AST) -> ast.AST:
        return node

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Global = _as_it_is

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        after = self._break(node) if self.inside and self.broken is None else None
        if after is not None:
            if self.left == 0:
                self.broken = (getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(after))
                return ast.copy_location(after, node)
            self.left -= 1
        return super().generic_visit(node)

    def _break(self, node: ast.AST) -> ast.AST | None:
        """The broken node, or None where this is no place of the kind."""
        if self.kind == "sign":
            return _other_sign(node)
        if self.kind == "scale" and isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            other: ast.operator = ast.Div() if isinstance(node.op, ast.Mult) else ast.Mult()
            return ast.BinOp(node.left, other, node.right)
        if self.kind == "off by one":
            return _off_by_one(node)
        if self.kind == "dropped term" and isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            return None if _text(node) else node.left
        if self.kind == "mean for sum" and isinstance(node, ast.Attribute) and node.attr in ("sum", "mean"):
            return ast.Attribute(node.value, "mean" if node.attr == "sum" else "sum", node.ctx)
        return None


def _other_sign(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        return node.operand
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and not _text(node):
        return ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)
    return None


def _off_by_one(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        swap: dict[type, ast.cmpop] = {ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt()}
        if type(node.ops[0]) in swap:
            return ast.Compare(node.left, [swap[type(node.ops[0])]], node.comparators)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
        return ast.Subscript(node.value, ast.Constant(node.slice.value + 1), node.ctx)
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None:
                moved = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                return ast.Slice(**{"lower": node.lower, "upper": node.upper, "step": node.step, name: moved})
    return None


def _text(node: ast.BinOp) -> bool:
    """Strings and lists are put together with + too; breaking those is a crash, not a wrong number."""
    return any(isinstance(one, (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict)) or
               (isinstance(one, ast.Constant) and isinstance(one.value, str)) for one in ast.walk(node))


def copy_of_the_package(folder: Path) -> Path:
    """The package, its tests and their settings, in a folder of their own."""
    for name in ("aligntune", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in ("pyproject.toml", "README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: tuple[str, ...], *, seconds: float) -> bool:
    """Whether the tests pass in that copy; False too if they do not end in time."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                   "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def check_mutant(folder: Path, mutant: Mutant, *, seconds: float) -> bool:
    """Whether the tests notice; the file is whole again afterwards."""
    path, tests = TARGETS[mutant.target]
    whole = (folder / path).read_text(encoding="utf-8")
    (folder / path).write_text(mutant.source, encoding="utf-8")
    try:
        return not run_tests(folder, tests, seconds=seconds)
    finally:
        (folder / path).write_text(whole, encoding="utf-8")


def every_mutant(targets: list[str]) -> list[Mutant]:
    """All mutants of these targets."""
    return [mutant for target in targets for mutant in mutants((ROOT / TARGETS[target][0]).read_text(), target)]


def main() -> None:
    """Draw, break, test, report; exits with 1 if fewer than --at-least of the mutants are killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[*TARGETS])
    parser.add_argument("--sample", type=int, help="draw this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.8, help="share that must be killed")
    parser.add_argument("--out", type=Path, help="write the outcome as JSON")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    targets = [name for name in given.target or TARGETS if (ROOT / TARGETS[name][0]).is_file()]
    found = every_mutant(targets)
    if given.list:
        for target in targets:
            print(f"{target}: {sum(one.target == target for one in found)}")
        return
    if given.sample is not None and given.sample < len(found):
        found = random.Random(given.seed).sample(found, given.sample)
    survivors = _try_all(found)
    share = 1 - len(survivors) / max(len(found), 1)
    print(f"{len(found) - len(survivors)} of {len(found)} killed: {share:.0%}")
    for one in survivors:
        print(f"survived: {TARGETS[one.target][0]}:{one.line}: {one.kind}: {one.before}  ->  {one.after}")
    if given.out is not None:
        rows = [{name: value for name, value in asdict(one).items() if name != "source"} for one in survivors]
        given.out.write_text(json.dumps({"mutants": len(found), "killed": share, "survivors": rows}, indent=1) + "\n")
    sys.exit(share < given.at_least)


def _try_all(found: list[Mutant]) -> list[Mutant]:
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = copy_of_the_package(Path(name))
        for target in sorted({one.target for one in found}):
            start = time.monotonic()
            if not run_tests(folder, TARGETS[target][1], seconds=_SLOWEST):
                sys.exit(f"{target}: its tests fail on the whole package; nothing can be said")
            patience = 30 + 4 * (time.monotonic() - start)
            for one in (one for one in found if one.target == target):
                killed = check_mutant(folder, one, seconds=patience)
                outcome = "killed  " if killed else "SURVIVED"
                print(f"{outcome} {target}:{one.line} {one.kind}: {one.before} -> {one.after}", flush=True)
                if not killed:
                    survivors.append(one)
    return survivors


if __name__ == "__main__":
    main()

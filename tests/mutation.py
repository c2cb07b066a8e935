"""Breaks losses, op wrappers and masks on purpose, one place at a time, and counts how often the tests notice.

    python -m tests.mutation --sample 160           # 160 mutants, as many of each target as of the others
    python -m tests.mutation --target mask          # every mutant of one target
    python -m tests.mutation --list                 # how many there are
    python -m tests.mutation --report               # a section a target in tests/reports/mutation.json, made anew

The package and its tests are copied to a temporary folder and broken there. A mutant is killed if a test fails, or does
not end in time; those that no test notices are listed with their line. Some of these change nothing that matters (a
message, a size that is rounded up anyway): they are read, not counted away. The tests run on the CPU, kernels in
Triton's interpreter: what only a GPU reaches survives here.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import gc
import importlib
import json
import os
import platform
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "reports" / "mutation.json"
OPS = "aligntune/backends/fast/ops"
TESTS = "tests/backends/fast"
ALGORITHMS = "aligntune/algorithms"
OFFLINE = ("tests/algorithms/test_offline_losses.py",)
REPORTED = "tests/compare/test_report.py"

# target: (file, tests that should notice)
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "policy_gradient": (f"{ALGORITHMS}/policy_gradient.py", ("tests/algorithms/test_policy_gradient.py",)),
    "log_probs": (f"{ALGORITHMS}/log_probs.py", (*OFFLINE, "tests/algorithms/test_policy_gradient.py")),
    "ppo": (f"{ALGORITHMS}/ppo.py", ("tests/algorithms/test_ppo.py",)),
    "dpo": (f"{ALGORITHMS}/dpo.py", OFFLINE),
    "kto": (f"{ALGORITHMS}/kto.py", OFFLINE),
    "cpo": (f"{ALGORITHMS}/cpo.py", OFFLINE),
    "orpo": (f"{ALGORITHMS}/orpo.py", OFFLINE),
    "reward": (f"{ALGORITHMS}/reward.py", OFFLINE),
    "mask": ("aligntune/data/mask.py", ("tests/data/test_mask.py", "tests/data/test_trl_parity.py")),
    "packing": ("aligntune/backends/fast/packing.py", (f"{TESTS}/test_rows_end_to_end.py",)),
    "rms_norm": (f"{OPS}/rms_norm.py", (f"{TESTS}/ops/test_rms_norm.py",)),
    "rope": (f"{OPS}/rope.py", (f"{TESTS}/ops/test_rope.py",)),
    "glu": (f"{OPS}/glu.py", (f"{TESTS}/ops/test_glu.py",)),
    "cross_entropy": (f"{OPS}/cross_entropy.py", (f"{TESTS}/ops/test_cross_entropy.py",)),
    "head": (f"{OPS}/head.py", (f"{TESTS}/ops/test_head.py", f"{TESTS}/test_head_contract.py")),
    "adamw": (f"{OPS}/adamw.py", (f"{TESTS}/ops/test_adamw.py",)),
    "nf4": (f"{OPS}/nf4.py", (f"{TESTS}/ops/test_nf4.py",)),
    "decode_attention": (f"{OPS}/decode_attention.py", (f"{TESTS}/ops/test_decode_attention.py",)),
    "lora_dropout": (f"{OPS}/_lora_dropout.py", (f"{TESTS}/ops/test_lora_dropout.py",)),
    "rotary": (f"{OPS}/_rotary.py", (f"{TESTS}/ops/test_rope.py",)),
    "logits_pass": (f"{OPS}/_logits_pass.py", (f"{TESTS}/ops/test_logits_pass.py",)),
    "lora_core": (f"{OPS}/_lora_core.py", (f"{TESTS}/ops/test_lora_read_once.py", f"{TESTS}/ops/test_lora.py",
                                           f"{TESTS}/ops/test_lora_mlp.py")),
    "lora_up": (f"{OPS}/lora_up.py", (f"{TESTS}/ops/test_lora_up.py",)),
    "segment_attention": (f"{OPS}/segment_attention.py", (f"{TESTS}/ops/test_segment_attention.py",)),
    "segment_kernels": (f"{OPS}/_segment_kernels.py", (f"{TESTS}/ops/test_segment_attention.py",)),
    "tensor_lists": (f"{OPS}/tensor_lists.py", (f"{TESTS}/ops/test_tensor_lists.py",)),
    "sample": (f"{OPS}/sample.py", (f"{TESTS}/ops/test_sample.py",)),
    "fp8": (f"{OPS}/fp8.py", (f"{TESTS}/ops/test_fp8.py",)),
    "attention": (f"{OPS}/attention.py", (f"{TESTS}/ops/test_attention.py",)),
    "decode_linear": (f"{OPS}/decode_linear.py", (f"{TESTS}/ops/test_decode_linear.py",)),
    "decode_linear_nf4": (f"{OPS}/decode_linear_nf4.py", (f"{TESTS}/ops/test_decode_linear_nf4.py",)),
    "nucleus": (f"{OPS}/nucleus.py", (f"{TESTS}/ops/test_nucleus.py",)),
    "lora": (f"{OPS}/lora.py", (f"{TESTS}/ops/test_lora.py", f"{TESTS}/ops/test_lora_mlp.py")),
    "compare_stats": ("aligntune/compare/stats.py", ("tests/compare/test_stats.py",)),
    "compare_batches": ("aligntune/compare/batches.py", ("tests/compare/test_batches.py",)),
    "compare_findings": ("aligntune/compare/findings.py", ("tests/compare/test_findings.py", REPORTED)),
    "compare_measure": ("aligntune/compare/measure.py", ("tests/compare/test_measure.py", REPORTED)),
    "compare_gradients": ("aligntune/compare/gradients.py", ("tests/compare/test_gradients.py",)),
}
KINDS = ("sign", "scale", "off by one", "dropped term", "mean for sum")
_SLOWEST = 600


@dataclass(frozen=True)
class Mutant:
    """One broken place: the `number`-th of its kind, and what stands there before and after."""

    target: str
    kind: str
    number: int
    line: int
    before: str
    after: str

    def source(self, whole: str) -> str:
        """The module's text with this place broken."""
        tree = ast.parse(whole)
        Breaker(self.kind, self.number).visit(tree)
        return ast.unparse(ast.fix_missing_locations(tree))


def mutants(source: str, target: str = "") -> Iterator[Mutant]:
    """Every mutant of a module's functions; messages, assertions and annotations stay as they are."""
    for kind in KINDS:
        every = Breaker(kind)
        every.visit(ast.parse(source))
        for number, place in enumerate(every.places):
            yield Mutant(target, kind, number, *place)


class Breaker(ast.NodeTransformer):
    """Lists the places of its kind (line, before, after) and breaks the `number`-th, if one is wanted."""

    def __init__(self, kind: str, number: int | None = None) -> None:
        self.kind, self.number = kind, number
        self.places: list[tuple[int, str, str]] = []
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
        after = self._break(node) if self.inside else None
        if after is not None:
            self.places.append((getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(after)))
            if len(self.places) - 1 == self.number:
                return ast.copy_location(after, node)
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
    """Whether the tests pass in that copy; False too if they do not end in time.

    In a fork of this process, which has imported torch and the rest before: that is most of what a short file costs.
    """
    child = os.fork()
    if child == 0:
        _become_the_tests(folder, tests)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _become_the_tests(folder: Path, tests: tuple[str, ...]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("aligntune", "tests", "benchmarks")]:
            del sys.modules[name]
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
                       "TRITON_CACHE_DIR": str(folder / "triton")}
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    finally:
        os._exit(code)


def import_what_tests_import() -> None:
    """Everything heavy but the package itself, as tests/conftest.py would have it."""
    from tests import conftest  # noqa: F401  sets the interpreter and the threads

    for name in ("torch", "triton", "transformers", "peft", "trl", "datasets", "pytest"):
        importlib.import_module(name)
    gc.freeze()


def check_mutant(folder: Path, mutant: Mutant, *, seconds: float) -> bool:
    """Whether the tests notice; the file is whole again afterwards."""
    path, tests = TARGETS[mutant.target]
    whole = (folder / path).read_text(encoding="utf-8")
    (folder / path).write_text(mutant.source(whole), encoding="utf-8")
    try:
        return not run_tests(folder, tests, seconds=seconds)
    finally:
        (folder / path).write_text(whole, encoding="utf-8")


def drawn(targets: Sequence[str], count: int | None, seed: int) -> dict[str, list[Mutant]]:
    """Mutants by target; with `count` so many in all, in turn from each target, at random within it."""
    left = {target: list(mutants((ROOT / TARGETS[target][0]).read_text(), target)) for target in targets}
    if count is None:
        return left
    for target, found in left.items():
        random.Random(f"{seed} {target}").shuffle(found)  # by name: a target's draw does not depend on the others
    chosen: dict[str, list[Mutant]] = {target: [] for target in targets}
    while count and any(left.values()):
        for target in targets:
            if count and left[target]:
                chosen[target].append(left[target].pop())
                count -= 1
    return chosen


def try_target(target: str, found: Sequence[Mutant], copies: queue.Queue[Path], workers: int) -> list[Mutant]:
    """The mutants that no test notices, after a run of the tests on the whole package."""
    start = time.monotonic()
    first = copies.get()
    try:
        if not run_tests(first, TARGETS[target][1], seconds=_SLOWEST):
            sys.exit(f"{target}: its tests fail on the whole package; nothing can be said")
    finally:
        copies.put(first)
    patience = 30 + 4 * workers * (time.monotonic() - start)

    def survives(one: Mutant) -> bool:
        folder = copies.get()
        try:
            killed = check_mutant(folder, one, seconds=patience)
        finally:
            copies.put(folder)
        outcome = "killed  " if killed else "SURVIVED"
        print(f"{outcome} {target}:{one.line} {one.kind}: {one.before} -> {one.after}", flush=True)
        return not killed

    with ThreadPoolExecutor(workers) as pool:
        return [one for one, lives in zip(found, pool.map(survives, found), strict=True) if lives]


def section(target: str, tried: Sequence[Mutant], survivors: Sequence[Mutant], *, seed: int | None) -> dict[str, Any]:
    """What the report holds of a target."""
    path, tests = TARGETS[target]
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "file": path, "tests": list(tests), "date": str(datetime.date.today()), "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "triton")}},
        "mutants": len(list(mutants((ROOT / path).read_text()))), "seed": seed, "tried": len(tried),
        "killed": len(tried) - len(survivors),
        "survivors": [f"{path}:{one.line}: {one.kind}: {one.before}  ->  {one.after}"
                      for one in sorted(survivors, key=lambda one: one.line)],
    }


def totals(targets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report: what all its targets come to, then each."""
    tried, killed = (sum(one[name] for one in targets.values()) for name in ("tried", "killed"))
    return {"tried": tried, "killed": killed, "share": round(killed / max(tried, 1), 4),
            "targets": dict(sorted(targets.items()))}


def main() -> None:
    """Draw, break, test, report; exits with 1 if fewer than --at-least of the mutants are killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[*TARGETS])
    parser.add_argument("--sample", type=int, help="draw this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.8, help="share that must be killed")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--report", action="store_true", help=f"write these targets' sections of {REPORT.name}")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    found = drawn(given.target or list(TARGETS), given.sample, given.seed)
    if given.list:
        for target, ones in found.items():
            print(f"{target}: {len(ones)}")
        return
    import_what_tests_import()
    done: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(given.workers):
            copies.put(copy_of_the_package(Path(name, str(number))))
        for target, ones in found.items():
            survivors = try_target(target, ones, copies, given.workers)
            done[target] = section(target, ones, survivors, seed=None if given.sample is None else given.seed)
            if given.report:  # after each target: what is done stays done
                before = json.loads(REPORT.read_text())["targets"] if REPORT.is_file() else {}
                REPORT.parent.mkdir(exist_ok=True)
                REPORT.write_text(json.dumps(totals({**before, target: done[target]}), indent=1) + "\n")
    outcome = totals(done)
    print(f"{outcome['killed']} of {outcome['tried']} killed: {outcome['share']:.0%}")
    for one in done.values():
        print("\n".join(f"survived: {line}" for line in one["survivors"]))
    sys.exit(outcome["share"] < given.at_least)


if __name__ == "__main__":
    main()

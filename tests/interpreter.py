"""Triton's interpreter without two look-ups that it makes anew each time: a sixth of all CPU time of these tests.

What a kernel computes is the same. Processes that tests start have the interpreter as it is.
"""

from __future__ import annotations

import inspect
from typing import Any


def quicken() -> None:
    """Keep, from the first time on, which names of `triton.language` are builtins, and the NumPy type of each type.

    A Triton that has no such function under its name here is left as it is.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_aligntune_quick"):
        interpreter._aligntune_quick = True
        if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
            _keep_builtins(interpreter)
        if hasattr(interpreter, "_get_np_dtype"):
            _keep_dtypes(interpreter)


def _keep_builtins(interpreter: Any) -> None:
    """At each launch, and at each call of a `@triton.jit` helper in it, every name of the language was looked through.

    Those that an outer call has replaced already are no builtins to the original either.
    """
    builtins: dict[Any, list[tuple[str, Any]]] = {}
    is_builtin = interpreter.tl.core.is_builtin

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in builtins:
            builtins[package] = [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


def _keep_dtypes(interpreter: Any) -> None:
    """A table of eighteen types, whose hashes are Python's, was made for each array."""
    found: dict[str, Any] = {}
    make, block = interpreter._get_np_dtype, interpreter.tl.block_type

    def get_np_dtype(kind: Any) -> Any:
        kind = kind.element_ty if isinstance(kind, block) else kind
        if kind.name not in found:
            found[kind.name] = make(kind)
        return found[kind.name]

    interpreter._get_np_dtype = get_np_dtype

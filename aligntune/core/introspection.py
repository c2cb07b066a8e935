"""What can be asked before anything is trained: backends, algorithms, and who runs what, why or why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligntune.algorithms import ALGORITHMS
from aligntune.backends import BACKENDS
from aligntune.backends.base import Gate, supports
from aligntune.core.options import OptionInfo, infos
from aligntune.core.registry import Support
from aligntune.core.resolve import option_table
from aligntune.errors import ConfigError


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is the text for people."""

    backend: str
    algorithm: str
    title: str
    paper: str
    support: Support
    available: Support
    takes: str
    gates: tuple[str, ...]
    options: tuple[OptionInfo, ...]
    defaults: dict[str, Any]
    differs: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.algorithm} on {self.backend}: {self.support}", f"  {self.title} ({self.paper})"]
        if self.support:
            lines.append(f"  on this machine: {self.available}")
        lines.append(f"  data: {self.takes}")
        lines += [f"  not with {gate}" for gate in self.gates]
        lines.append("  options of its own:")
        lines += [f"    {row.name} = {row.default!r}: {row.help}" for row in self.options]
        if self.defaults:
            lines.append("  its defaults for common options:")
            lines += [f"    {name} = {value!r}" for name, value in self.defaults.items()]
        if self.differs:
            lines.append("  differs from TRL's own defaults:")
            lines += [f"    - {line}" for line in self.differs]
        return "\n".join(lines)


TAKES = {
    "sft": "text, messages, Alpaca rows, prompt-completion pairs; of preference pairs the chosen side",
    "preference": "preference pairs: prompt, chosen, rejected (strings or messages; the prompt may be inside both)",
    "prompts": "prompts, with what the rewards read (a reference answer, say); preference pairs give their prompts",
    "unpaired": "prompt, completion and a label, good or bad; preference pairs give one of each",
    "reward": "preference pairs: prompt, chosen, rejected; a column margin says by how much chosen is better",
}


def list_backends() -> list[str]:
    """The names of the backends."""
    return BACKENDS.names()


def list_algorithms() -> list[str]:
    """The names of the algorithms."""
    return ALGORITHMS.names()


def explain(backend: str, algorithm: str) -> Explanation:
    """Whether and how `backend` runs `algorithm`, on any machine and on this one.

    Raises:
        ConfigError: unknown names, both at once, each with the nearest valid one.
    """
    faults = []
    for registry, name in ((BACKENDS, backend), (ALGORITHMS, algorithm)):
        try:
            registry.resolve(getattr(name, "value", name))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError.from_faults(faults, "explain")
    engine = BACKENDS.load(getattr(backend, "value", backend))
    spec = ALGORITHMS.load(algorithm)
    verdict = supports(engine, spec.name)
    own = tuple(infos(spec.options, "loss"))
    gates = tuple(f"{gate}: {gate.reason}" for gate in engine.gates if _concerns(gate, spec.name))
    return Explanation(
        engine.name, spec.name, spec.title, spec.paper, verdict, engine.available() if verdict else verdict,
        TAKES[spec.takes], gates, own, dict(spec.defaults), spec.differences,
    )


def _concerns(gate: Gate, algorithm: str) -> bool:
    """Whether the algorithm's options, or the fields of `trainer_options` that it takes, can have a gated value."""
    if gate.algorithms is not None:
        return gate.may_meet(algorithm)
    return gate.option in option_table(algorithm) or gate.option not in option_table(None)

"""What a backend is: it says what it can do here, and builds a trainer for a resolved job."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aligntune.core.registry import Support
from aligntune.core.rules import asked
from aligntune.errors import BackendUnavailableError, UnsupportedAlgorithmError

if TYPE_CHECKING:
    from transformers import Trainer

    from aligntune.core.resolve import Job


@dataclass(frozen=True)
class Gate:
    """Option values that a backend does not run although it runs the algorithm; None stands for any but null.

    `algorithms`: those that take such values, by the option or by `trainer_options`; None: all that have the option, or
    any where no algorithm has it and it is a field of transformers' arguments.
    """

    option: str
    values: tuple[Any, ...] | None
    reason: str
    algorithms: tuple[str, ...] | None = None

    def may_meet(self, algorithm: str | None) -> bool:
        """Whether options of this algorithm are looked at; None is any."""
        return algorithm is None or self.algorithms is None or algorithm in self.algorithms

    def meets(self, options: Mapping[str, Any]) -> bool:
        """Whether these option values are gated."""
        value = options.get(self.option)
        if self.values is None:
            return value is not None
        values = value if isinstance(value, list) else [value]
        return any(item in self.values for item in values)

    def __str__(self) -> str:
        return self.option if self.values is None else f"{self.option}={' or '.join(map(repr, self.values))}"


@dataclass
class Prepared:
    """What stands before the backend's work: the tokenizer and the data the model will see."""

    tokenizer: Any
    train: Any
    eval: Any
    report: Any = None


class Generator(Protocol):
    """What generates for `AlignTrainer.generate` in the place of transformers."""

    def declines(self, options: Mapping[str, Any], longest: int) -> str | None:
        """Why it does not take these options of transformers, for prompts of up to `longest` tokens, or None."""
        ...

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], options: Mapping[str, Any], *, batch_size: int, seed: int | None
    ) -> list[list[int]]: ...


@dataclass
class Built:
    """A trainer ready to train, how to ask what really ran in it, and what generates with its model."""

    trainer: Trainer
    attestation: Callable[[], dict[str, Any]] | None = None
    notices: list[str] = field(default_factory=list)
    generator: Generator | None = None


class Backend(Protocol):
    """One engine. `supports` and `gates` are data and import nothing heavy; `available` may look at the machine."""

    name: str
    support: Mapping[str, Support]
    gates: tuple[Gate, ...]

    def available(self) -> Support: ...

    def build(self, job: Job, prepared: Prepared) -> Built: ...


def supports(backend: Backend, algorithm: str) -> Support:
    """Whether `backend` runs `algorithm` on a machine that suits it."""
    return backend.support.get(algorithm, Support("unsupported", f"backend {backend.name!r} has no {algorithm!r}"))


def gate_of(
    backend: Backend, options: Mapping[str, Any], algorithm: str | None = None
) -> tuple[Gate, Any] | None:
    """The gate that these options, `trainer_options` among them, meet, and the value that meets it; or None.

    `algorithm`: whose options they are; None passes no gate over.
    """
    given = asked(options)
    gates = (gate for gate in backend.gates if gate.may_meet(algorithm) and gate.meets(given))
    return next(((gate, given[gate.option]) for gate in gates), None)


def refuse_gated(backend: Backend, options: Mapping[str, Any], algorithm: str | None = None) -> None:
    """Raise where these options, `trainer_options` among them, meet a gate, as `gate_of` finds it.

    Raises:
        UnsupportedAlgorithmError: names the option, its value and the gate's reason.
    """
    gated = gate_of(backend, options, algorithm)
    if gated is not None:
        gate, value = gated
        raise UnsupportedAlgorithmError(f"backend={backend.name!r}, {gate.option}={value!r}: {gate.reason}")


def require(backend: Backend, algorithm: str, options: Mapping[str, Any]) -> None:
    """Raise unless `backend` runs this algorithm with these options here; what is decided comes before what is absent.

    Raises:
        UnsupportedAlgorithmError: by decision, GPU or not.
        BackendUnavailableError: this machine lacks something; says what would help.
    """
    verdict = supports(backend, algorithm)
    if verdict.status == "unsupported":
        raise UnsupportedAlgorithmError(f"backend={backend.name!r}, algorithm={algorithm!r}: {verdict.reason}")
    refuse_gated(backend, options, algorithm)
    for state in (verdict, backend.available()):
        if not state:
            raise BackendUnavailableError(f"backend={backend.name!r} {state}")
    _require_packages(options)
    _require_trackers(options)
    _require_vllm(options)


_PACKAGES = {"deepspeed": ("deepspeed", "deepspeed"), "use_liger_kernel": ("liger_kernel", "liger-kernel")}
"""Field of transformers' arguments -> the module that it needs, and what installs it."""


def _require_packages(options: Mapping[str, Any]) -> None:
    """As `_require_vllm`."""
    given = asked(options)
    for name, (module, package) in _PACKAGES.items():
        if given.get(name) and importlib.util.find_spec(module) is None:
            raise BackendUnavailableError(f"trainer_options {name}={given[name]!r}: {module} is not installed here; "
                                          f"pip install {package}")


_TRACKERS = {"wandb": "'aligntune[wandb]'", "comet_ml": "comet-ml"} | {
    name: name for name in ("mlflow", "neptune", "trackio", "codecarbon", "clearml", "dagshub", "dvclive", "swanlab")}
"""Tracker of transformers, and the module that it needs -> what installs it."""


def _require_trackers(options: Mapping[str, Any]) -> None:
    """As `_require_vllm`; names that transformers does not know are a fault of the options already."""
    wanted = asked(options).get("report_to")
    for name in [wanted] if isinstance(wanted, str) else wanted or ():
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            raise BackendUnavailableError(f"report_to={name!r}: {name} is not installed here; "
                                          f"pip install {_TRACKERS[name]}")


def _require_vllm(options: Mapping[str, Any]) -> None:
    """TRL would find out when its trainer is made: with the data read, the model loaded, earlier stages trained."""
    if "rollout_engine" not in options:  # an algorithm that does not generate
        return
    how = "rollout_engine='vllm'" if options["rollout_engine"] == "vllm" else "trainer_options use_vllm=True"
    wanted = options["rollout_engine"] == "vllm" or asked(options).get("use_vllm") is True
    if wanted and importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError(f"{how}: vLLM is not installed here, and a server is spoken to through it too; "
                                      "pip install 'aligntune[vllm]'")

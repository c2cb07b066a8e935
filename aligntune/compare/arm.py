"""One arm of a comparison, in its own process: `python -m aligntune.compare.arm SPEC.json`.

The spec says what to train and what to write down; `arm.json` beside it is the result, `log.txt` what was said.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aligntune.core.garbage import uncollected
from aligntune.errors import AlignTuneError, ComparisonError, ConfigError, GpuMemoryError

_TRACED = 4  # within the warm-up, after compilation; fast attests this one, and the next is traced
RESULT, GRADIENTS, PROBE = "arm.json", "gradients.safetensors", "probe.safetensors"
SPEC, LOG, GO = "spec.json", "log.txt", "go"
"""What an arm is told, what it says, and the file that one which waits is waiting for."""


@dataclass
class ArmSpec:
    """What one process trains.

    Args:
        label: the arm's name in the report.
        role: "a", "b", "oracle" or "yardstick".
        repeat: which repeat, from 0.
        config: the recipe, as a mapping.
        overrides: options over it: the user's, then the arm's own.
        folder: where its run and results lie.
        seed: of weights, data order and sampling.
        started: `time.time()` when the process was started.
        setup: "module:function" called with the built AlignTrainer before training, or None.
        peer: a name of `peers.PEERS`, or None for a backend of ours.
        gradient_steps: steps whose gradients are kept.
        stop_after: end after this step.
        probe: look for leaks between documents at the second step, and keep the final model's distribution on the
            probe rows.
        hypotheses: the first step's loss under likely mistakes (the oracle's task).
        fill: train on rows of exactly max_seq_length random tokens.
        draw_adapters: start LoRA from `peers.draw_adapters`: an arm of the comparison makes its own.
        waits: after its imports, wait for the file `GO` in the folder; the process that makes it, or 0.
    """

    label: str
    role: str
    repeat: int
    config: dict[str, Any]
    overrides: dict[str, Any]
    folder: str
    seed: int
    started: float = 0.0
    setup: str | None = None
    peer: str | None = None
    gradient_steps: list[int] = field(default_factory=lambda: [1])
    stop_after: int | None = None
    probe: bool = True
    hypotheses: bool = False
    fill: bool = False
    draw_adapters: bool = False
    waits: int = 0


def run_arm(spec: ArmSpec, package: Any = None) -> dict[str, Any]:
    """Train the arm in this process and return what `arm.json` holds; `package` is the peer's module, if it is one.

    Raises:
        AlignTuneError: whatever building or training raises on purpose.
    """
    laps = Laps(spec.started)
    with uncollected():  # the collector walks all of what imports make, again and again, for a third of their time
        from transformers import set_seed

        from aligntune.backends.trl import build as _  # noqa: F401  every arm's, and half a second
        from aligntune.compare import batches, fits, peers, probes
        from aligntune.compare.recorder import Recorder, save_gradients
        from aligntune.core.trainer import peak_memory

    laps.end("imports")
    folder = Path(spec.folder)
    if spec.waits:
        wait_for(folder / GO, spec.waits)
        laps.end("waited")
        spec.started += laps.seconds["waited"]  # whose cold start that is no part of
    set_seed(spec.seed)
    trainer = peers.build(spec, package)
    inner = trainer.trainer
    inner.args.save_strategy, inner.args.eval_strategy = "no", "no"
    if spec.fill:
        fits.fill(trainer)
    if spec.draw_adapters:
        peers.draw_adapters(trainer.model, spec.seed)
    if spec.setup is not None:
        attribute(spec.setup)(trainer)
    rows = batches.rows_digest(inner.train_dataset, packed=bool(getattr(inner.args, "packing", False)))
    recorder = Recorder(inner, started=spec.started, gradient_steps=tuple(spec.gradient_steps),
                        stop_after=spec.stop_after,
                        trace_step=_trace_step(spec, trainer))
    extra: dict[str, Any] = {"leak": None, "hypotheses": None, "probe": None}
    recorder.before_forward = _questions(spec, trainer, recorder, extra)
    recorder.install()
    laps.end("build")
    start = time.time()
    try:
        trainer.train()
    finally:
        recorder.remove()
    recorder.finish()
    laps.end("train")
    peaks = peak_memory()
    save_gradients(recorder, folder / GRADIENTS)
    if spec.probe:
        try:
            probes.save_distributions(trainer.model, probes.probe_rows(trainer), folder / PROBE)
        except (NotImplementedError, AttributeError, TypeError) as error:
            if spec.peer is None:
                raise
            extra["probe"] = f"{type(error).__name__}: {error}"  # a peer's model that hands out no logits
    found = {"dataset": rows, "memory": {**recorder.memory, **peaks}, "train_window": [start, time.time()],
             **_told(spec, trainer, recorder), **extra}
    laps.end("rest")
    return {**found, "laps": laps.seconds}


def wait_for(path: Path, process: int) -> None:
    """Return once the file is there.

    Args:
        process: the id of the one that makes it.

    Raises:
        ComparisonError: that process has ended.
    """
    while not path.exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError as error:
            raise ComparisonError("the process that started this arm has ended") from error
        time.sleep(0.01)


def _told(spec: ArmSpec, trainer: Any, recorder: Any) -> dict[str, Any]:
    """What the arm was, what its trainer and model are, and what was recorded."""
    from aligntune.compare import batches
    from aligntune.compare.flops import work
    from aligntune.core.environment import snapshot

    inner, config = trainer.trainer, trainer.config if trainer.config is not None else {}
    return {
        "status": "ok", "label": spec.label, "role": spec.role, "repeat": spec.repeat, "seed": spec.seed,
        "algorithm": trainer.algorithm, "online": trainer.online, "steps": recorder.steps,
        "norms": recorder.norms, "shifted": batches.shifted(recorder.first_documents),
        "precision": _precision(inner.args, trainer.model), "round": _round(inner.args),
        "weights": recorder.weights, "cold_start": recorder.cold_start,
        "rehearsal_seconds": recorder.rehearsal_seconds,
        "capture_seconds": getattr(getattr(inner, "graphed", None), "capture_seconds", None),
        "attestation": trainer.attestation(), "trace": recorder.trace,
        "environment": snapshot(), "config": _plain(config),
        "config_digest": digest_of(config), "work": work(trainer.model), "interpreter": _interpreted(),
        "beta": float(getattr(inner, "beta", 0.0) or 0.0), "load": os.getloadavg(),
    }


class Laps:
    """Seconds between the ends of an arm's parts, from the start of its process."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = started or time.time()

    def end(self, part: str) -> None:
        """Note that `part` is over."""
        now = time.time()
        self.seconds[part], self._last = now - self._last, now


def _trace_step(spec: ArmSpec, trainer: Any) -> int | None:
    if spec.role not in ("a", "b"):
        return None
    if trainer.backend != "fast":
        return _TRACED
    # Two profilers cannot run at once, and online the attested step is the first with a whole round of rollouts. On a
    # CPU the attestation has said what ran, and an interpreted kernel is thousands of operators.
    return None if trainer.online or trainer.trainer.args.device.type != "cuda" else _TRACED + 1


def _questions(spec: ArmSpec, trainer: Any, recorder: Any, extra: dict[str, Any]) -> Any:
    """What is asked of the model between steps: at the second step, so that the first counts as a start only."""
    from aligntune.compare import batches, probes

    def ask(compute_loss: Any, inputs: dict[str, Any]) -> None:
        step, first = trainer.trainer.state.global_step + 1, len(recorder._inputs) == 1
        if trainer.algorithm != "sft" or not first:
            return
        if spec.hypotheses and step == 1:
            # Only whole steps can be compared: with accumulation the later micro-batches are not here yet.
            if trainer.trainer.args.gradient_accumulation_steps == 1:
                found = batches.documents(batches.keep(inputs))
                extra["hypotheses"] = probes.hypotheses(trainer.model, found)
        elif spec.probe and step == 2 and extra["leak"] is None:
            extra["leak"] = probes.leak_between_documents(trainer.trainer, compute_loss, inputs)

    return ask


def attribute(name: str) -> Any:
    """The object that "module:attribute" names.

    Raises:
        ConfigError: not of that form, no such module or attribute.
    """
    module, colon, path = name.partition(":")
    if not colon or not path:
        raise ConfigError(f"setup: {name!r} is not module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"setup: {name!r}: {error}") from error
    return found


def digest_of(config: Any) -> str:
    """12 hexadecimal digits of a configuration, its output folder left out."""
    plain = {key: value for key, value in _plain(config).items() if key not in ("output_dir", "overwrite", "resume")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}


def _round(args: Any) -> int:
    """Optimizer steps that one round of generation feeds; TRL mixes their rows among them."""
    steps = (getattr(args, "steps_per_generation", None) or 1) // args.gradient_accumulation_steps
    return max(1, steps) * (getattr(args, "num_iterations", None) or 1)


def _precision(args: Any, model: Any) -> str:
    """That of the products: autocast's, else what most of the weights are stored in."""
    if args.bf16 or args.fp16:
        return "bf16" if args.bf16 else "fp16"
    numbers: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # a 4-bit weight is computed in what stands around it
            numbers[str(parameter.dtype)] += parameter.numel()
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(max(numbers, key=lambda name: numbers[name]), "fp32")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def outcome(spec: ArmSpec) -> dict[str, Any]:
    """`run_arm`, with an error on purpose or too little memory as a result instead of a traceback."""
    from aligntune.compare import peers

    try:
        # Before torch and transformers: some peers change them, and insist on being first.
        with uncollected():
            package = peers.prepare(spec.peer)
        return run_arm(spec, package)
    except (AlignTuneError, RuntimeError, MemoryError) as error:
        if too_little_memory(error):
            traceback.print_exc()
            # Ours says on further lines what would lower the need; torch's own are a table of its allocator.
            text = str(error) if isinstance(error, AlignTuneError) else str(error).partition("\n")[0]
            return {"status": "out of memory", "kind": type(error).__name__, "message": text,
                    "exit_code": GpuMemoryError.exit_code}
        if not isinstance(error, AlignTuneError):
            raise
        return {"status": "error", "kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def too_little_memory(error: Exception) -> bool:
    """Whether an error says that memory did not suffice: near the limit it is not only torch's allocator that asks."""
    if isinstance(error, AlignTuneError):
        return isinstance(error, GpuMemoryError)
    text = str(error)
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "out of memory" in text.lower() or "STATUS_ALLOC_FAILED" in text)


def write_spec(spec: ArmSpec) -> Path:
    """The spec as a file in its folder."""
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SPEC
    path.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
    return path


def main() -> None:
    """Run the arm that the spec file in `sys.argv` describes."""
    from aligntune.core.run_dir import jsonable

    path = Path(sys.argv[1])
    spec = ArmSpec(**json.loads(path.read_text(encoding="utf-8")))
    found = outcome(spec)
    (path.parent / RESULT).write_text(json.dumps(jsonable(found)), encoding="utf-8")
    # All is written: taking the modules down one by one would be a second and a half of every arm.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if found["status"] == "ok" else 1)


if __name__ == "__main__":
    main()

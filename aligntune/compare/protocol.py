"""Which processes run, in which order, and how one is started and read.

The order is A B B A (A B B A A B for three repeats): whatever drifts while they run, drifts against both arms alike.
Before them runs the oracle (which also fills the machine's caches), after them the yardstick.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.compare.arm import GO, LOG, RESULT, ArmSpec, outcome, write_spec
from aligntune.compare.machine import Watch, card
from aligntune.compare.peers import PEERS
from aligntune.compare.settings import QUIET, Arm, Settings
from aligntune.errors import ComparisonError, ConfigError

Runner = Callable[[ArmSpec, Arm], dict[str, Any]]
LATER_STEP = 3
"""Where adapters' gradients are looked at again: at the first step those of lora_A are 0, for B is 0; at the second
they still are under a warm-up that starts from 0."""

HOW = ("precision", "model_dtype", "base_precision", "attn_implementation", "device", "strict", "padding_free",
       "gradient_checkpointing", "memory_budget_gib", "rollout_engine", "rollout_memory_gib", "log_completions",
       "dataloader_num_workers", "trainer_options")
"""Options of how a model is trained. All others say what is trained: oracle and yardstick have arm a's."""


@dataclass(frozen=True)
class Run:
    """One process to start."""

    role: str
    repeat: int
    arm: Arm


def order(repeats: int) -> list[tuple[str, int]]:
    """("a", 0), ("b", 0), ("b", 1), ("a", 1), ...: each repeat holds both arms, first A then B, then B then A."""
    found: list[tuple[str, int]] = []
    for repeat in range(repeats):
        pair = ("a", "b") if repeat % 2 == 0 else ("b", "a")
        found += [(name, repeat) for name in pair]
    return found


def plan(settings: Settings, *, attention: str | None) -> list[Run]:
    """Every run of the comparison, in order.

    Args:
        attention: the recipe's attn_implementation.
    """
    arms = {"a": settings.a, "b": settings.b}
    timed = [Run(name, repeat, arms[name]) for name, repeat in order(settings.repeats)]
    if not settings.oracle:
        return timed
    shared = {name: value for name, value in settings.a.options.items() if name.rpartition(".")[2] not in HOW}
    fp32 = {**shared, "model.precision": "fp32", "model.model_dtype": "fp32", "model.attn_implementation": "eager"}
    oracle = Run("oracle", 0, Arm("oracle (fp32, eager attention)", "trl", fp32))
    # Two implementations of one function: eager and sdpa attention of transformers. A plain trl arm is one of them.
    other = "sdpa" if attention == "eager" else "eager"
    a = settings.a
    plain = a.backend == "trl" and a.peer is None and a.setup is None and not a.options
    names = [other] if plain else ["eager", "sdpa"]
    yardsticks = [Run("yardstick", number, Arm(f"yardstick (trl, {name})", "trl",
                                               {**shared, "model.attn_implementation": name}))
                  for number, name in enumerate(names)]
    return [oracle, *timed, *yardsticks]


def spec_of(settings: Settings, run: Run, folder: Path, *, seed: int, online: bool, peft: bool) -> ArmSpec:
    """What the process of a run is told."""
    options: dict[str, Any] = dict(settings.overrides)
    algorithm = options.get("algorithm") or settings.config.get("algorithm")
    for name, value in [*_of_peer(run.arm, algorithm).items(), *run.arm.options.items()]:
        _put(options, name, value)
    for name, value in QUIET.items():
        _put(options, name, value)
    if settings.steps is not None:
        _put(options, "max_steps", settings.steps)
    # Online methods are compared over seeds: their rollouts part at the first rounding that flips a sampled token.
    own_seed = seed + run.repeat if online and run.role in ("a", "b") else seed
    path = folder / "arms" / f"{run.role}-{run.repeat + 1}"
    options |= {"backend": run.arm.backend, "output_dir": str(path / "run"), "overwrite": True, "resume": False,
                "seed": own_seed}
    steps = [1, LATER_STEP] if peft else [1]
    return ArmSpec(
        label=run.arm.label, role=run.role, repeat=run.repeat, config=settings.config, overrides=options,
        folder=str(path), seed=own_seed, setup=run.arm.setup, peer=run.arm.peer,
        gradient_steps=steps if run.repeat == 0 or run.role == "yardstick" else [],
        stop_after=steps[-1] if run.role == "oracle" else None, probe=run.role != "oracle",
        hypotheses=run.role == "oracle",
        draw_adapters=any(arm.peer is not None and PEERS[arm.peer].model is not None
                          for arm in (settings.a, settings.b)),
    )


def _of_peer(arm: Arm, algorithm: str | None) -> dict[str, Any]:
    if arm.peer is None:
        return {}
    peer = PEERS[arm.peer]
    return peer.options | (peer.sft_options if algorithm == "sft" else {})


def _put(options: dict[str, Any], name: str, value: Any) -> None:
    """Set an option, over one that is there by its flat name or with its section."""
    flat = name.rpartition(".")[2]
    for other in [key for key in options if key.rpartition(".")[2] == flat]:
        if flat == "trainer_options" and isinstance(options[other], dict) and isinstance(value, dict):
            value = {**options[other], **value}
        del options[other]
    options[name] = value


def in_a_fresh_process(spec: ArmSpec, arm: Arm, *, limit: float | None = None,
                       process: subprocess.Popen[bytes] | None = None) -> dict[str, Any]:
    """Run the arm in its interpreter, watch the card, and read what the arm wrote.

    Args:
        limit: seconds after which it is ended.
        process: the arm's, from `start`; by default one is started now.

    Raises:
        ComparisonError: the process died without a result, or was not done in time; names its log.
        ConfigError: its interpreter cannot be started.
    """
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, result, watch = folder / LOG, folder / RESULT, Watch(folder)
    watch.start()
    lines: list[str] = []
    try:
        process = process or start(spec, arm)
        (folder / GO).touch()
        code = process.wait(limit)
    except subprocess.TimeoutExpired as error:
        raise ComparisonError(f"arm {spec.label!r} was not done after {limit:g} s; {log}") from error
    finally:
        if process is not None:
            end(process)
        lines = watch.stop()
    if not result.is_file():
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise ComparisonError(f"arm {spec.label!r} ended with exit code {code} and no result; {log}:\n  "
                              + "\n  ".join(tail))
    found = json.loads(result.read_text(encoding="utf-8"))
    return {**found, "machine": watch.summary(lines, found.get("train_window"))}


def start(spec: ArmSpec, arm: Arm) -> subprocess.Popen[bytes]:
    """The arm's process; with `spec.waits` it imports its packages, and trains once `in_a_fresh_process` has it.

    Raises:
        ConfigError: its interpreter cannot be started.
    """
    spec.started = time.time()
    path = write_spec(spec)
    folder = path.parent
    for name in (GO, RESULT):
        (folder / name).unlink(missing_ok=True)
    try:
        with (folder / LOG).open("wb") as file:
            return subprocess.Popen(
                [interpreter(arm), "-m", "aligntune.compare.arm", str(path)], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=environment(arm, folder))
    except OSError as error:
        raise ConfigError(f"arm {spec.label!r}: {arm.python!r} cannot be started: {error}") from error


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it has not ended."""
    process.kill()
    process.wait()


def in_this_process(spec: ArmSpec, arm: Arm) -> dict[str, Any]:
    """Run the arm here: quicker, for small models; memory and cold start are then this process's, and say little."""
    from aligntune.core.run_dir import jsonable

    Path(spec.folder).mkdir(parents=True, exist_ok=True)
    return {**json.loads(json.dumps(jsonable(outcome(spec)))), "machine": None}


def interpreter(arm: Arm) -> str:
    """What runs the arm: its own interpreter; this one where it has none, or a folder of packages for this one."""
    return sys.executable if arm.python is None or Path(arm.python).is_dir() else arm.python


def environment(arm: Arm, folder: Path) -> dict[str, str]:
    """The arm's environment: one card, its peer's settings, and where aligntune and the peer's packages lie."""
    found = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    # Several visible cards would be used by transformers at once (DataParallel), and nvidia-smi counts by the bus.
    if found.get("CUDA_VISIBLE_DEVICES") != "":
        found |= {"CUDA_VISIBLE_DEVICES": card(), "CUDA_DEVICE_ORDER": found.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    if arm.peer is not None:
        found |= {name: value.format(folder=folder) for name, value in PEERS[arm.peer].environment.items()}
    if arm.python is not None:
        home = str(Path(__file__).resolve().parents[2])
        paths = [home, found.get("PYTHONPATH")]
        if Path(arm.python).is_dir():
            paths.insert(0, str(Path(arm.python).absolute()))
            # Such a folder brings CUDA libraries as wheels, which nothing tells the loader of.
            library = next(Path(arm.python).absolute().rglob("libcudart.so.*"), None)
            libraries = [str(library.parent) if library else None, found.get("LD_LIBRARY_PATH")]
            found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found | dict(arm.environment)


def execute(settings: Settings, folder: Path, *, runner: Runner = in_a_fresh_process, say: Callable[[str], None],
            seed: int, online: bool, peft: bool, attention: str | None) -> dict[str, list[dict[str, Any]]]:
    """Run everything; results by role, in the order of the repeats.

    Raises:
        ComparisonError: an arm failed. An oracle or yardstick that does not fit or cannot run is said, not raised.
    """
    runs = plan(settings, attention=attention)
    found: dict[str, list[dict[str, Any]]] = {"a": [], "b": [], "oracle": [], "yardstick": []}
    say(announced(runs))
    longest = 0.0
    for number, run in enumerate(runs, 1):
        spec = spec_of(settings, run, folder, seed=seed, online=online, peft=peft)
        left = f" (about {longest * (len(runs) - number + 1):.0f} s left)" if longest else ""
        say(f"[{number}/{len(runs)}] {run.role}{run.repeat + 1 if run.role != 'oracle' else ''}: {run.arm.label}{left}")
        spec.started = begun = time.time()
        result = runner(spec, run.arm)
        # The oracle takes a few steps where the others take all: what it took says too little of them.
        longest = max(longest, time.time() - begun) if run.role != "oracle" else longest
        result["folder"] = spec.folder
        if result["status"] != "ok":
            _failed(run, result, say)
        found[run.role].append(result)
    for role in found.values():
        role.sort(key=lambda one: one.get("repeat", 0))
    return found


def announced(runs: Sequence[Run]) -> str:
    """How many runs there are and what could be left out, told before the first."""
    beside = [run.role for run in runs if run.role not in ("a", "b")]
    text = f"{len(runs)} runs, one after the other: {len(runs) - len(beside)} timed"
    if beside:
        text += f", and {len(beside)} that parity is judged by ({', '.join(beside)}), which --no-oracle leaves out"
    return text


def _failed(run: Run, result: dict[str, Any], say: Callable[[str], None]) -> None:
    text = f"{run.arm.label!r}: {result['status']}: {result['kind']}: {result['message']}"
    if run.role in ("a", "b"):
        error = ComparisonError(f"arm {text}; log in {result['folder']}")
        error.exit_code = result.get("exit_code") or error.exit_code
        raise error
    say(f"the {run.role} could not be run: {text}")


def leftovers(results: Sequence[dict[str, Any]]) -> list[Path]:
    """The large files that arms left: gradients and probe distributions."""
    from aligntune.compare.arm import GRADIENTS, PROBE

    return [path for one in results for name in (GRADIENTS, PROBE) if (path := Path(one["folder"]) / name).is_file()]

"""`generation_kwargs` of TRL's online configs, and the option `stop_strings`, which is a part of them there.

TRL and transformers take any name, and read those that they know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from aligntune.core.generation import OTHER_NAMES, fault_of
from aligntune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from aligntune.core.resolve import Job

STOP_OPTION = "rollout.stop_strings"
_PATH = "train.trainer_options.generation_kwargs"
_OURS = {"fast": "rollout_engine='fast'", "trl": "backend='fast' with rollout_engine='fast'"}
STOPS = ("stop_strings", "eos_token_id")
"""Ends of a completion beside the model's own: what backend fast's engine takes, and TRL on `generate` does not."""

OPTIONS: Mapping[str, str] = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), "max_completion_length"),
    **dict.fromkeys(("num_return_sequences", "n"), "num_generations"),
}
"""Names, of transformers and of vLLM, that are options here. TRL would sample by the one and compute the loss by the
other: logits are divided by the option's temperature."""


def generation_faults(job: Job, args: Any) -> list[str]:
    """What is wrong with `generation_kwargs` of `args`, the TRL config of a job, or `stop_strings`; a line each."""
    given = {} if args.generation_kwargs is None else args.generation_kwargs
    if not isinstance(given, Mapping):
        return [f"{_PATH} = {given!r}: must be a mapping"]
    known = () if args.use_vllm else [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    faults = _stop_faults(job, args, given)
    for name, value in given.items():
        if name in OPTIONS:
            faults.append(f"{_PATH}.{name}: give the option {OPTIONS[name]}, which the loss goes by too")
        elif args.use_vllm:  # its names are those of vLLM's SamplingParams
            if name == "stop_strings" and not stops_asked(job):
                faults.append(f"{_PATH}.{name}: give the option stop_strings, which is vLLM's stop")
        elif name not in known:
            close = OTHER_NAMES.get(name) or nearest(name, known)
            hint = f"; did you mean {'the option ' * (close in OPTIONS)}{OPTIONS.get(close, close)!r}?" if close else ""
            faults.append(f"{_PATH}.{name}: transformers' GenerationConfig has no such field{hint}")
        elif (fault := fault_of(name, value)) is not None:
            faults.append(f"{_PATH}.{fault}")
        elif name in STOPS and value is not None:
            faults += _end_faults(job, given, f"{_PATH}.{name}")
    return faults


def _stop_faults(job: Job, args: Any, given: Mapping[str, Any]) -> list[str]:
    """Of the option `stop_strings`, for the engine of `args` and beside the `generation_kwargs` given."""
    stops = stops_asked(job)
    if not stops:
        return []
    faults = []
    for name in ("stop_strings", "stop") if args.use_vllm else ("stop_strings",):
        other = given.get(name)
        theirs = stops if other is None else _listed(other)
        if any(text not in stops for text in theirs) or any(text not in theirs for text in stops):
            faults.append(f"{STOP_OPTION} = {job.options.stop_strings!r} and {_PATH}.{name} = {other!r}: give one of "
                          "the two")
    if not args.use_vllm:
        return faults + _end_faults(job, given, STOP_OPTION)
    way = "" if job.spec.name == "gspo" else f", or take {_OURS[job.backend]}, which counts it as ended"
    for name in ("mask_truncated_completions", "missing_eos_penalty"):
        if getattr(args, name, None):
            faults.append(f"{STOP_OPTION} with {name} = {getattr(args, name)!r}: TRL counts a completion that vLLM "
                          f"ends at a string as cut off; leave {name} out{way}")
    return faults


def _end_faults(job: Job, given: Mapping[str, Any], path: str) -> list[str]:
    """Of ends of completions, given at `path`, where vLLM does not generate."""
    others = sorted(name for name in given if name not in STOPS)
    if job.backend != "fast" or job.options.rollout_engine not in ("auto", "fast"):
        ways = [_OURS[job.backend], *(["rollout_engine='vllm'"] if path == STOP_OPTION else [])]
        way = " or ".join(ways[job.spec.name == "gspo" and len(ways) > 1 :])  # which backend fast does not run
        return [f"{path}: TRL on transformers' generate takes the padding behind such an end for a part of the "
                f"completion; {way} ends completions so"]
    return [_ours_only(path, f"and it has no {', '.join(others)}")] if others else []


def cannot_end(path: str, why: str) -> ConfigError:
    """Of ends that are given at `path` where our engine would have to run and cannot."""
    way = "; rollout_engine='vllm' ends them so too" if path == STOP_OPTION else ""
    return ConfigError(_ours_only(path, f"and it cannot run here: {why}{way}"))


def _ours_only(path: str, rest: str) -> str:
    return f"{path}: our engine {'alone ' * (path != STOP_OPTION)}ends completions so, {rest}"


def stops_asked(job: Job) -> list[str]:
    """The strings of the option `stop_strings`; none of a job that generates nothing."""
    return list(_listed(vars(job.options).get("stop_strings") or []))


def with_stops(job: Job, args: Any) -> Mapping[str, Any] | None:
    """`generation_kwargs` of `args` with the option `stop_strings` among them, under the name that its engine reads."""
    stops, given = stops_asked(job), args.generation_kwargs
    if not stops:
        return given
    rest = {name: value for name, value in (given or {}).items() if name not in ("stop_strings", "stop")}
    return {**rest, "stop" if args.use_vllm else "stop_strings": stops}


def ends_given(job: Job, args: Any) -> list[str]:
    """Where ends of completions beside the model's own are given, by path; `args` as `trl_config` makes them."""
    found = [name for name in STOPS if (args.generation_kwargs or {}).get(name) is not None]
    return [STOP_OPTION if name == "stop_strings" and stops_asked(job) else f"{_PATH}.{name}" for name in found]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

"""`generation_kwargs` of TRL's online configs: TRL and transformers take any name, and read those that they know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from aligntune.core.generation import OTHER_NAMES, fault_of
from aligntune.errors import nearest

if TYPE_CHECKING:
    from aligntune.core.resolve import Job

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
    """What is wrong with `generation_kwargs` of `args`, the TRL config of a job; a line each."""
    given = args.generation_kwargs
    if given is None:
        return []
    path = "train.trainer_options.generation_kwargs"
    if not isinstance(given, Mapping):
        return [f"{path} = {given!r}: must be a mapping"]
    known = () if args.use_vllm else [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    ours = job.backend == "fast" and job.options.rollout_engine in ("auto", "fast")
    others = sorted(name for name in given if name not in STOPS)
    faults = []
    for name, value in given.items():
        if name in OPTIONS:
            faults.append(f"{path}.{name}: give the option {OPTIONS[name]}, which the loss goes by too")
        elif args.use_vllm:
            continue  # its names are those of vLLM's SamplingParams
        elif name not in known:
            close = OTHER_NAMES.get(name) or nearest(name, known)
            hint = f"; did you mean {'the option ' * (close in OPTIONS)}{OPTIONS.get(close, close)!r}?" if close else ""
            faults.append(f"{path}.{name}: transformers' GenerationConfig has no such field{hint}")
        elif (fault := fault_of(name, value)) is not None:
            faults.append(f"{path}.{fault}")
        elif name in STOPS and value is not None and not ours:
            way = "rollout_engine='fast'" if job.backend == "fast" else "backend='fast' with rollout_engine='fast'"
            faults.append(f"{path}.{name}: TRL on transformers' generate takes the padding behind such an end for a "
                          f"part of the completion; {way} ends completions so")
        elif name in STOPS and value is not None and others:
            faults.append(f"{path}.{name}: our engine alone ends completions so, and it has no {', '.join(others)}")
    return faults

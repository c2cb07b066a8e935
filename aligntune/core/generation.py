"""Text from the model at hand: prompts rendered, padded on the left, sampled in batches, restored afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from aligntune.core.callbacks import say
from aligntune.core.model_hygiene import autocast_if_mixed, kept_mode
from aligntune.data.rows import LONE_SURROGATE, lone_surrogate
from aligntune.data.template import RENDER_ERRORS
from aligntune.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from aligntune.backends.base import Generator

DEFAULT_NEW_TOKENS = 256

OPTIONS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping", "do_sample", "stop_strings",
    "bad_words_ids", "eos_token_id", "max_time", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "forced_eos_token_id",
)
"""The sampling options of `AlignTrainer.generate`: transformers' names and meanings."""

_NUMBERS: Mapping[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda n: n >= 1, "a whole number >= 1"),
    "min_new_tokens": (int, lambda n: n >= 0, "a whole number >= 0"),
    "top_k": (int, lambda n: n >= 0, "a whole number >= 0"),
    "no_repeat_ngram_size": (int, lambda n: n >= 0, "a whole number >= 0"),
    "num_beams": (int, lambda n: n >= 1, "a whole number >= 1"),
    "temperature": (float, lambda x: x >= 0, "a number >= 0"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number > 0 and <= 1"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number >= 0 and <= 1"),
    "typical_p": (float, lambda x: 0 < x <= 1, "a number > 0 and <= 1"),
    "repetition_penalty": (float, lambda x: x > 0, "a number > 0"),
    "length_penalty": (float, lambda x: True, "a number"),
    "max_time": (float, lambda x: x > 0, "a number of seconds > 0"),
}
_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "true, false or 'never'"),
    "stop_strings": (lambda value: all(isinstance(text, str) and text for text in _listed(value)),
                     "a string or a list of them, none empty,"),
    "eos_token_id": (lambda value: _ids(value), "a token id or a list of them"),
    "forced_eos_token_id": (lambda value: _ids(value), "a token id or a list of them"),
    "suppress_tokens": (lambda value: _is_list(value) and _ids(value), "a list of token ids"),
    "begin_suppress_tokens": (lambda value: _is_list(value) and _ids(value), "a list of token ids"),
    "bad_words_ids": (lambda value: _is_list(value) and len(value) > 0 and all(
        _is_list(word) and len(word) > 0 and _ids(word) and min(word) >= 0 for word in value),
        "a list of lists of token ids, none empty,"),
    "exponential_decay_length_penalty": (lambda value: _is_list(value) and len(value) == 2 and _is_number(
        value[0], int) and _is_number(value[1], float), "a pair of a whole number and a number"),
}
"""What transformers takes, some of it without a look, and its processors then fail on."""

OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("stop", "stop_sequences", "stop_words"), "stop_strings"), "stop_token_ids": "eos_token_id",
    **dict.fromkeys(("max_length", "max_tokens", "max_completion_length"), "max_new_tokens"),
    **dict.fromkeys(("min_length", "min_tokens"), "min_new_tokens"), "system": "system_prompt",
}
"""What other libraries call these options; by spelling `stop` is closest to `top_p`."""
_COUNTS = ("n", "num_return_sequences", "num_generations")

_SAMPLES = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def generate(
    model: Any, tokenizer: Any, prompts: Any, *, raw: bool = False, system_prompt: str | None = None,
    batch_size: int = 8, seed: int | None = None, generator: Generator | None = None, **sampling: Any,
) -> list[str]:
    """See `AlignTrainer.generate`; `generator` takes the place of transformers' `generate`, for options that it has."""
    options = check_options(sampling)
    if not _is_number(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size!r}: a whole number >= 1 is wanted")
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise ConfigError(f"seed = {seed!r}: a whole number from 0 to 2^63 - 1 is wanted")
    ids = [encode(tokenizer, prompt, raw=raw, system_prompt=system_prompt) for prompt in as_list(prompts)]
    empty = next((index for index, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise DataError(f"prompt {empty} has no tokens: the model has nothing to continue")
    if not ids:
        return []
    longest = max(len(row) for row in ids)
    options["max_new_tokens"] = _new_tokens(model, longest, options.get("max_new_tokens"))
    if generator is not None:
        why = generator.declines(options, longest)
        if why is None:
            options.setdefault("eos_token_id", _ends(model, tokenizer))
            completions = generator(ids, options, batch_size=batch_size, seed=seed)
            return tokenizer.batch_decode(completions, skip_special_tokens=True)
        say(f"generate: with transformers; {why}")
    texts: list[str] = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))  # like lengths together: less padding
    with (kept_mode(model), _ready(model), torch.no_grad(), autocast_if_mixed(model), _seeded(seed, model.device)):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, text in zip(chosen, _batch(model, tokenizer, [ids[i] for i in chosen], options), strict=True):
                texts[index] = text
    return texts


def check_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`sampling` as transformers takes it: greedy unless an option says otherwise.

    Raises:
        ConfigError: every unknown or impossible option, with the nearest name.
    """
    faults = []
    for name in sampling:
        if name not in OPTIONS:
            close = OTHER_NAMES.get(name) or nearest(name, (*OPTIONS, "raw", "system_prompt", "batch_size", "seed"))
            hint = f"; did you mean {close!r}?" if close else f"; valid: {', '.join(OPTIONS)}"
            if name in _COUNTS:
                hint = ": a prompt has one completion; give it several times for more"
            faults.append(f"unknown sampling option {name!r}{hint}")
    options = dict(sampling)
    for name, value in sampling.items():
        if (fault := fault_of(name, value)) is not None:
            faults.append(fault)
        elif value is not None and name in _NUMBERS:
            options[name] = _NUMBERS[name][0](value)  # transformers refuses an int as temperature
    if faults:
        raise ConfigError.from_faults(faults, "generate()")
    if "stop_strings" in options and not options["stop_strings"]:
        del options["stop_strings"]  # transformers wants a tokenizer even for none
    if options.get("temperature") == 0:
        del options["temperature"]
        options["do_sample"] = False
    options.setdefault("do_sample", any(options.get(name) is not None for name in _SAMPLES))
    if not options["do_sample"]:
        for name in _SAMPLES:
            options.pop(name, None)
    return options


def fault_of(name: str, value: Any) -> str | None:
    """What is wrong with the value of an option of `OPTIONS`, or None where nothing is; None asks for nothing."""
    if value is None:
        return None
    if name in _NUMBERS:
        kind, holds, wanted = _NUMBERS[name]
        fits = _is_number(value, kind) and holds(value)
    elif name in _FORMS:
        fits, wanted = _FORMS[name][0](value), _FORMS[name][1]
    else:
        return None
    return None if fits else f"{name} = {value!r}: {wanted} is wanted"


def _is_number(value: Any, kind: type) -> bool:
    """Whether this is a finite number, whole where `kind` is int; numpy's numbers are."""
    number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _listed(value: Any) -> Sequence[Any]:
    return value if _is_list(value) else [value]


def _ids(value: Any) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in _listed(value))


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many as many: a string, or a list of message dicts, is one.

    Raises:
        DataError: neither of these, nor a list.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise DataError(f"prompts: a string, a list of them or messages are wanted, not {type(prompts).__name__}")
    if prompts and all(isinstance(item, Mapping) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def encode(tokenizer: Any, prompt: Any, *, raw: bool = False, system_prompt: str | None = None) -> list[int]:
    """Token ids of one prompt.

    Messages go through the chat template. So does a string, as a user turn, where the tokenizer has a template and
    `raw` is False. A conversation that ends with an assistant turn is continued inside that turn.

    Raises:
        DataError: not a string or messages, messages without a chat template, some that the template refuses, or a lone
            surrogate in any of these.
    """
    if isinstance(prompt, str):
        if raw or not tokenizer.chat_template:
            if system_prompt is not None:
                raise ConfigError("system_prompt: this prompt is not rendered as a conversation"
                                  + (" (raw=True)" if raw else "; the tokenizer has no chat template"))
            ids = list(tokenizer(_encodable(prompt))["input_ids"])
            # A tokenizer that closes every text with eos would have the model start behind the end.
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
        messages = [dict(item) for item in prompt]
        if not tokenizer.chat_template:
            raise DataError("messages need a chat template and the tokenizer has none; pass strings")
        if any("role" not in item or "content" not in item for item in messages):
            raise DataError(f"messages are dicts with 'role' and 'content'; got {sorted(messages[0])}")
    else:
        raise DataError(f"a prompt is a string or a list of messages, not {type(prompt).__name__}")
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    unfinished = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished)
    except RENDER_ERRORS as error:
        raise DataError("the tokenizer's chat template refuses the conversation: "
                        f"{error or type(error).__name__}") from error
    return list(tokenizer(_encodable(text), add_special_tokens=False)["input_ids"])


def _encodable(text: str) -> str:
    if lone_surrogate(text) is not None:
        raise DataError(f"the prompt {text if len(text) <= 80 else text[:80] + '...'!r} {LONE_SURROGATE}")
    return text


def _batch(model: Any, tokenizer: Any, rows: list[list[int]], options: dict[str, Any]) -> list[str]:
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    ends = options.get("eos_token_id", _ends(model, tokenizer))
    extra = {"tokenizer": tokenizer} if options.get("stop_strings") else {}
    options = {**options, "eos_token_id": ends, "pad_token_id": pad, "use_cache": True, **extra}
    out = model.generate(input_ids=ids, attention_mask=mask, **options)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, (list, tuple)) else [named]) | {tokenizer.eos_token_id}
    return sorted(ids - {None}) or None


def _new_tokens(model: Any, longest: int, wanted: int | None) -> int:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = room - longest if isinstance(room, int) else None
    if room is not None and room < (wanted or 1):
        asked = f" and max_new_tokens={wanted}" if wanted else ""
        raise ConfigError(f"the longest prompt has {longest} tokens{asked}: the model has positions for "
                          f"{longest + room}")
    if wanted is not None:
        return wanted
    return DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)


@contextlib.contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Eval mode, the cache on, and none of the sampling habits that a checkpoint's generation_config brings."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    owners = [owner for owner in {id(m): m for m in (model, base)}.values() if "generation_config" in vars(owner)]
    before = [owner.generation_config for owner in owners]
    config, cache = base.generation_config, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    # transformers fills every option that is not given from here: top_p or a penalty nobody asked for.
    plain = type(config)(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)
    for owner in owners:
        owner.generation_config = plain
    try:
        yield
    finally:
        model.config.use_cache = cache
        for owner, value in zip(owners, before, strict=True):
            owner.generation_config = value


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

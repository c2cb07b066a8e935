"""Reward models as reward functions: any sequence-classification model, in batches, with its own tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch

from aligntune.backends.loading import weights_of
from aligntune.core.model_hygiene import detach_backends
from aligntune.errors import AlignTuneError, ConfigError

if TYPE_CHECKING:
    from aligntune.backends.loading import Precision
    from aligntune.core.resolve import Job


class RewardModel:
    """f(prompts, completions, **columns) -> one score a completion, in the form of a reward function.

    The score is the model's one output; of two, the log-odds of the second label. An encoder, whose tokenizer has a
    token for the whole text ([CLS]), gets that token and the others its tokenizer puts around a text; other models get
    the text alone. A text that is longer than a model's table of positions is refused, not cut: the score of a
    beginning would be taken for that of the whole.

    Args:
        model: a sequence-classification model with one or two labels.
        tokenizer: its tokenizer.
        name: shown in logs.
        template_from: the tokenizer that renders conversations; default: `tokenizer`.
        batch_size: texts scored together.
        policy_eos: the token that ends the policy's completions. A plain text that it ended ends with the reward
            model's own one, as texts do in the training of reward models; a text that was cut off does not.

    Raises:
        ConfigError: more than two labels; when called, a text beyond the model's last position.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, template_from: Any = None, batch_size: int = 8,
        policy_eos: int | None = None,
    ) -> None:
        labels = model.config.num_labels
        if labels not in (1, 2):
            raise ConfigError(f"reward_model_name: {name} has {labels} labels; a reward has one (or two, of which the "
                              "second is the good one)")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.batch_size, self.policy_eos = tokenizer, batch_size, policy_eos
        self.template_from = template_from or tokenizer
        self.__name__ = name
        self.positions = _positions(model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model reads its score at the last token that is not this one.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **columns: Any
    ) -> list[float]:
        ids = completion_ids or [[] for _ in prompts]
        texts = [self._text(*each) for each in zip(prompts, completions, ids, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            encoded = self.tokenizer(
                texts[start:start + self.batch_size], return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=self._bare(texts[start]),
            ).to(self.model.device)
            length = encoded["input_ids"].shape[1]
            if self.positions is not None and length > self.positions:
                raise ConfigError(f"reward_model_name: {self.__name__} reads {self.positions} tokens, and a prompt "
                                  f"with its completion has {length}: lower max_seq_length, or take another model")
            logits = self.model(**encoded).logits.float()
            scores += (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return scores

    def _bare(self, text: str) -> bool:
        """Whether this is a text for an encoder that no template has given its first token yet."""
        first = self.tokenizer.cls_token
        return first is not None and not text.startswith(first)

    def _text(self, prompt: Any, completion: Any, ids: list[int]) -> str:
        if isinstance(prompt, str):
            ended = self.policy_eos is not None and ids[-1:] == [self.policy_eos]
            return prompt + completion + (self.tokenizer.eos_token or "" if ended else "")
        return self.template_from.apply_chat_template([*prompt, *completion], tokenize=False)


def _positions(model: Any) -> int | None:
    """Tokens that a learnt table of positions has room for; None where positions have no end (rotary ones)."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe")):
            # RoBERTa counts from behind its padding index, OPT and BART from an offset.
            start = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - start
    return None


def load_reward_model(job: Job, precision: Precision, policy_tokenizer: Any) -> RewardModel:
    """The job's reward model, frozen, on its device: a path, a hub id, or a model object.

    A model that comes without a tokenizer reads with the policy's, which is said; one whose tokenizer has no chat
    template has conversations rendered with the policy's.

    Raises:
        AlignTuneError: it cannot be loaded.
        ConfigError: it has no trained head, or no vocabulary for the policy's tokenizer.
    """
    from transformers import AutoTokenizer

    given, options = job.options.reward_model_name, job.options
    found = weights_of(job, "reward_model_name") if isinstance(given, str) else None
    model = given if found is None else _load(given, found, job, precision)
    detach_backends(model)
    source = found or getattr(model.config, "_name_or_path", "")
    label = given if isinstance(given, str) else source  # a run folder has a name of its own
    name = os.path.basename(label.rstrip("/")) if label else type(model).__name__
    tokenizer = None
    if source:
        with contextlib.suppress(OSError, ValueError, ImportError):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    if tokenizer is None:
        vocabulary = model.config.get_text_config().vocab_size
        if len(policy_tokenizer) > vocabulary:
            raise ConfigError(f"reward_model_name: {name} comes without a tokenizer, and the policy's has "
                              f"{len(policy_tokenizer)} tokens to its {vocabulary}")
        job.notices.append(f"the reward model {name} comes without a tokenizer: it reads with the policy's")
        tokenizer = policy_tokenizer
    rendering = tokenizer
    if tokenizer.chat_template is None and policy_tokenizer.chat_template is not None:
        rendering = policy_tokenizer
        job.notices.append(f"the reward model {name} has no chat template: the policy's renders conversations for it")
    if model.config.num_labels == 2:
        job.notices.append(f"the reward model {name} has two labels: the reward is the log-odds of the second")
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_loaded_in_4bit", False):
        model = model.to(_device(precision))
    batch = max(options.batch_size, options.eval_batch_size or 0)
    return RewardModel(model, tokenizer, name=name, template_from=rendering, batch_size=batch,
                       policy_eos=policy_tokenizer.eos_token_id)


def _device(precision: Precision) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if precision.device == "cuda" else torch.device("cpu")


def _is_adapter(name: str) -> bool:
    """Whether `name` is a folder of adapters that `algorithm: reward` trained.

    Raises:
        ConfigError: of adapters for something else: loaded under a new, random score head, they would not complain.
    """
    path = os.path.join(name, "adapter_config.json")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        task = json.load(file).get("task_type")
    if task != "SEQ_CLS":
        raise ConfigError(f"reward_model_name: {name!r} holds adapters of a model for {task}, which scores nothing; "
                          "`aligntune train` with algorithm 'reward' makes one")
    return True


def _load(name: str, source: str, job: Job, precision: Precision) -> Any:
    kwargs: dict[str, Any] = {"trust_remote_code": job.options.trust_remote_code, "dtype": precision.dtype}
    if precision.device == "cuda":
        kwargs["device_map"] = {"": _device(precision).index}
    load = _with_adapters if _is_adapter(source) else _whole
    try:
        model, missing = load(source, kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise AlignTuneError(f"the reward model {name!r} cannot be loaded: {error}") from error
    if missing:
        raise ConfigError(f"reward_model_name: {name!r} is no reward model: it has no {min(missing)}"
                          "; `aligntune train` with algorithm 'reward' makes one")
    return model


def _whole(source: str, kwargs: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model, and the names of what its checkpoint does not hold."""
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True, **kwargs)
    return model, set(info["missing_keys"])


def _with_adapters(folder: str, kwargs: dict[str, Any]) -> tuple[Any, set[str]]:
    """The base with the folder's adapters and their score head, and the names of what neither of them holds."""
    from peft import PeftConfig, PeftModelForSequenceClassification
    from peft.utils import ModulesToSaveWrapper

    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise ValueError("its adapter_config.json names no base model")
    # The base's own configuration knows no score. It is loaded alone, for transformers 5.17 puts the adapters around
    # it and leaves their trained head out.
    base, missing = _whole(config.base_model_name_or_path, {**kwargs, "num_labels": 1, "revision": config.revision})
    config.inference_mode = True
    model = PeftModelForSequenceClassification(base, config)
    held = tuple(f"{path}." for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper))
    try:
        absent = model.load_adapter(folder, "default").missing_keys
    except KeyError as error:  # a whole module that the adapters should bring, by the name it is saved under
        absent = [str(error.args[0])]
    missing = {key for key in missing if not key.startswith(held)}
    return base, missing | {key.removeprefix("base_model.model.") for key in absent}

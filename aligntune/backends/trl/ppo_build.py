"""The critic that a PPO job asks for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from aligntune.backends.loading import nf4_config, weights_of
from aligntune.backends.trl.ppo_critic import backbone_of
from aligntune.backends.trl.reward_model import RewardModel
from aligntune.core.model_hygiene import copy_model, detach_backends, keep_4bit_layout
from aligntune.errors import AlignTuneError, ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from aligntune.backends.loading import Precision
    from aligntune.core.resolve import Job


def value_model(job: Job, model: Any, precision: Precision, peft_config: LoraConfig | None, rewards: list[Any]) -> Any:
    """The critic's model, with gradients on what it trains; None where a head on the policy's trunk is asked for.

    Under LoRA the critic is its base with adapters of its own, of the policy's configuration.

    Raises:
        AlignTuneError: it cannot be loaded.
        ConfigError: 'reward' without a reward model, or a model that does not read from left to right.
    """
    wanted = job.options.value_model_name
    if wanted is None:
        job.notices.append("critic: a value head on the policy's trunk; value_model_name gives it a model of its own")
        return None
    trains = None
    if wanted == "policy":
        trains = {name for name, value in model.named_parameters() if value.requires_grad}
        critic = copy_model(model)
    elif wanted == "reward":
        scorer = next((reward for reward in rewards if isinstance(reward, RewardModel)), None)
        if scorer is None:
            raise ConfigError("loss.value_model_name = 'reward': there is no reward_model_name to copy")
        critic = _merged(copy_model(scorer.model))
    else:
        critic = wanted
        if isinstance(wanted, str):
            critic = _load(weights_of(job, "value_model_name"), job, precision, whole=peft_config is None)
        detach_backends(critic)
    _check(critic, wanted, model)
    keep_4bit_layout(critic)
    if hasattr(critic, "peft_config"):
        for name, value in critic.named_parameters():
            value.requires_grad_("lora_" in name if trains is None else name in trains)
    elif peft_config is not None:
        _add_adapters(critic, peft_config, job.options.seed)
    elif getattr(critic, "is_loaded_in_4bit", False):
        raise ConfigError("loss.value_model_name: a 4-bit critic cannot be trained whole; use_peft=True gives it "
                          "adapters")
    else:
        critic.float().requires_grad_(True)
    return critic


def _merged(model: Any) -> Any:
    """A copy of a reward model that was loaded with its adapters: these added to its weights, its own head in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if hasattr(model, "merge_and_unload"):  # an object that the user wrapped
        return model.merge_and_unload(safe_merge=True)
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(path, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(path, module.modules_to_save[module.active_adapters[0]])
    vars(model).pop("peft_config", None)
    return model


def _check(critic: Any, wanted: Any, model: Any) -> None:
    base = critic.get_base_model() if hasattr(critic, "peft_config") else critic
    one_way = base.get_output_embeddings() is not None or isinstance(getattr(base, "score", None), torch.nn.Linear)
    name = wanted if isinstance(wanted, str) else type(base).__name__
    if not one_way or getattr(base.config, "is_encoder_decoder", False):
        raise ConfigError(f"loss.value_model_name: {name} is no causal model, whose value of a token would not see the "
                          "tokens after it")
    sizes = [one.config.get_text_config().vocab_size for one in (base, model)]
    if sizes[0] < sizes[1]:
        raise ConfigError(f"loss.value_model_name: {name} has {sizes[0]} tokens, the policy {sizes[1]}: the critic "
                          "reads the policy's ids")


def _add_adapters(critic: Any, peft_config: LoraConfig, seed: int) -> None:
    from peft import inject_adapter_in_model

    config = copy.deepcopy(peft_config)
    backbone = backbone_of(critic)
    names = {name.rpartition(".")[2] for name, _ in backbone.named_modules()}
    config.modules_to_save = [name for name in config.modules_to_save or [] if name in names] or None
    config.ensure_weight_tying = False  # the critic has no head to be tied to
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, backbone)


def _load(source: str, job: Job, precision: Precision, *, whole: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kwargs: dict[str, Any] = {"trust_remote_code": job.options.trust_remote_code}
    if job.options.quantization == "nf4":
        kwargs |= {"quantization_config": nf4_config(precision), "device_map": {"": precision.device}}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=job.options.trust_remote_code)
        scores = any("SequenceClassification" in kind for kind in config.architectures or [])
        kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        dtype = torch.float32 if whole else precision.dtype
        return kind.from_pretrained(source, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise AlignTuneError(f"the critic {source!r} cannot be loaded: {error}") from error

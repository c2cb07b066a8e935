"""The factories: one call makes a trainer, a string picks the engine."""

from __future__ import annotations

import enum
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aligntune.algorithms import ALGORITHMS
from aligntune.backends import BACKENDS
from aligntune.backends.base import Backend, Prepared, gate_of, require, supports
from aligntune.core.config import common_options
from aligntune.core.options import UNSET, Unset, describe, infos
from aligntune.core.resolve import Job, resolve
from aligntune.core.rules import VLLM_STOPS, asked
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.core.trainer import AlignTrainer
    from aligntune.data import PreparedData

logger = logging.getLogger("aligntune")

RL_ALGORITHMS = tuple(name for name in ALGORITHMS.names() if name not in ("sft", "reward"))


class BackendType(enum.StrEnum):
    """The backends as an enum, for code that prefers one to a string."""

    TRL = "trl"
    FAST = "fast"


def create_sft_trainer(
    model_name: Any = UNSET,
    dataset_name: Any = UNSET,
    *,
    backend: str | BackendType | Unset = UNSET,
    output_dir: str | os.PathLike[str] | None | Unset = UNSET,
    num_epochs: float | Unset = UNSET,
    max_steps: int | Unset = UNSET,
    batch_size: int | Unset = UNSET,
    learning_rate: float | Unset = UNSET,
    max_seq_length: int | Unset = UNSET,
    max_samples: int | None | Unset = UNSET,
    system_prompt: str | None | Unset = UNSET,
    config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> AlignTrainer:
    """A trainer for supervised fine-tuning.

    Args:
        model_name: hub id, local folder, "builtin:NAME", or a model object.
        dataset_name: hub id, local json/jsonl/csv/parquet file, folder, "builtin:NAME", a `datasets.Dataset`, or a
            list of dicts: text, messages, Alpaca rows, prompt-completion pairs, ...
        config: YAML path, mapping or OmegaConf config; explicit arguments win over it.
        callbacks: transformers callbacks to add.
        **options: any other option, by its flat name; the list stands below.

    Returns:
        An `AlignTrainer`; `train()` trains.

    Raises:
        ConfigError: every unknown name, wrong type, value out of range and contradiction, all at once.
        DataError: the dataset cannot be read, is of another kind, or has bad rows.
        BackendUnavailableError, UnsupportedAlgorithmError: an explicit backend never falls back.
    """
    explicit = {
        "model_name": model_name, "dataset_name": dataset_name, "backend": backend, "output_dir": output_dir,
        "num_epochs": num_epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_seq_length": max_seq_length, "max_samples": max_samples, "system_prompt": system_prompt, **options,
    }
    return build_trainer(resolve(explicit, config, algorithms=("sft",), what="create_sft_trainer"), callbacks)


def create_rl_trainer(
    model_name: Any = UNSET,
    dataset_name: Any = UNSET,
    *,
    algorithm: str | Unset = UNSET,
    backend: str | BackendType | Unset = UNSET,
    output_dir: str | os.PathLike[str] | None | Unset = UNSET,
    num_epochs: float | Unset = UNSET,
    max_steps: int | Unset = UNSET,
    batch_size: int | Unset = UNSET,
    learning_rate: float | Unset = UNSET,
    max_seq_length: int | Unset = UNSET,
    max_samples: int | None | Unset = UNSET,
    system_prompt: str | None | Unset = UNSET,
    reward_functions: Any = UNSET,
    reward_function_weights: list[float] | None | Unset = UNSET,
    reward_model_name: Any = UNSET,
    config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> AlignTrainer:
    """A trainer for preference or reinforcement learning; `algorithm` names it.

    Args:
        model_name: hub id, local folder, "builtin:NAME", or a model object.
        dataset_name: as for `create_sft_trainer`: preference pairs, or prompts with what the rewards read.
        algorithm: one of `aligntune.list_algorithms()`.
        reward_functions: names ("math"), callables f(prompts, completions, **columns) -> list[float], or
            {name, weight, options}; online algorithms need one of these or `reward_model_name`.
        reward_function_weights: one weight a reward.
        reward_model_name: a sequence-classification model that scores completions.
        config: YAML path, mapping or OmegaConf config; explicit arguments win over it.
        callbacks: transformers callbacks to add.
        **options: any other option, by its flat name; the list stands below.

    Returns:
        An `AlignTrainer`; `train()` trains.

    Raises:
        ConfigError: every unknown name, wrong type, value out of range and contradiction, all at once.
        DataError: the dataset cannot be read, is of another kind, or has bad rows.
        BackendUnavailableError, UnsupportedAlgorithmError: an explicit backend never falls back.
    """
    explicit = {
        "model_name": model_name, "dataset_name": dataset_name, "algorithm": algorithm, "backend": backend,
        "output_dir": output_dir, "num_epochs": num_epochs, "max_steps": max_steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "max_seq_length": max_seq_length, "max_samples": max_samples,
        "system_prompt": system_prompt, "reward_functions": reward_functions,
        "reward_function_weights": reward_function_weights, "reward_model_name": reward_model_name, **options,
    }
    return build_trainer(resolve(explicit, config, algorithms=RL_ALGORITHMS, what="create_rl_trainer"), callbacks)


def create_reward_trainer(
    model_name: Any = UNSET,
    dataset_name: Any = UNSET,
    *,
    backend: str | BackendType | Unset = UNSET,
    output_dir: str | os.PathLike[str] | None | Unset = UNSET,
    num_epochs: float | Unset = UNSET,
    max_steps: int | Unset = UNSET,
    batch_size: int | Unset = UNSET,
    learning_rate: float | Unset = UNSET,
    max_seq_length: int | Unset = UNSET,
    max_samples: int | None | Unset = UNSET,
    system_prompt: str | None | Unset = UNSET,
    config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> AlignTrainer:
    """A trainer for a reward model on pairs; what it saves is a `reward_model_name` for online methods.

    Args:
        model_name: hub id, local folder or "builtin:NAME" of a language model, which gets a new score head, or of a
            sequence-classification model; or an object of the latter.
        dataset_name: as for `create_sft_trainer`: preference pairs, with a column `margin` or without.
        config: YAML path, mapping or OmegaConf config; explicit arguments win over it.
        callbacks: transformers callbacks to add.
        **options: any other option, by its flat name; the list stands below.

    Returns:
        An `AlignTrainer`; `train()` trains.

    Raises:
        ConfigError: every unknown name, wrong type, value out of range and contradiction, all at once.
        DataError: the dataset cannot be read, is of another kind, or has bad rows.
        BackendUnavailableError, UnsupportedAlgorithmError: an explicit backend never falls back.
    """
    explicit = {
        "model_name": model_name, "dataset_name": dataset_name, "backend": backend, "output_dir": output_dir,
        "num_epochs": num_epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_seq_length": max_seq_length, "max_samples": max_samples, "system_prompt": system_prompt, **options,
    }
    return build_trainer(resolve(explicit, config, algorithms=("reward",), what="create_reward_trainer"), callbacks)


def create_trainer(config: Any, overrides: Mapping[str, Any] | None = None, **options: Any) -> AlignTrainer:
    """A trainer for whatever algorithm the config names; what `aligntune train` calls.

    Args:
        config: YAML path, mapping or OmegaConf config.
        overrides: options by flat name or `section.name`; they win over the config.
        **options: the same, as keywords.
    """
    return build_trainer(resolve({**(overrides or {}), **options}, config, what="the recipe"))


def choose_backend(job: Job) -> Backend:
    """The job's backend; for "auto" the first of fast and trl that runs it here, with the reason in the notices.

    Of trl's rollout engines "auto" is then vLLM where stop strings ask for it and it is here.

    Raises:
        UnsupportedAlgorithmError, BackendUnavailableError: an explicit backend that cannot run this job.
    """
    backend = _backend_of(job)
    options = vars(job.options)
    stops = options.get("stop_strings") and options["rollout_engine"] == "auto"
    if stops and backend.name == "trl" and "use_vllm" not in asked(options) and _vllm_is_here(job):
        job.set("rollout_engine", "vllm")
        job.notices += ["rollout_engine: vllm, because stop_strings do not go with transformers' generate", VLLM_STOPS]
    return backend


def _vllm_is_here(job: Job) -> bool:
    import torch

    return (job.options.device != "cpu" and torch.cuda.is_available()
            and importlib.util.find_spec("vllm") is not None)


def _backend_of(job: Job) -> Backend:
    options = vars(job.options)
    if job.backend != "auto":
        backend = BACKENDS.load(job.backend)
        require(backend, job.spec.name, options)
        return backend
    fast = BACKENDS.load("fast")
    verdict = supports(fast, job.spec.name)
    gated = gate_of(fast, options, job.spec.name)
    if not verdict:
        why = f"fast does not run {job.spec.name} ({verdict.reason})"
    elif gated is not None:
        why = f"fast does not run {gated[0].option}={gated[1]!r}"
    elif options["device"] == "cpu":
        why = "device='cpu' was asked for"
    elif os.environ.get("TRITON_INTERPRET") == "1" or not (here := fast.available()):
        # Interpreted kernels are for tests: nobody means them by "auto".
        why = f"fast is not available here ({here.reason})" if os.environ.get("TRITON_INTERPRET") != "1" else (
            "TRITON_INTERPRET=1 is for tests of fast, which must be named to run")
    else:
        require(fast, job.spec.name, options)
        job.notices.append(f"backend: fast ({here.reason} runs {job.spec.name})")
        job.set("backend", "fast")
        return fast
    job.notices.append(f"backend: trl, because {why}")
    job.set("backend", "trl")
    trl = BACKENDS.load("trl")
    require(trl, job.spec.name, options)
    return trl


def check_names(job: Job, callbacks: list[Any] | None = None) -> None:
    """Rewards, trainer options and stop_metric by name: what a run would find out, without building it.

    Args:
        callbacks: of the user's own; with any, no name of a metric is unknown.

    Raises:
        ConfigError: there is no such reward, field or metric, or TRL does not take a field's value.
    """
    from aligntune.core.eval_names import check_metric_names

    if not callbacks:
        check_metric_names(job)
    if job.spec.online:
        from aligntune.rewards import resolve_rewards

        resolve_rewards(list(job.options.reward_functions or []), None, build=False)
    if job.options.trainer_options or vars(job.options).get("stop_strings"):  # the one check that needs TRL imported
        from aligntune.backends.loading import precision_of
        from aligntune.backends.trl.options import trl_config
        from aligntune.core.rules import evaluates

        # Some fields (load_best_model_at_end) ask for evaluation.
        trl_config(job, precision_of(job), eval_rows=int(evaluates(vars(job.options))))


def data_request(job: Job) -> Any:
    """What the data layer is asked to prepare for this job."""
    from aligntune.data import DataRequest

    options, names = job.options, vars(job.options)
    shared = ("dataset_config", "split", "max_samples", "column_mapping", "system_prompt", "chat_template",
              "apply_chat_template", "truncation", "assistant_turns", "completion_only", "max_seq_length",
              "max_completion_length", "on_bad_row", "eval_split", "max_eval_samples", "val_split_ratio", "seed",
              "trust_remote_code", "text_field")
    return DataRequest(
        algorithm=job.spec.name, takes=job.spec.takes, dataset=options.dataset_name,
        eval_dataset=options.eval_dataset_name, **{name: names[name] for name in shared if name in names},
    )


def prepare_data(job: Job, tokenizer: Any) -> PreparedData:
    """The job's rows, read and tokenised; the columns are those that its rewards ask for.

    Raises:
        DataError: what `data.prepare` and `rewards.check_columns` raise.
    """
    from aligntune.data import prepare

    data = prepare(data_request(job), tokenizer)
    check = columns_check(job)
    for where, rows, _ in data.parts():
        check(rows, where)
    return data


def columns_check(job: Job) -> Callable[[Any, str], None]:
    """What raises DataError where prepared rows lack a column that a reward of the job asks for."""
    if not job.spec.online:
        return lambda rows, where: None
    from aligntune.rewards import check_columns, resolve_rewards

    functions, _ = resolve_rewards(list(job.options.reward_functions or []), None, build=False)
    kept = not asked(vars(job.options)).get("remove_unused_columns")  # TRL's default keeps what rewards read
    return lambda rows, where: check_columns(
        functions, [name for name in rows.column_names if kept and name != "prompt"], where)


def build_trainer(job: Job, callbacks: list[Any] | None = None, *, backend: Backend | None = None) -> AlignTrainer:
    """Data, backend and run folder of a resolved job, in that order: nothing is written before the data is sound.

    Args:
        backend: builds the trainer, from a model that it has loaded as the options say; None is the one that the job
            names.

    Raises:
        ConfigError: `callbacks` is no list of transformers' callbacks; or what `check_names` and `check_model_object`
            raise.
    """
    _check_callbacks(callbacks)
    chosen = choose_backend(job) if backend is None else backend
    from aligntune.core import notices

    notices.quiet_libraries()  # before they are imported
    from omegaconf import OmegaConf

    from aligntune.backends.loading import check_model_object, load_tokenizer
    from aligntune.core.early_stop import StopAt
    from aligntune.core.run_dir import RunDir
    from aligntune.core.trainer import AlignTrainer

    notices.show()
    if backend is None:
        check_model_object(job)
    check_names(job, callbacks)
    tokenizer = load_tokenizer(job)
    data = prepare_data(job, tokenizer)
    run_dir = RunDir.create(
        job.options.output_dir, algorithm=job.spec.name, model_name=_model_label(job), resume=job.options.resume,
        overwrite=job.options.overwrite,
    )
    job.set("output_dir", str(run_dir.path))
    if job.options.on_bad_row == "quarantine" and data.report.bad and run_dir.is_main:
        data.report.write_bad_rows(run_dir.path / "bad_rows.jsonl")
    built = chosen.build(job, Prepared(data.tokenizer, data.train, data.eval, data.report))
    if job.objects:
        job.notices.append(f"config.yaml cannot be run again: {', '.join(sorted(job.objects))} came as Python objects")
    logger.info("%s", data.report.text())
    for callback in callbacks or []:
        built.trainer.add_callback(callback)
    if job.options.stop_metric is not None:
        built.trainer.add_callback(StopAt(job.options.stop_metric, job.options.stop_value))
    return AlignTrainer(
        built.trainer, config=job.config, run_dir=run_dir, tokenizer=data.tokenizer, backend=chosen.name,
        algorithm=job.spec.name, attestation=built.attestation, data_report=data.report.markdown(),
        config_yaml=OmegaConf.to_yaml(job.config), notices=[*job.notices, *built.notices], resume=job.options.resume,
        progress=job.options.progress, system_prompt=job.options.system_prompt, generator=built.generator,
    )


def _check_callbacks(callbacks: Any) -> None:
    """transformers takes any object, and fails on it in the first step."""
    if callbacks is None:
        return
    from transformers import TrainerCallback

    if not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks = {callbacks!r}: must be a list of transformers.TrainerCallback")
    faults = [
        f"callbacks[{index}] = {one!r}: must be a transformers.TrainerCallback, or a class of them"
        for index, one in enumerate(callbacks)
        if not (issubclass(one, TrainerCallback) if isinstance(one, type) else isinstance(one, TrainerCallback))
    ]
    if faults:
        raise ConfigError.from_faults(faults, "callbacks")


def _model_label(job: Job) -> str:
    model = job.options.model_name
    return model if isinstance(model, str) else (model.config._name_or_path or type(model).__name__)


def _document() -> None:
    """Append the options to the factories' docstrings, from the table: `help()` shows every default."""
    rows = common_options()
    shared = [row for row in rows if row.audience in ("all", "offline")]
    sft = [row for row in rows if row.audience == "sft"]
    online = [row for row in rows if row.audience == "online"]
    offline = ((create_sft_trainer, "sft", [*shared, *sft]), (create_reward_trainer, "reward", shared))
    for factory, name, common in offline:
        own = infos(ALGORITHMS.load(name).options, "loss")
        factory.__doc__ = f"{factory.__doc__}\n    Options:\n\n{describe([*common, *own])}\n"
    text = f"{create_rl_trainer.__doc__}\n    Options:\n\n{describe(shared)}\n\n    Online algorithms:\n\n"
    text += describe(online)
    for name in RL_ALGORITHMS:
        spec = ALGORITHMS.load(name)
        text += f"\n\n    {name} ({spec.title}), own options and defaults:\n\n{describe(infos(spec.options, 'loss'))}"
        text += "".join(f"\n    {option} defaults to {value!r}" for option, value in spec.defaults.items())
    create_rl_trainer.__doc__ = text + "\n"


_document()

"""Arms that are not a backend of ours: other packages, driven through TRL's trainers on the same prepared rows.

Where a peer wants versions of its own, `--python-b` names an interpreter, or the folder of a `pip install --target`
that this interpreter is then run with; aligntune is put on its path.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aligntune.builtin import is_builtin, model_path
from aligntune.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from aligntune.backends.base import Backend, Built, Prepared
    from aligntune.compare.arm import ArmSpec
    from aligntune.core.registry import Support
    from aligntune.core.resolve import Job


@dataclass(frozen=True)
class Peer:
    """How a peer is reached.

    Args:
        package: imported before torch and transformers, which some peers insist on.
        install: the command that brings it.
        options: options of every job.
        sft_options: options of an SFT job.
        kernels: what the names of its kernels match; a traced step on a card without one is a fallback.
        model: makes the model from the job's options, or None where ours does.
        environment: variables of its process; {folder} is the arm's.
        sft: makes the peer's own SFT trainer from rows of `input_ids` that are learnt whole, or None where ours does.
        lacks: algorithms that it is not compared in, and why.
    """

    package: str
    install: str
    kernels: str
    options: dict[str, Any] = field(default_factory=dict)
    sft_options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[Any, dict[str, Any]], Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    sft: Callable[[Job, Prepared], Any] | None = None
    lacks: dict[str, str] = field(default_factory=dict)


def check(name: str, job: Job) -> None:
    """Raise unless the peer can be given the job: asked before any arm runs.

    Raises:
        ConfigError: an algorithm that the peer lacks, or adapters of a kind that are not asked of it here.
    """
    peer, options = PEERS[name], job.options
    if job.spec.name in peer.lacks:
        raise ConfigError(f"{name} is not compared in {job.spec.name}: {peer.lacks[job.spec.name]}")
    if peer.model is not None and options.use_peft and (options.use_dora or options.lora_init != "default"):
        raise ConfigError(f"{name} is compared with plain LoRA: use_dora and lora_init would not reach it")


def _unsloth_model(package: Any, options: dict[str, Any]) -> Any:
    """A model with unsloth's kernels, and its adapters where the job trains any."""
    import torch

    checkpointing = options["gradient_checkpointing"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(options["model_dtype"])
    if dtype is None and not options["use_peft"]:
        dtype = torch.float32  # what trains is stored so by every arm; left to itself it would take bf16 for all
    recompute = "unsloth" if checkpointing in ("auto", "offload") else checkpointing
    model, _ = package.FastLanguageModel.from_pretrained(
        options["model_name"], max_seq_length=options["max_seq_length"], use_gradient_checkpointing=recompute,
        dtype=dtype, load_in_4bit=options.get("quantization") == "nf4", full_finetuning=not options["use_peft"],
        **_given(options, model_revision="revision", trust_remote_code="trust_remote_code"),
    )
    if not options["use_peft"]:
        return model
    targets = options["lora_target_modules"]
    if targets == "all-linear":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return package.FastLanguageModel.get_peft_model(
        model, r=options["lora_r"], lora_alpha=options["lora_alpha"], lora_dropout=options["lora_dropout"],
        target_modules=targets, random_state=options["seed"],
        use_gradient_checkpointing=recompute,
        **_given(options, lora_bias="bias", use_rslora="use_rslora", modules_to_save="modules_to_save"),
    )


def _given(options: dict[str, Any], **names: str) -> dict[str, Any]:
    """Those of the options that are set to something, by the names that unsloth has for them."""
    return {theirs: options[ours] for ours, theirs in names.items() if options[ours] not in (None, False, "none")}


def _unsloth_sft(job: Job, prepared: Prepared) -> Any:
    """unsloth's own SFT trainer as its documentation uses it: its preparation of rows, collator and compiled loss.

    Raises:
        BackendUnavailableError: trl was imported before unsloth, which then has not replaced its classes.
    """
    import trl

    from aligntune.backends.loading import precision_of
    from aligntune.backends.trl.options import trl_config

    options = job.options
    # Each of the first two, as our own trainer has them, would make it turn rows end to end off without an error.
    # padding_free unset is its default: it then decides, or UNSLOTH_PADDING_CHOICE does.
    args = trl_config(job, precision_of(job), eval_rows=0, fields={
        "dataset_kwargs": None, "max_length": options.max_seq_length,
        "padding_free": False if options.padding_free is False else None, "data_seed": options.seed})
    if not isinstance(args, trl.SFTConfig):
        raise BackendUnavailableError("unsloth must be imported before trl, in a process of its own")
    trainer = trl.SFTTrainer(model=options.model_name, args=args, processing_class=prepared.tokenizer,
                             train_dataset=prepared.train.select_columns(["input_ids"]))
    trainer.eval_dataset = prepared.eval  # an arm does not evaluate; the probe's rows are of these
    return trainer


PEERS: dict[str, Peer] = {
    "liger": Peer("liger_kernel", "pip install liger-kernel",
                  r"liger|rms_norm|swiglu|geglu|triton_rope", {"trainer_options": {"use_liger_kernel": True}}),
    "unsloth": Peer("unsloth", "pip install unsloth (in an environment of its own; --python-b names it)",
                    # Its own, and what it has torch compile. Rows end to end is its own default, which a config that
                    # says False would turn off.
                    r"rms_layernorm|fg_kernel|rope_embedding|cross_entropy|triton_(poi|red|per|tem)_fused",
                    sft_options={"padding_free": True}, model=_unsloth_model,
                    environment={"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": "{folder}/compiled"},
                    sft=_unsloth_sft,
                    lacks={"ppo": "it has no PPO with a critic",
                           "reward": "its model is loaded as a language model, which scores no sequences"}),
}


def prepare(name: str | None) -> Any:
    """Import a peer's package, before anything it wants to be imported before.

    Raises:
        BackendUnavailableError: this interpreter has no such package.
    """
    if name is None:
        return None
    peer = PEERS[name]
    try:
        return importlib.import_module(peer.package)
    except ImportError as error:
        raise BackendUnavailableError(f"the peer {name!r} is not here ({error}); {peer.install}") from error


def draw_adapters(model: Any, seed: int) -> int:
    """Set every LoRA A to peft's initial distribution, drawn from the seed and the parameter's name, and B to 0.

    A peer that makes its own adapters draws other numbers from the same seed, and training from other weights is no
    comparison.

    Returns:
        How many adapters were set.
    """
    import math

    import torch

    count = 0
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {plain(name)}".encode()))
            values = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(values)
            count += 1
        elif ".lora_B." in name:
            parameter.data.zero_()
    return count


def plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def learnt_whole(rows: Any) -> bool:
    """Whether every token of the prepared rows is learnt; the first of a row, which nothing predicts, may not be."""
    return all(row["labels"][1:] == row["input_ids"][1:] for row in rows)


class PeerBackend:
    """A backend of ours with the peer's own trainer in the place of ours where that can be given the same rows."""

    def __init__(self, peer: str, backend: Backend) -> None:
        self.peer, self.backend = peer, backend
        self.name, self.support, self.gates = backend.name, backend.support, backend.gates

    def available(self) -> Support:
        """Where the backend beneath is."""
        return self.backend.available()

    def build(self, job: Job, prepared: Prepared) -> Built:
        """The peer's trainer; its attestation says which class trains, and on which batches."""
        from aligntune.backends.base import Built

        notes: list[str] = []
        own = PEERS[self.peer].sft if job.spec.name == "sft" else None
        if own is not None and not learnt_whole(prepared.train):
            own = None
            notes.append(f"{self.peer}: rows with tokens that are not learnt go through aligntune's trainer around "
                         f"{self.peer}'s model; {self.peer}'s own may be faster")
        built = self.backend.build(job, prepared) if own is None else Built(own(job, prepared))
        return replace(built, attestation=lambda: {"peer": described(self.peer, built.trainer, notes)},
                       notices=[*built.notices, *notes])


def described(peer: str, trainer: Any, notes: list[str]) -> dict[str, Any]:
    """What an arm's result says of a peer's trainer."""
    collator = trainer.data_collator
    return {
        "name": peer, "trainer": _path(type(trainer)), "collator": _path(type(collator)),
        "padding_free": bool(getattr(collator, "padding_free", False)),
        "packing": bool(getattr(trainer.args, "packing", False)), "notes": notes,
    }


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def build(spec: ArmSpec, package: Any) -> Any:
    """The AlignTrainer of an arm."""
    from aligntune.algorithms import ALGORITHMS
    from aligntune.core.backend_factory import build_trainer, choose_backend
    from aligntune.core.resolve import resolve

    job = resolve(spec.overrides, spec.config, algorithms=ALGORITHMS.names(), what=f"the arm {spec.label!r}")
    model = PEERS[spec.peer].model if spec.peer is not None else None
    if spec.peer is not None:
        check(spec.peer, job)
    if spec.peer is None or model is None:
        return build_trainer(job)
    source = job.options.model_name
    if job.options.tokenizer_name is None:
        job.set("tokenizer_name", source)
    if is_builtin(source):
        job.set("model_name", str(model_path(source)))  # a peer knows folders and hub ids
    job.set("model_name", model(package, vars(job.options)))
    return build_trainer(job, backend=PeerBackend(spec.peer, choose_backend(job)))

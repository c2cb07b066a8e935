"""Mistakes, put into a built trainer before it trains; each is what a wrong backend might do."""

from __future__ import annotations

from typing import Any

import torch


def loss_scaled(trainer: Any) -> None:
    """The loss, and so the gradient, times 1.01."""
    inner = trainer.trainer
    compute_loss = inner.compute_loss

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = compute_loss(*args, **kwargs)
        return (found[0] * 1.01, found[1]) if isinstance(found, tuple) else found * 1.01

    inner.compute_loss = scaled


def layer_without_gradient(trainer: Any) -> None:
    """One layer's MLP passes its output on and gets no gradient."""
    for name, parameter in trainer.model.named_parameters():
        if "layers.1.mlp" in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


def leak_across_documents(trainer: Any) -> None:
    """The model is not told where documents begin: one sees those before it."""
    model = trainer.trainer.model
    forward = model.forward

    def joined(*args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = torch.arange(positions.shape[1])[None].expand_as(positions)
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("cu_seq", "max_length"))}
        return forward(*args, **kwargs)

    model.forward = joined


def without_kl(trainer: Any) -> None:
    """The loss has no KL term although beta > 0; the metric goes on as before."""
    inner = trainer.trainer
    compute_loss = inner.compute_loss

    def dropped(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = len(inner._metrics["train"]["kl"])
        loss = compute_loss(model, inputs, *args, **kwargs)
        kl = inner._metrics["train"]["kl"][before:]
        beta, inner.beta = inner.beta, 0.0
        lists = {name: list(values) for name, values in inner._metrics["train"].items()}
        try:
            plain = compute_loss(model, inputs, *args, **kwargs)
        finally:
            inner.beta = beta
            inner._metrics["train"].clear()
            inner._metrics["train"].update(lists)
        assert kl
        return plain + 0.0 * loss

    inner.compute_loss = dropped


def without_kl_metric(trainer: Any) -> None:
    """Neither loss nor metrics have a KL, though the configuration says beta > 0."""
    inner = trainer.trainer
    compute_loss = inner.compute_loss

    def dropped(*args: Any, **kwargs: Any) -> Any:
        beta, inner.beta = inner.beta, 0.0
        try:
            return compute_loss(*args, **kwargs)
        finally:
            inner.beta = beta

    inner.compute_loss = dropped


def mask_shifted_in_the_batch(trainer: Any) -> None:
    """The collator puts every label's place one token later."""
    inner = trainer.trainer
    collate = inner.data_collator

    def shifted(rows: Any) -> Any:
        batch = collate(rows)
        batch["labels"] = _later(batch["labels"], batch["input_ids"])
        return batch

    inner.data_collator = shifted


def mask_shifted_in_the_loss(trainer: Any) -> None:
    """The batch is right, the loss reads its mask one token late."""
    model = trainer.trainer.model
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None:
            kwargs["labels"] = _later(kwargs["labels"], kwargs["input_ids"])
        return forward(*args, **kwargs)

    model.forward = shifted


def _later(labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    learnt = torch.zeros_like(labels, dtype=torch.bool)
    learnt[:, 1:] = labels[:, :-1] != -100
    # Not past a row's end: what is padding has no label in any arm.
    learnt &= ids != ids.new_tensor(_PAD)
    return torch.where(learnt, ids, torch.full_like(labels, -100))


_PAD = 0  # of the builtin tokenizer


def other_order(trainer: Any) -> None:
    """The same rows, the other way round."""
    rows = trainer.trainer.train_dataset
    trainer.trainer.train_dataset = rows.select(range(len(rows) - 1, -1, -1))


def eager(trainer: Any) -> None:
    """Every promise is written down and no kernel is launched: the modules' own forwards run."""
    from aligntune.backends.fast import attachment_of, ledger

    for patch in attachment_of(trainer.model).patches:
        plain = type(patch.module).forward
        module = patch.module

        def counting(*args: Any, module: Any = module, plain: Any = plain, ops: Any = patch.static_ops,
                     **kwargs: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            for op in ops:
                ledger.promise(module, op, *tensors)
            return plain(module, *args, **kwargs)

        for name in ("forward", "_old_forward"):
            if module.__dict__.get(name) is patch.forward:
                module.__dict__[name] = counting
        object.__setattr__(patch, "forward", counting)

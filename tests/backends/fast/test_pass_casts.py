"""The factors of a pass are cast in one call: as many launches, the same numbers, and never a stale one."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune.backends.fast import attach, detach, lora
from aligntune.backends.fast.ops.lora import Adapter, LoraLinear, lora_linear_group
from tests.backends.fast.minis import batch, build
from tests.backends.fast.test_adapters import ALL, adapted, draw_b


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call of torch's copies."""
    found: list[int] = []
    run = torch._foreach_copy_

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        found.append(len(targets))
        run(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    return found


def step(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(), **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert float(loss.detach()) > 0.1 and all(float(grad.norm()) > 0 for grad in found.values())
    return found | {"loss": loss.detach()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_from_the_second_pass_on_there_is_one_call(calls: list[int]) -> None:
    model = adapted()
    attach(model)
    first = step(model)
    assert calls == [6, 2, 4, 2]  # A and B of each linear
    calls.clear()
    assert equal(step(model), first) and calls == [14]


def test_factors_that_changed_in_any_way_are_those_of_the_next_pass() -> None:
    model = adapted()
    attach(model)
    step(model)
    weights = [p for n, p in model.named_parameters() if "lora_" in n]
    for change in (lambda p: p.data.mul_(1.5), lambda p: setattr(p, "data", p.data * 0.7),
                   lambda p: p.detach().numpy().__imul__(-1.0)):  # which no version counter hears of
        for parameter in weights:
            change(parameter)
        found = step(model)
        fresh = copy.deepcopy(model)
        detach(fresh)
        attach(fresh)
        assert equal(step(fresh), found)
    assert weights


def test_other_adapters_than_before_and_none(calls: list[int]) -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    draw_b(model)
    attach(model)
    step(model)
    calls.clear()
    with model.disable_adapter(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch())
    assert calls == []
    default = step(model)
    assert calls == [14]  # a reference pass between makes no other
    calls.clear()
    model.set_adapter("other")
    other = step(model)
    assert calls == [6, 2, 4, 2] and not equal(other, default)
    calls.clear()
    assert equal(step(model), other) and calls == [14]
    model.set_adapter("default")
    assert equal(step(model), default)


def test_layers_that_are_recomputed_cast_their_own(calls: list[int]) -> None:
    model = adapted()
    attach(model)
    kept = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls.clear()
    assert equal(step(model), kept) and calls == [14, 6, 2, 4, 2]


def test_a_pass_that_ends_early_leaves_nothing_behind(calls: list[int]) -> None:
    model = adapted()
    attach(model)
    whole = step(model)
    broken = model.base_model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, output_logits=True)
    broken.remove()
    assert equal(step(model), whole)
    x, weight, a, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    calls.clear()
    lora_linear_group(x, [LoraLinear(weight, adapters=(Adapter(a, b),))])
    assert calls == [1]  # outside a pass: A alone, B has its type


def test_copies_have_their_own_and_nothing_stays_alive() -> None:
    model = adapted()
    attach(model)
    step(model)
    root = model.base_model.model
    twin = copy.deepcopy(model)
    assert lora._CASTS[root]._passes and twin.base_model.model not in lora._CASTS
    assert lora._CASTS[root]._ready is None and not lora._CASTS[root]._seen
    gone, factor = weakref.ref(root), weakref.ref(next(p for n, p in model.named_parameters() if "lora_A" in n))
    del model, root
    gc.collect()
    assert gone() is None and factor() is None and twin is not None


def test_adapters_that_take_turns_are_each_cast_in_one_call(calls: list[int]) -> None:
    """A reference's, and those that train."""
    model = adapted()
    for name in ("ref", "third"):
        model.add_adapter(name, model.peft_config["default"])
    draw_b(model)
    attach(model)
    for turn in range(3):
        for name in ("ref", "default"):
            model.set_adapter(name)
            calls.clear()
            step(model)
            assert calls == ([14] if turn else [6, 2, 4, 2])
    assert len(lora._CASTS[model.base_model.model]._passes) == 2
    model.set_adapter("third")
    step(model)
    assert len(lora._CASTS[model.base_model.model]._passes) == 2  # the one that was used the longest ago is let go of


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A group of one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_layers_that_fsdp_gathers_on_the_way_are_cast_one_by_one(calls: list[int], alone: Any) -> None:
    """As accelerate shards a PEFT model: its layers, and the PEFT model, but not the model in it."""
    from torch.distributed.fsdp import fully_shard

    def made() -> Any:
        torch.manual_seed(7)
        config = LoraConfig(r=3, target_modules=ALL, init_lora_weights="gaussian")
        model = get_peft_model(build("llama", num_hidden_layers=3), config)
        draw_b(model)
        return model.train()

    whole, model = made(), made()
    for one in (whole, model):
        attach(one)
        step(one)  # in one call from here on
    layers = model.base_model.model.model.layers
    for part in (*layers, model):
        fully_shard(part, mesh=alone, reshard_after_forward=True)
    assert len(layers) == 3
    for _ in range(3):
        calls.clear()
        expected = step(whole)
        assert calls == [42]
        calls.clear()
        found = step(model)
        assert calls == [6, 2, 4, 2] * 3
        assert equal({name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}, expected)


def test_layers_that_fsdp_1_gathers_are_known() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted()
    assert not lora._gathers(model) and not lora._gathers(None)
    layer = model.base_model.model.model.layers[0]
    layer.__class__ = type("Wrapped", (type(layer), FullyShardedDataParallel), {})
    assert lora._gathers(model)

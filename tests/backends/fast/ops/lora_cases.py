"""Random LoRA layers and their gradients, shared by the tests of LoRA."""

from __future__ import annotations

import torch

from aligntune.backends.fast.ops.lora import Adapter, LoraLinear, lora_mlp, lora_mlp_reference

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Maker:
    """Layers with random tensors, kept so that their gradients can be read; two makers of one seed make the same."""

    def __init__(self, device: str, *, seed: int = 0, dtype=torch.float32, weight_dtype=None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.weight_dtype = device, dtype, weight_dtype or dtype
        self.leaves: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, *shape: int, scale: float = 1.0, dtype=None, grad: bool = True) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator) * scale
        leaf = drawn.to(self.device, dtype or self.dtype).requires_grad_(grad)
        self.leaves[name] = leaf
        return leaf

    def linear(self, name, n, h, *, ranks=(4,), bias=False, adapter_bias=False, p=0.0, train_weight=False, scaling=1.5):
        weight = self.tensor(f"{name}.weight", n, h, scale=h**-0.5, dtype=self.weight_dtype, grad=train_weight)
        base_bias = self.tensor(f"{name}.bias", n, dtype=self.weight_dtype, grad=train_weight) if bias else None
        adapters = tuple(
            Adapter(
                a=self.tensor(f"{name}.{k}.a", r, h, scale=h**-0.5),
                # Not zero, as PEFT would begin: every gradient would be zero with it.
                b=self.tensor(f"{name}.{k}.b", n, r, scale=0.02 if k == 0 else 0.3),
                scaling=scaling + k,
                bias=self.tensor(f"{name}.{k}.bias", n) if adapter_bias else None,
                dropout=p,
            )
            for k, r in enumerate(ranks)
        )
        return LoraLinear(weight, base_bias, adapters)


def gradients(outs, maker: Maker, x: torch.Tensor, *, skip: tuple[int, ...] = ()) -> dict[str, torch.Tensor | None]:
    """Backward through every output, each with its own random gradient; the gradients by name."""
    generator = torch.Generator().manual_seed(99)
    kept = [(out, torch.randn(out.shape, generator=generator).to(out)) for out in outs]
    torch.autograd.backward(*zip(*[pair for i, pair in enumerate(kept) if i not in skip], strict=True))
    return {"x": x.grad, **{name: leaf.grad for name, leaf in maker.leaves.items()}}


def assert_same(ours: dict, theirs: dict, *, zero: tuple[str, ...] = (), tolerance=TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        if wanted is None:
            assert ours[name] is None, f"{name}: a gradient where torch has none"
            continue
        assert name in zero or float(wanted.norm()) > 0, f"{name}: torch's own gradient is 0"
        assert ours[name].dtype == wanted.dtype
        torch.testing.assert_close(ours[name], wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def run(fn, build, device, *, shape, x_grad=True, skip=(), seed=None, **options):
    """(outputs, gradients) of `fn` on fresh layers."""
    maker = Maker(device)
    layers = build(maker)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_(x_grad)
    keywords = {**options, **({"seed": seed} if seed is not None else {})}
    outs = fn(x, *layers, **keywords) if fn in (lora_mlp, lora_mlp_reference) else fn(x, layers, **keywords)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [out.detach() for out in outs], gradients(outs, maker, x, skip=skip)


def saved_bytes(function, *, not_counting) -> int:
    """Bytes that autograd keeps for backward, storages counted once, parameters and the input not."""
    known = {tensor.untyped_storage().data_ptr() for tensor in not_counting}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = function()  # noqa: F841  storages are told apart by address: none may be freed and taken again
    return sum(seen.values())

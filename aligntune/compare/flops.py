"""How much arithmetic a training step is, and how much the card could do: the two sides of MFU."""

from __future__ import annotations

from typing import Any

PEAK_TFLOPS = {
    "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "GH200": 989.4, "A100": 312.0, "A800": 312.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A40": 149.7, "A10G": 70.0, "A10": 125.0, "RTX 4090": 165.2,
    "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}
"""Dense bf16 (V100, T4: fp16) tensor-core peaks with fp32 accumulation, from the vendors' data sheets, in TFLOP/s."""


def peak_of(card: str | None) -> float | None:
    """The peak of a card by its name, in TFLOP/s; None where it is not in the table."""
    if card is None:
        return None
    for name, peak in PEAK_TFLOPS.items():
        if all(part in card for part in name.split()):
            return peak
    return None


def work(model: Any) -> dict[str, Any] | None:
    """What `step_flops` needs of a dense decoder; None for models whose arithmetic a count of weights does not tell.

    `linear`: weights of matrix products (a tied head counts, the embedding's look-up does not); `trained`: those of
    them that get a weight gradient; `attention`: layers x heads x head size.
    """
    import torch

    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    seen: dict[int, tuple[int, bool]] = {}
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and (weight.ndim == 2 or hasattr(weight, "quant_state")):
            shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
            seen[id(weight)] = (int(shape[0]) * int(shape[1]), weight.requires_grad)
    if not seen:
        return None
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return {"linear": sum(n for n, _ in seen.values()), "trained": sum(n for n, trains in seen.values() if trains),
            "attention": config.num_hidden_layers * heads * head_dim}


def step_flops(sizes: dict[str, Any], tokens: int, squared: int) -> float:
    """Floating-point operations of forward and backward, recomputation left out.

    Per token 2 N forward, 2 N for the inputs' gradients, 2 N for those of the weights that train; attention is causal:
    2 x 2 x (length^2 / 2) x width a layer forward, twice that backward.
    """
    linear = (4 * sizes["linear"] + 2 * sizes["trained"]) * tokens
    return float(linear + 3 * 2 * squared * sizes["attention"])

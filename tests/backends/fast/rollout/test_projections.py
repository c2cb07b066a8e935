"""What a decode step runs in the place of linear layers: under autocast, without adapters, over NF4; the head."""

from __future__ import annotations

import contextlib

import pytest
import torch

from aligntune.backends.fast import attach
from aligntune.backends.fast import lora as linears
from aligntune.backends.fast.ops import decode_linear as op
from aligntune.backends.fast.ops import decode_linear_nf4 as op_nf4
from aligntune.backends.fast.ops.nf4 import dequantize_nf4_reference
from aligntune.backends.fast.rollout import RolloutEngine, Sampling, projections
from aligntune.backends.fast.rollout.projections import Projections
from tests.backends.fast.rollout.test_engine import in_nf4, lora, mini, prompts_of

NEW = 5
SAMPLING = Sampling(max_new_tokens=NEW, temperature=0, stop_token_ids=())
BF16 = torch.bfloat16


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of x and of the weights, for every launch of `decode_linear`."""
    calls, launch = [], op.decode_linear

    def counting(x, weights, **options):
        calls.append((x.dtype, *(weight.dtype for weight in weights)))
        return launch(x, weights, **options)

    monkeypatch.setattr(op, "decode_linear", counting)
    return calls


def run(model, prompts, *, autocast=BF16, kernels=True, sampling=SAMPLING):
    engine = RolloutEngine(model, max_batch=len(prompts), max_len=64, graphs=False, autocast=autocast, kernels=kernels)
    return engine.generate(prompts, sampling=sampling), engine


def run_by_layers(model, prompts, **options):
    """The same rollout with every layer called, which casts its own weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Projections, "in_use", lambda self: contextlib.nullcontext())
        return run(model, prompts, **options)[0]


def apart(ours, other):
    """Largest and mean distance of two rollouts' log-probs; their tokens are the same."""
    assert ours.completion_ids == other.completion_ids
    distance = (torch.tensor(ours.log_probs) - torch.tensor(other.log_probs)).abs()
    return distance.max(), distance.mean()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", pytest.param("phi3", marks=pytest.mark.slow),
                                    pytest.param("granite", marks=pytest.mark.slow)])
def test_full_fine_tuning_under_autocast(family, seen, device):
    """fp32 weights, bf16: biases, tied heads, capped and scaled logits, packed layers; what the layers themselves give.

    Both round each output to bf16 once, of sums in fp32: they differ where sums of another order round elsewhere.
    """
    model, prompts = mini(family).to(device), prompts_of((2, 9, 17))
    attach(model)
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    theirs = run_by_layers(model, prompts)
    assert not seen
    ours, engine = run(model, prompts)
    most, mean = apart(ours, theirs)
    assert most < 0.02 and mean < 0.005
    layers = 2 * 4  # q, k and v; o; gate and up; down
    assert len(engine._decoder.capture.projections) == layers + 1
    assert len(seen) == layers * (NEW + 1) + NEW  # the prefill, of 25 tokens, has no logits
    assert {dtype for call in seen for dtype in call[1:]} == {torch.float32} and {call[0] for call in seen} == {BF16}
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert not any(linears.STEP in module.__dict__ for module in model.modules())


def test_outputs_are_those_of_autocast(device):
    """dtype and rounding of every group: no further from exact products of rounded numbers than the layers' own."""
    model = mini("qwen2").to(device)
    attach(model)
    made = Projections(model, autocast=BF16)
    made.refresh()
    with torch.no_grad(), torch.autocast(device, dtype=BF16, cache_enabled=False):
        for rows in (3, op.MAX_ROWS + 1):  # the second by cuBLAS
            for module, groups in made._groups:
                for names, projection in groups.items():
                    layers = [module.get_submodule(name) for name in names] or [module]
                    x = torch.randn(1, rows, layers[0].in_features, device=device)
                    for out, layer in zip(projection(x), layers, strict=True):
                        eager, kept = layer(x), layer.weight.to(BF16).double()
                        bias = 0.0 if layer.bias is None else layer.bias.to(BF16).double()
                        truth = torch.matmul(x.to(BF16).double(), kept.t()) + bias
                        assert out.dtype == eager.dtype == BF16 and out.shape == eager.shape
                        assert ((out - truth).abs() <= 1.001 * (truth.to(BF16) - truth).abs() + 1e-5).all()


def test_adapters_under_autocast(seen, device):
    """Adapters on an fp32 base: its weights are read as they are, the plain head's too."""
    model, prompts = lora(mini(), rank_pattern={"v_proj": 7}).to(device), prompts_of((2, 9))
    attach(model)
    theirs = run_by_layers(model, prompts)
    ours, _ = run(model, prompts)
    most, mean = apart(ours, theirs)
    assert most < 0.05 and mean < 0.02
    assert len(seen) == 2 * 4 * (NEW + 1) + NEW and all(call[1:] == (torch.float32,) * (len(call) - 1) for call in seen)
    by_torch, engine = run(model, prompts, kernels=False)
    assert len(engine._decoder.capture.projections) == 2 * 4 and len(seen) == 2 * 4 * (NEW + 1) + NEW
    most, mean = apart(by_torch, theirs)
    assert most < 0.05 and mean < 0.02


def test_plain_layers_in_16_bits(seen, device):
    """Layers on one input are one launch; a product that is one launch already is torch's."""
    model, prompts = mini(dtype=BF16).to(device), prompts_of((2, 9))
    attach(model)
    theirs = run_by_layers(model, prompts, autocast=None)
    ours, _ = run(model, prompts, autocast=None)
    most, mean = apart(ours, theirs)
    assert most < 0.05 and mean < 0.02
    assert [len(call) for call in seen] == [4, 3] * 2 * (NEW + 1)


def test_many_rows_and_a_prefill_take_torchs_products(seen, device):
    model, prompts = mini().to(device), prompts_of((op.MAX_ROWS + 2,))
    attach(model)
    sampling = Sampling(max_new_tokens=1, temperature=0, stop_token_ids=())
    engine = RolloutEngine(model, max_batch=1, max_len=128, graphs=False, autocast=BF16, kernels=True)
    engine.generate(prompts, sampling=sampling)
    assert len(seen) == 2 * 4 + 1  # one step


def test_what_is_called_as_it_is(seen, device):
    """Layers with hooks, of another type than autocast casts, and everything where no kernel runs."""
    model = mini().to(device)
    attach(model)
    of = lambda **options: {id(module) for module, _ in Projections(model, **options)._groups}  # noqa: E731
    every = of(autocast=BF16)
    assert len(every) == 2 * 3 + 1 and not of(autocast=BF16, kernels=False) and not of()
    first = model.model.layers[0]
    low = mini(dtype=BF16).to(device)
    attach(low)
    low.model.layers[0].self_attn.v_proj.float()  # without autocast it cannot be multiplied
    assert len(Projections(low)._groups) == 2 * 2 - 1
    hook = first.mlp.up_proj.register_forward_hook(lambda *_: None)
    head_hook = model.lm_head.register_forward_pre_hook(lambda *_: None)
    assert every - of(autocast=BF16) == {id(first.mlp), id(model.lm_head)}
    hook.remove()
    head_hook.remove()
    first.self_attn.o_proj.half()
    assert every - of(autocast=BF16) == {id(first.self_attn.o_proj)}
    attention = first.self_attn
    attention.k_proj.to(BF16)  # beside fp32 ones, which are cast before the launch: the kernel reads one type
    made = Projections(model, autocast=BF16)
    assert every - {id(module) for module, _ in made._groups} == {id(attention.o_proj)}
    x = torch.randn(3, attention.k_proj.in_features, device=device)
    with torch.no_grad(), torch.autocast(device, dtype=BF16, cache_enabled=False), made.in_use():
        assert len(seen) == 0
        _, key, _ = attention.__dict__[linears.STEP]["q_proj", "k_proj", "v_proj"](x)
        assert seen == [(BF16,) * 4]
        torch.testing.assert_close(key, attention.k_proj(x), atol=2**-7, rtol=2**-7)


def test_an_error_leaves_the_layers_as_they_were(device):
    model = mini().to(device)
    attach(model)
    own = model.lm_head.__dict__["forward"] = model.lm_head.forward  # as accelerate's unwrapping leaves it
    made = Projections(model, autocast=BF16)
    assert any(module is model.lm_head for module, _ in made._groups)
    with pytest.raises(ZeroDivisionError), made.in_use():
        assert model.lm_head.forward != own and "forward" in model.model.layers[1].self_attn.o_proj.__dict__
        _ = 1 / 0
    assert model.lm_head.__dict__["forward"] is own
    assert "forward" not in model.model.layers[1].self_attn.o_proj.__dict__


def test_the_trace_shows_the_launches(device):
    model = mini().to(device)
    attachment = attach(model)
    result = attachment.attest(lambda: run(model, prompts_of((5,)), sampling=Sampling(
        max_new_tokens=2, temperature=0, stop_token_ids=())))
    assert result.problems == () and not result.eager
    assert result.kernels["decode_linear_kernel"] == 2 * 4 * (2 + 1) + 2


# --------------------------------------------------------------------------------------------------------- four bits

BLOCKS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 1}  # rows begin with blocks


def traced(attachment, *args, **options):
    """A rollout, and its launches of linear layers' kernels."""
    kept = []
    result = attachment.attest(lambda: kept.append(run(*args, **options)[0]))
    assert result.problems == ()
    names = ("decode_linear_nf4_kernel", "decode_linear_kernel", "nf4_dequant_kernel")
    return kept[0], tuple(result.kernels.get(name, 0) for name in names)


@pytest.mark.parametrize(("dtype", "autocast"), [
    (torch.float16, None), (BF16, None), pytest.param(torch.float32, BF16, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_base_in_four_bits(dtype, autocast, monkeypatch, device):
    """Its codes are read by the step's launches; what unpacking and multiplying gives, of the same bits.

    Unpacked by torch: in the interpreter our kernel cuts bits off for bf16.
    """
    model, prompts = lora(in_nf4(mini(**BLOCKS, dtype=dtype)), size=0.03).to(device), prompts_of((2, 9))
    attachment = attach(model)
    ours, launched = traced(attachment, model, prompts, autocast=autocast)
    head = NEW if autocast else 0  # in fp32
    assert launched == (4 * (NEW + 1), head, 0)
    monkeypatch.setattr(op_nf4, "unreadable_because", lambda weights: "a test says so")
    monkeypatch.setattr(projections, "dequantize_nf4", dequantize_nf4_reference)
    theirs, launched = traced(attachment, model, prompts, autocast=autocast)
    assert launched == (0, 4 * (NEW + 1) + head, 0)
    most, mean = apart(ours, theirs)
    near = 2**-9 if dtype == torch.float16 else 2**-6
    assert most < near and mean < near / 4


def test_four_bits_that_no_launch_reads(device):
    """Rows that do not begin with a block, and layers beside plain ones, are unpacked as before; so are many rows."""
    model, prompts = in_nf4(mini(num_hidden_layers=1, dtype=torch.float16)).to(device), prompts_of((2,))
    _, launched = traced(attach(model), model, prompts, autocast=None)
    assert launched == (0, 4 * (NEW + 1), 7 * (NEW + 1))
    model = in_nf4(mini(**BLOCKS, dtype=torch.float16)).to(device)
    model.model.layers[0].self_attn.k_proj = torch.nn.Linear(64, 32, bias=False, dtype=torch.float16, device=device)
    _, launched = traced(attach(model), model, prompts, autocast=None)
    assert launched == (3 * (NEW + 1), NEW + 1, 2 * (NEW + 1))
    model = in_nf4(mini(**BLOCKS, dtype=torch.float16)).to(device)
    attachment, one = attach(model), Sampling(max_new_tokens=1, temperature=0, stop_token_ids=())
    for lengths, launched in (((40, 26), (2 * 4, 0, 0)), ((40, 27), (4, 0, 7))):  # all but the last token of each
        assert traced(attachment, model, prompts_of(lengths), autocast=None, sampling=one)[1] == launched

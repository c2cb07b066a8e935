"""What ran is read from a trace: exact counts, and wrappers that only count are caught."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from aligntune.backends.fast import attach, forwards, head, ledger, lora
from aligntune.backends.fast.attestation import _recorded, trace
from aligntune.backends.fast.ops import _runtime
from aligntune.backends.fast.ops.lora import lora_linear_group_reference, lora_mlp_reference
from aligntune.backends.fast.ops.rms_norm import rms_norm_reference
from aligntune.backends.fast.ops.rope import rope_reference
from aligntune.errors import ConfigError
from tests.backends.fast.minis import batch, build

LAYERS = 2


def attested(model: Any, **inputs: Any) -> Any:
    return attach(model).attest(lambda: model(**(inputs or batch())).loss.backward())


def test_counts_of_one_step_are_exact():
    result = attested(build("llama"))
    assert result.ok and result.backward and not result.replayed
    norms = 2 * LAYERS + 1
    expected = {
        "rms_norm_forward": norms,
        "rms_norm_backward": norms,
        "norm_weight_grad": norms,
        "rms_norm_again": 2 * LAYERS,
        "glu_forward": LAYERS,
        "glu_backward": LAYERS,
        "LoraLinearGroup": LAYERS,
        "LoraMLPBackward": LAYERS,
        "rope_forward": LAYERS,
        "rope_backward": LAYERS,
        "logits_loss": 1,
    }
    assert {name: result.kernels[name] for name in expected} == expected
    assert {name: result.promised[name] for name in expected} == expected
    assert set(result.promised) <= {*_runtime.KERNELS, *ledger.NODES}
    assert result.eager == ()


def test_torchs_list_of_events_says_what_the_recorded_ones_do():
    """Which is what is read where torch keeps them elsewhere."""
    model = build("llama")
    attach(model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**batch()).loss.backward()
    listed = SimpleNamespace(profiler=SimpleNamespace(kineto_results=None), events=profiler.events)
    found, others = (Counter(one for one in _recorded(each) if one[0] in {*_runtime.KERNELS, *ledger.NODES})
                     for each in (profiler, listed))
    assert found == others and found["rms_norm_forward", False] == 2 * LAYERS + 1
    assert found["LoraMLPBackward", False] == LAYERS


def test_a_frozen_model_has_no_weight_gradients_and_its_first_norm_no_backward():
    model = build("llama").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    result = attested(model)
    assert result.ok
    assert result.kernels["rms_norm_forward"] == 5 and result.kernels["rms_norm_backward"] == 4
    assert "norm_weight_grad" not in result.kernels and "norm_weight_grad" not in result.promised


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_counted_and_share_their_backward(reentrant):
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    result = attested(model)
    assert result.ok, result.problems
    assert result.kernels["rms_norm_forward"] == 2 * 2 * LAYERS + 1
    assert result.kernels["rms_norm_backward"] == 2 * LAYERS + 1
    assert result.promised == result.kernels or set(result.promised) <= set(result.kernels)
    assert result.promised["rms_norm_forward"] == result.kernels["rms_norm_forward"]
    assert result.promised["rms_norm_backward"] == result.kernels["rms_norm_backward"]


def test_a_step_without_backward_promises_none():
    model = build("llama")
    attachment = attach(model)

    def step() -> None:
        with torch.no_grad():
            model(**batch(), output_logits=True)
            model(**batch(), output_logits=True)

    result = attachment.attest(step)
    assert not result.backward and result.promised["rms_norm_forward"] == 2 * 5 == result.kernels["rms_norm_forward"]
    assert result.problems == () and "rms_norm_backward" not in result.promised


class Counting:
    """What an honest-looking wrapper would do: count, and call the torch twin."""

    def __init__(self, reference: Any):
        self.reference, self.calls = reference, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.reference(*args, **kwargs)


@pytest.mark.parametrize(
    ("where", "op", "reference", "calls", "missing"),
    [
        (forwards, "rms_norm", rms_norm_reference, 5, "rms_norm_"),
        (forwards, "rope", rope_reference, 2, "rope_"),
        (lora, "lora_mlp", lora_mlp_reference, 2, "glu_"),
        (lora, "lora_linear_group", lora_linear_group_reference, 2, "LoraLinearGroup"),
    ],
)
def test_a_wrapper_that_counts_and_calls_the_reference_is_caught(where, op, reference, calls, missing, monkeypatch):
    counting = Counting(reference)
    monkeypatch.setattr(where, op, counting)
    result = attested(build("llama"))
    assert counting.calls == calls
    assert not result.ok
    caught = [problem for problem in result.problems if problem.startswith(missing)]
    assert len(caught) == 2 and all("the trace shows 0" in problem for problem in caught)


def test_a_wrapper_that_cheats_every_other_time_is_caught(monkeypatch):
    calls = []
    real = forwards.rms_norm

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return (real if len(calls) % 2 else rms_norm_reference)(*args, **kwargs)

    monkeypatch.setattr(forwards, "rms_norm", sometimes)
    result = attested(build("llama"))
    assert "rms_norm_forward: the table promises 5 launches in this step, the trace shows 3" in result.problems


def test_a_kernel_that_runs_forward_only_is_caught(monkeypatch):
    real = forwards.rms_norm

    def forward_only(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            real(*args, **kwargs)
        return rms_norm_reference(*args, **kwargs)

    monkeypatch.setattr(forwards, "rms_norm", forward_only)
    result = attested(build("llama"))
    assert [problem.partition(":")[0] for problem in result.problems] == ["norm_weight_grad", "rms_norm_backward"]


def test_a_head_that_calls_the_reference_is_caught(monkeypatch):
    from aligntune.backends.fast.ops.head import HeadOutput, linear_cross_entropy_reference

    def counting(*args: Any, kept: Any = None, **kwargs: Any) -> HeadOutput:
        return HeadOutput(linear_cross_entropy_reference(*args, **kwargs)["loss"])

    monkeypatch.setattr(head, "linear_cross_entropy", counting)
    result = attested(build("llama"))
    assert any(problem.startswith("logits_loss: the table promises 1") for problem in result.problems)


def test_modules_that_did_not_run_are_named():
    model = build("llama")
    attachment = attach(model)
    result = attachment.attest(lambda: model.model.layers[0].mlp(torch.randn(1, 3, 44)))
    assert "model.layers.1.mlp: did not call glu in this step" in result.problems
    assert not any("layers.0.mlp" in problem for problem in result.problems)
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)
    result = attachment.attest(lambda: model(**batch()).loss.backward())
    assert result.problems == ("model.norm: its forward has been replaced since attach; attach again",)


def test_the_attestation_is_json_and_says_that_it_was_interpreted():
    model = build("mixtral")
    result = attested(model)
    found = json.loads(result.to_json())
    assert found["interpreter"] is _runtime.interpreting()
    assert found["ok"] is True and found["kernels"]["rms_norm_forward"] == 5
    assert found["summary"] == [str(line) for line in attach(model).report]
    assert "model.layers.*.mlp: eager, routed experts have no kernel" in found["summary"]
    if _runtime.interpreting():
        assert found["device"] == "cpu" and "Triton's interpreter" in str(result)


def test_strict_makes_a_broken_promise_an_error(monkeypatch):
    model = build("llama")
    attachment = attach(model, strict=True)
    assert attachment.attest(lambda: model(**batch()).loss.backward()).ok
    monkeypatch.setattr(lora, "lora_mlp", Counting(lora_mlp_reference))
    with pytest.raises(ConfigError, match="glu_forward: the table promises 2"):
        attachment.attest(lambda: model(**batch()).loss.backward())


def test_a_ledger_within_a_ledger_closes_itself_and_no_other():
    """A graph captured in the attested step before anything was written: both are empty, so they look alike."""
    with ledger.writing() as outer:
        with ledger.writing() as inner:
            pass
        assert ledger._open == [outer] and inner is not outer
    assert not ledger.attesting()


def test_the_step_runs_once_and_its_error_ends_the_attestation():
    model = build("llama")
    attachment = attach(model)
    runs = []

    def broken() -> None:
        runs.append(1)
        raise ValueError("inside the step")

    with pytest.raises(ValueError, match="inside the step"):
        attachment.attest(broken)
    assert runs == [1]
    with pytest.raises(RuntimeError, match="attested already"), ledger.writing():
        attachment.attest(lambda: None)
    assert attachment.attest(lambda: model(**batch()).loss.backward()).ok


def test_outside_an_attestation_nothing_is_written():
    model = build("llama")
    attach(model)
    with ledger.writing() as entries:
        pass
    model(**batch()).loss.backward()
    assert entries.entries == {}
    observed, backward = trace(lambda: model(**batch()).loss.backward())
    assert backward and observed["rms_norm_forward"] == 5


def test_a_replayed_step_is_held_against_one_call_of_each_module():
    """A graph replay runs kernels but no Python forward; this step runs neither."""
    attachment = attach(build("llama"))
    result = attachment.attest(lambda: None)
    assert result.replayed and not result.ok
    assert "rms_norm_forward: the table promises 5 launches in this step, the trace shows 0" in result.problems


def test_what_a_capture_promised_is_promised_for_its_replay():
    model = build("llama")
    attachment = attach(model)

    def run() -> None:
        model(**batch()).loss.backward()

    with ledger.writing() as captured:
        run()
    result = attachment.attest(lambda: ledger.replayed(captured))
    assert result.replayed and not result.backward
    assert not any("did not call" in problem for problem in result.problems)
    assert "rms_norm_forward: the table promises 5 launches in this step, the trace shows 0" in result.problems
    # The "replay" now runs what was captured, a step at a time.
    twice = attachment.attest(
        lambda: (ledger.replayed(captured), _unseen(run), ledger.replayed(captured), _unseen(run))
    )
    assert twice.ok and twice.replayed and twice.backward
    assert twice.promised["rms_norm_backward"] == 10 == twice.kernels["rms_norm_backward"]
    assert "LoraMLP" not in twice.promised


def _unseen(run: Any) -> None:
    """Run as a graph would: no forward writes down what it does."""
    held, ledger._open[:] = list(ledger._open), []
    run()
    ledger._open[:] = held


@pytest.mark.gpu
def test_the_kernels_of_a_graph_replay_are_in_the_trace():
    model = build("llama").cuda()
    attachment = attach(model)
    norm = model.model.norm
    x = torch.randn(4, 44, device="cuda")
    with torch.no_grad():
        norm(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(5):
                norm(x)
    observed, _ = trace(lambda: graph.replay())
    assert observed["rms_norm_forward"] == 5
    assert not attachment.attest(lambda: graph.replay()).ok  # the MLPs and the head were not in that graph


@pytest.mark.parametrize(("name", "kind"), [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0",
     "fused attention"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false>>", "fused attention"),
    ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>", "fused attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1_kernel0_0",
     "fused attention, backward"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128>>",
     "fused attention, backward"),
    ("segment_attention_forward", "fused attention"), ("segment_attention_dq", "fused attention, backward"),
    # one of each call is counted, not its helpers
    ("segment_attention_dkv", None),
    ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128, 128>>", None),
    ("void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<64, 128, 128>>", None),
    ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>", None),
    ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", None),
])
def test_kernels_of_fused_attention_are_known_by_name(name: str, kind: str | None) -> None:
    assert ledger.attention_kernel(name) == kind


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(32, 32), (20, 44)], ids=["dense", "ragged"])
def test_rows_end_to_end_attend_fused_and_a_matrix_of_scores_is_caught(lengths, monkeypatch):
    from aligntune.backends.fast.ops.attention import attention_reference
    from aligntune.backends.fast.packing import RowsEndToEnd

    model = build("llama").cuda().to(torch.bfloat16)
    flat = RowsEndToEnd(0)([{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths])
    flat.pop("num_tokens")
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in flat.items()}
    inputs["attention_mask"] = torch.empty((1, 1, 1, 0), dtype=torch.bool, device="cuda")

    def step() -> Any:
        return attach(model).attest(lambda: model(**inputs, use_cache=False).loss.backward())

    result = step()
    assert result.ok, result.problems
    assert result.promised["fused attention"] == result.promised["fused attention, backward"] == LAYERS
    assert result.kernels["fused attention"] >= LAYERS

    def by_scores(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attention_reference(*args, **kwargs)

    monkeypatch.setattr(forwards, "attention", by_scores)
    assert any(problem.startswith("fused attention: ") for problem in step().problems)

"""The rollout engine against transformers' generate: same tokens, same probabilities, whatever the batch does."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy
import pytest
import torch
from transformers.integrations.neftune import activate_neftune

from aligntune.backends.fast.rollout import RolloutEngine, Sampling, cannot_run_because
from aligntune.backends.fast.rollout.cache import PAGE, PagePool
from aligntune.errors import ConfigError
from tests.backends.fast.minis import MINIS, VOCAB, build

LENGTHS = (1, 3, 17, 33, 16, 5)
GREEDY = Sampling(max_new_tokens=20, temperature=0, stop_token_ids=(7,))


def prompts_of(lengths=LENGTHS, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


def mini(family="llama", **kwargs):
    return build(family, max_position_embeddings=128, **kwargs)


def theirs(model, prompts, **kwargs):
    """transformers' greedy completions, one prompt at a time: nothing is padded."""
    training = model.training
    model.eval()
    out = []
    for ids in prompts:
        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 7, "pad_token_id": 0} | kwargs
        tokens = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        out.append(tokens[0, len(ids) :].tolist())
    model.train(training)
    return out


def teacher_forced(model, prompt, completion, temperature=1.0):
    """log softmax(logits / temperature) of each token of a completion, from one forward."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    model.train(training)
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", MINIS)
def test_greedy_is_transformers_greedy(family):
    """Every family; more prompts than slots, of lengths around a page's; and the log-probs of what was drawn."""
    model, prompts = mini(family), prompts_of()
    rollout = RolloutEngine(model, max_batch=4, max_len=64).generate(prompts, sampling=GREEDY)
    expected = theirs(model, prompts)
    assert rollout.completion_ids == expected
    assert len({token for ids in expected for token in ids}) > 4
    assert rollout.finish_reasons == ["stop" if ids[-1] == 7 else "length" for ids in expected]
    for prompt, ids, log_probs in zip(prompts, rollout.completion_ids, rollout.log_probs, strict=True):
        truth = teacher_forced(model, prompt, ids)
        torch.testing.assert_close(torch.tensor(log_probs).double(), truth, atol=2e-5, rtol=2e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_that_transformers_pads_on_the_left(family):
    model, prompts = mini(family).eval(), prompts_of()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    padded = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=7,
                            pad_token_id=0)[:, longest:].tolist()
    cut = [row[: row.index(7) + 1] if 7 in row else row for row in padded]
    assert RolloutEngine(model, max_batch=6, max_len=64).generate(prompts, sampling=GREEDY).completion_ids == cut


def test_the_model_is_left_as_it_was():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = mini()
    model.model.layers[0].eval()
    names, modes = set(ALL_ATTENTION_FUNCTIONS), [module.training for module in model.modules()]
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    engine.generate(prompts_of((3,)), sampling=GREEDY)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(engine._decoder, "prefill", lambda prefixes: 1 / 0)
        engine.generate([[3] * 3], sampling=GREEDY)
    assert model.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert [module.training for module in model.modules()] == modes
    assert not any("aligntune" in key for module in model.modules() for key in module.__dict__)
    # The failed call gave its pages back.
    assert engine._decoder.pool.free == engine._decoder.pool.capacity


def test_noise_of_training_is_not_in_a_rollout():
    model, prompts = mini(), prompts_of((3, 9))
    quiet = RolloutEngine(model, max_batch=2, max_len=64).generate(prompts, sampling=GREEDY)
    activate_neftune(model, 50.0)
    noisy = RolloutEngine(model, max_batch=2, max_len=64).generate(prompts, sampling=GREEDY)
    assert (noisy.completion_ids, noisy.log_probs) == (quiet.completion_ids, quiet.log_probs)
    assert model.get_input_embeddings().training


def test_groups_share_a_prefill_and_draw_apart():
    model, prompts = mini(), prompts_of((35, 17))
    engine = RolloutEngine(model, max_batch=8, max_len=64)
    sampling = Sampling(max_new_tokens=12, stop_token_ids=(), seed=3)
    rollout = engine.generate(prompts, num_generations=4, sampling=sampling)
    assert rollout.stats.prefill_tokens == 34 + 16
    assert len({tuple(ids) for ids in rollout.completion_ids}) == 8
    for i, (ids, log_probs) in enumerate(zip(rollout.completion_ids, rollout.log_probs, strict=True)):
        truth = teacher_forced(model, prompts[i // 4], ids)
        torch.testing.assert_close(torch.tensor(log_probs).double(), truth, atol=2e-5, rtol=2e-5)
    # Two whole pages of the first prompt and one of the second are shared, the partial one (2 tokens) is not.
    assert rollout.stats.most_pages_used == 2 + 1 + 4 * 1 + 4 * 1


def test_what_a_row_draws_does_not_depend_on_the_batch():
    """The same completions from 1 slot, from 3 and from 16, at any stride, alone or among others."""
    model, prompts = mini("qwen3"), prompts_of((4, 20, 9))
    sampling = Sampling(max_new_tokens=15, temperature=0.9, stop_token_ids=tuple(range(3, 14)), seed=11)
    runs = [
        RolloutEngine(model, max_batch=slots, max_len=64, stride=stride).generate(
            prompts, num_generations=3, sampling=sampling)
        for slots, stride in ((16, 8), (1, 8), (3, 1), (5, 4))
    ]  # fmt: skip
    assert all(run.completion_ids == runs[0].completion_ids for run in runs[1:])
    assert all(run.finish_reasons == runs[0].finish_reasons for run in runs[1:])
    assert len({len(ids) for ids in runs[0].completion_ids}) > 2
    again = RolloutEngine(model, max_batch=16, max_len=64).generate(
        prompts, num_generations=3, sampling=dataclasses.replace(sampling, seed=12))
    assert again.completion_ids != runs[0].completion_ids


def test_refill_and_mixed_counts():
    model, prompts = mini(), prompts_of((5, 2, 9, 30))
    engine = RolloutEngine(model, max_batch=3, max_len=64)
    rollout = engine.generate(prompts, num_generations=[1, 5, 2, 3], sampling=GREEDY)
    expected = theirs(model, prompts)
    assert rollout.completion_ids == [ids for ids, n in zip(expected, (1, 5, 2, 3), strict=True) for _ in range(n)]
    pool = engine._decoder.pool
    assert pool.free == pool.capacity


def pool_of(pages):
    return PagePool(layers=2, k_heads=2, head_dim=12, pages=pages, dtype=torch.float32, device=torch.device("cpu"))


def test_prompts_that_wait_are_computed_with_those_that_come_in():
    """Twelve prompts on two slots: a prefill or two, not six; in a narrow cache they give their pages up again."""
    model, prompts = mini(), prompts_of(range(20, 32))
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    engine._new_pool = lambda: pool_of(60)
    rollout = engine.generate(prompts, sampling=GREEDY)
    assert rollout.completion_ids == theirs(model, prompts)
    assert rollout.stats.prefills <= 2
    assert rollout.stats.prefill_tokens == sum(len(ids) - 1 for ids in prompts)
    narrow = RolloutEngine(model, max_batch=2, max_len=64)
    narrow._new_pool = lambda: pool_of(16)
    again = narrow.generate(prompts, sampling=GREEDY)
    assert again.completion_ids == rollout.completion_ids
    assert again.stats.prefills > 2 and again.stats.preemptions == 0


def test_one_pass_through_autocast():
    """Weights in fp32 under bf16 autocast, as full training has them: the cache is bf16, and so is attention."""
    model, prompts = mini("qwen3"), prompts_of((9, 20))
    engine = RolloutEngine(model, max_batch=4, max_len=64, autocast=torch.bfloat16)
    rollout = engine.generate(prompts, sampling=Sampling(max_new_tokens=10, stop_token_ids=()))
    assert engine._decoder.pool._anchor.dtype == torch.bfloat16
    apart = [abs(a - b) for p, ids, scores in zip(prompts, rollout.completion_ids, rollout.log_probs, strict=True)
             for a, b in zip(scores, teacher_forced(model, p, ids).tolist(), strict=True)]
    assert 1e-6 < max(apart) < 0.3


@pytest.mark.parametrize("pages", [6, 8, 11])
def test_rows_that_lose_their_pages_go_on_where_they_were(pages, monkeypatch):
    """A cache far too small for its slots: the youngest rows are sent back, and draw what they would have drawn."""
    model, prompts = mini(), prompts_of((20, 18, 3, 33))
    sampling = Sampling(max_new_tokens=31, stop_token_ids=(7,), seed=5)
    wide = RolloutEngine(model, max_batch=12, max_len=64)
    expected = wide.generate(prompts, num_generations=3, sampling=sampling)
    narrow = RolloutEngine(model, max_batch=12, max_len=64)
    monkeypatch.setattr(narrow, "_new_pool", lambda: pool_of(pages + 1))
    rollout = narrow.generate(prompts, num_generations=3, sampling=sampling)
    assert rollout.stats.preemptions > 0 and expected.stats.preemptions == 0
    assert rollout.stats.most_pages_used <= pages
    assert rollout.completion_ids == expected.completion_ids
    for ours, first in zip(rollout.log_probs, expected.log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(first), atol=2e-5, rtol=2e-5)
    assert narrow._decoder.pool.free == pages


def test_stop_strings():
    class Letters:
        """Token i is the letter number i; decoding joins them."""

        eos_token_id = 2

        def decode(self, ids):
            return "".join(chr(ord("A") + i % 26) for i in ids)

    model, prompts, tokenizer = mini("qwen2"), prompts_of((4, 11, 6)), Letters()
    engine = RolloutEngine(model, tokenizer, max_batch=2, max_len=64, stride=4)
    free = engine.generate(prompts, num_generations=2, sampling=Sampling(max_new_tokens=24, stop_token_ids=()))
    texts = [tokenizer.decode(ids) for ids in free.completion_ids]
    string = texts[0][9:11]  # two letters, across no boundary of ours in particular
    rollout = engine.generate(prompts, num_generations=2, sampling=Sampling(
        max_new_tokens=24, stop_token_ids=(), stop_strings=(string, "no such text")))
    for text, ids, log_probs, why in zip(texts, rollout.completion_ids, rollout.log_probs, rollout.finish_reasons,
                                         strict=True):
        expected = text[: text.index(string) + 2] if string in text else text
        assert tokenizer.decode(ids) == expected
        assert len(log_probs) == len(ids)
        assert why == ("stop" if string in text else "length")
    assert rollout.finish_reasons[0] == "stop" and len(rollout.completion_ids[0]) <= 11
    with pytest.raises(ConfigError, match="no tokenizer"):
        RolloutEngine(model, max_len=64).generate(prompts, sampling=Sampling(max_new_tokens=4, stop_strings=("x",)))


def test_repetition_penalty_is_transformers():
    model, prompts = mini(), prompts_of((6, 19, 2))
    sampling = Sampling(max_new_tokens=20, temperature=0, stop_token_ids=(7,), repetition_penalty=1.7)
    rollout = RolloutEngine(model, max_batch=2, max_len=64).generate(prompts, sampling=sampling)
    expected = theirs(model, prompts, repetition_penalty=1.7)
    assert rollout.completion_ids == expected
    assert expected != theirs(model, prompts)


def test_temperature_scales_the_log_probs():
    model, prompts = mini(), prompts_of((6,))
    sampling = Sampling(max_new_tokens=9, temperature=0.6, top_k=5, stop_token_ids=())
    rollout = RolloutEngine(model, max_batch=2, max_len=64).generate(prompts, num_generations=2, sampling=sampling)
    for ids, log_probs in zip(rollout.completion_ids, rollout.log_probs, strict=True):
        truth = teacher_forced(model, prompts[0], ids, temperature=0.6)
        torch.testing.assert_close(torch.tensor(log_probs).double(), truth, atol=2e-5, rtol=2e-5)


def test_weights_that_change_in_place_are_seen():
    model, prompts = mini(), prompts_of((6, 12))
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    before = engine.generate(prompts, sampling=GREEDY).completion_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = engine.generate(prompts, sampling=GREEDY).completion_ids
    assert after == theirs(model, prompts) != before


def test_what_memory_held_before_changes_nothing(monkeypatch):
    """Of the cache too, which is training's between two calls."""
    model, prompts = mini("gemma3_text"), prompts_of()
    engine = RolloutEngine(model, max_batch=3, max_len=64)
    sampling = Sampling(max_new_tokens=18, stop_token_ids=(7,))
    first = engine.generate(prompts, sampling=sampling)
    decoder = engine._decoder
    assert decoder.pool.memory is None and engine.cache_bytes == decoder.pool.nbytes > 0
    stale, empty = [], torch.empty

    def used(*size, **kwargs):
        stale.append(empty(*size, **kwargs).fill_(float("nan")))
        return stale[-1]

    monkeypatch.setattr(torch, "empty", used)
    decoder.state.fill_(-7)
    decoder.table.fill_(3)
    decoder.outputs.tokens.fill_(55)
    decoder.outputs.log_probs.fill_(float("nan"))
    again = engine.generate(prompts, sampling=sampling)
    monkeypatch.undo()
    assert sum(one.nbytes == decoder.pool.nbytes for one in stale) == 1
    assert again.completion_ids == first.completion_ids
    assert again.log_probs == first.log_probs
    held = weakref.ref(decoder.pool)
    del decoder
    gc.disable()  # a collection may be long in coming
    try:
        engine.release()
        assert engine.cache_bytes == 0 and held() is None
    finally:
        gc.enable()
    assert engine.generate(prompts, sampling=sampling).completion_ids == first.completion_ids


def test_a_model_in_fp64_on_a_cpu():
    """No kernel takes it, and so nothing need know where its cache lies."""
    model, prompts = mini().double(), prompts_of()
    expected = theirs(model, prompts)
    engine = RolloutEngine(model, max_batch=3, max_len=64)
    for _ in range(3):
        assert engine.generate(prompts, sampling=GREEDY).completion_ids == expected


def test_a_call_that_memory_does_not_suffice_for(monkeypatch):
    """Says so, and leaves nothing behind."""
    model, prompts = mini(), prompts_of()
    engine = RolloutEngine(model, max_batch=3, max_len=64)
    expected = engine.generate(prompts, sampling=GREEDY).completion_ids

    def nothing_left(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for owner, name in ((torch, "empty"), (type(engine._decoder), "prefill")):
        assert engine.ran_out is False
        with monkeypatch.context() as scarce, pytest.raises(torch.OutOfMemoryError):
            scarce.setattr(owner, name, nothing_left)
            engine.generate(prompts, sampling=GREEDY)
        pool = engine._decoder.pool
        assert engine.ran_out and pool.memory is None and pool.free == pool.capacity
        assert engine.generate(prompts, sampling=GREEDY).completion_ids == expected


def lora(model, *, size=0.3, **kwargs):
    """Under adapters whose B has numbers of this size."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **kwargs))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    return adapted.train()


def test_unmerged_adapters_equal_merged_ones():
    model, prompts = lora(mini("qwen3"), lora_dropout=0.4), prompts_of()
    engine = RolloutEngine(model, max_batch=4, max_len=64)
    ours = engine.generate(prompts, sampling=GREEDY)
    with model.disable_adapter():
        off = engine.generate(prompts, sampling=GREEDY)
    assert off.completion_ids == theirs(mini("qwen3"), prompts)
    merged = model.merge_and_unload()
    assert ours.completion_ids == theirs(merged, prompts) != off.completion_ids


@pytest.mark.parametrize(("family", "one_launch"),
                         [("qwen2", True), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
                             ("qwen2", False), ("phi3", True), ("granite", False)))])
def test_attached_adapters(family, one_launch, monkeypatch, device):
    """What a step runs in the place of adapted layers: biases, packed layers, tied weights; ranks of 4 and 7.

    `one_launch`: a group's kernel, which in 16 bits on a GPU is taken without asking.
    """
    from aligntune.backends.fast import attach, detach
    from aligntune.backends.fast.ops import decode_linear as op
    from aligntune.backends.fast.rollout import projections

    if one_launch:
        made = projections.Projection.__post_init__

        def with_counts(self):
            self.counts = torch.zeros(op.MAX_PLACES, dtype=torch.int32, device=device)
            made(self)

        monkeypatch.setattr(projections.Projection, "__post_init__", with_counts)
    launched, launch = [], op.decode_linear
    monkeypatch.setattr(op, "decode_linear", lambda *args, **kwargs: launched.append(1) or launch(*args, **kwargs))

    prompts = prompts_of((2, 17, 9))
    model = lora(mini(family), rank_pattern={"v_proj": 7, "down_proj": 7})
    expected = theirs(model, prompts, max_new_tokens=6)
    calls, call = [], projections.Projection.__call__
    monkeypatch.setattr(projections.Projection, "__call__", lambda self, x: calls.append(x.shape) or call(self, x))
    attach(model.to(device))
    engine = RolloutEngine(model, max_batch=4, max_len=64, graphs=False)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=6)
    assert engine.generate(prompts, sampling=sampling).completion_ids == expected
    assert len(calls) == 2 * 4 * (6 + 1)  # layers, groups, steps and the prefill
    assert len(launched) == (len(calls) if one_launch else 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.5)
    after = engine.generate(prompts, sampling=sampling)
    detach(model)
    assert after.completion_ids == theirs(model.cpu(), prompts, max_new_tokens=6) != expected
    assert not any("_aligntune_step" in module.__dict__ for module in model.modules())


def in_nf4(model):
    """The model with bitsandbytes' own 4-bit layers in its blocks, quantised where it is."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                four = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4",
                                         compute_dtype=child.weight.dtype)
                four.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, four.to(child.weight.device))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def test_nf4_base(device):
    """Steps dequantise with our kernel."""
    from aligntune.backends.fast import attach

    model = lora(in_nf4(mini(hidden_size=64, head_dim=16, intermediate_size=128, num_hidden_layers=1)))
    prompts = prompts_of((2, 17))
    expected = theirs(model, prompts, max_new_tokens=3)
    attach(model.to(device))
    rollout = RolloutEngine(model, max_batch=4, max_len=64).generate(
        prompts, sampling=dataclasses.replace(GREEDY, max_new_tokens=3))
    assert rollout.completion_ids == expected


@pytest.mark.parametrize("family", MINIS)
def test_every_family_in_nf4_is_transformers_greedy(family):
    model = lora(in_nf4(mini(family, hidden_size=64, head_dim=16, intermediate_size=128)))
    prompts = prompts_of((2, 17, 9))
    expected = theirs(model, prompts, max_new_tokens=6)
    rollout = RolloutEngine(model, max_batch=4, max_len=64).generate(
        prompts, sampling=dataclasses.replace(GREEDY, max_new_tokens=6))
    assert rollout.completion_ids == expected and len({token for ids in expected for token in ids}) > 2


def in_fp8(device, **kwargs):
    """An attached model under adapters whose base has e4m3 copies, and the layer that the tests write to."""
    from aligntune.backends.fast import attach, fp8_base

    model = lora(mini(**({"hidden_size": 48, "intermediate_size": 80, "head_dim": 16} | kwargs)), size=0.03)
    assert fp8_base.install(model.to(device))[0] == 14
    attach(model)
    return model, model.base_model.model.model.layers[0].mlp.down_proj


def test_a_base_with_e4m3_copies_is_read_as_training_reads_it(device):
    """Prefill and steps, with adapters and without; copies that are stale are made again before a rollout."""
    from aligntune.backends.fast import lora as linears
    from aligntune.backends.fast.ops.fp8 import quantize_rows

    model, down = in_fp8(device)
    prompt = prompts_of((19,))[0]
    engine = RolloutEngine(model, max_batch=2, max_len=64, graphs=False)
    sampling = Sampling(max_new_tokens=5, temperature=0, stop_token_ids=())

    def apart(rollout):
        ids = rollout.completion_ids[0]
        with torch.no_grad():
            whole = torch.tensor([prompt + ids], device=device)
            log_probs = model.eval()(whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        truth = log_probs.gather(1, whole[0, -len(ids) :, None])[:, 0].cpu()
        return (truth - torch.tensor(rollout.log_probs[0])).abs().max()

    rollout = engine.generate([prompt], sampling=sampling)
    assert apart(rollout) < 1e-5
    with model.disable_adapter():
        assert apart(engine.generate([prompt], sampling=sampling)) < 1e-5
    kept = engine._decoder.capture.fingerprint
    held = {m: m.__dict__.pop(linears.FP8) for m in model.modules() if linears.FP8 in m.__dict__}
    assert apart(rollout) > 1e-3  # what the weights themselves give
    engine._decoder._keep_graphs()
    assert engine._decoder.capture.fingerprint != kept
    for module, found in held.items():
        module.__dict__[linears.FP8] = found
    # A replayed step reads the copies where they are: those of a weight that was written are made again before it.
    copies = down.base_layer.__dict__[linears.FP8]
    with torch.no_grad():
        down.base_layer.weight.mul_(-2)
    engine._decoder._keep_graphs()
    assert torch.equal(copies.weight.row_scale, quantize_rows(down.base_layer.weight.detach())[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "qwen3_moe", "smollm3"])
def test_kernels_under_an_attached_model(family, device):
    """Attached forwards, LoRA, decode attention, cache writes and sampling: interpreted here, compiled on a GPU."""
    from aligntune.backends.fast import attach, detach

    prompts = prompts_of((2, 17))
    model = mini(family)
    expected = theirs(model, prompts, max_new_tokens=4)
    attach(model.to(device))
    engine = RolloutEngine(model, max_batch=2, max_len=64, kernels=True)
    sampling = Sampling(max_new_tokens=4, temperature=0, stop_token_ids=(7,))
    rollout = engine.generate(prompts, sampling=sampling)
    detach(model)
    assert rollout.completion_ids == expected


def test_a_rollout_is_attested(device):
    """What the engine promised to launch, per layer and step, is in the trace; a step that takes the twins is told."""
    from aligntune.backends.fast import attach
    from aligntune.backends.fast.ops import decode_attention as paged

    model = mini()
    attachment = attach(model.to(device))
    engine = RolloutEngine(model, max_batch=2, max_len=64, kernels=True)
    run = lambda: engine.generate(prompts_of((5,)), sampling=dataclasses.replace(GREEDY, max_new_tokens=2))  # noqa: E731
    result = attachment.attest(run)
    assert result.problems == ()
    assert result.kernels["decode_attention_kernel"] >= 2 * 2 == result.promised["decode_attention_kernel"]
    assert result.promised["write_kv_kernel"] == 2 * (1 + 2) and result.promised["sample_finish"] == 2
    if device == "cpu":
        kernel, paged.decode_attention = paged.decode_attention, paged.decode_attention_reference
        try:
            problems = attachment.attest(run).problems
        finally:
            paged.decode_attention = kernel
        assert any("decode_attention_kernel: the table promises 4 launches" in line for line in problems)


def test_faults_are_told_together():
    engine = RolloutEngine(mini(), max_batch=2, max_len=32)
    with pytest.raises(ConfigError) as error:
        engine.generate([[], [3] * 30, [4]], sampling=Sampling(max_new_tokens=4))
    assert "prompt 0 is empty" in str(error.value) and "prompt 1 has 30 tokens" in str(error.value)
    four = Sampling(max_new_tokens=4)
    with pytest.raises(ConfigError) as error:
        engine.generate([[3, VOCAB], [-1], [2.5], "text", [VOCAB - 1]], sampling=four)
    assert error.value.faults == (
        f"prompt 0 holds token {VOCAB}: the model has embeddings of 0 to {VOCAB - 1}",
        f"prompt 1 holds token -1: the model has embeddings of 0 to {VOCAB - 1}",
        "prompt 2 is [2.5]: a list of token ids is wanted", "prompt 3 is 'text': a list of token ids is wanted")
    for counts in ([1], [1, 0], [1, 2.0], 2.5, "2"):
        with pytest.raises(ConfigError, match="num_generations: .* for 2 prompts; a whole number from 1"):
            engine.generate([[4], [5]], num_generations=counts, sampling=four)
    assert len(engine.generate(torch.tensor([[4], [5]]), num_generations=(1, 2), sampling=four).completion_ids) == 3
    with pytest.raises(ConfigError, match=r"(?s)max_batch = 2.5: .*max_len = 1: must be a whole number from 2"):
        RolloutEngine(mini(), max_batch=2.5, max_len=1)


WRONG = {"max_new_tokens": (0, 2.5, None), "temperature": (float("nan"), "1", -1.0), "top_k": (2.5, True, -1),
         "top_p": (0.0, "0.9", None), "min_p": (2.0, "0.1"), "repetition_penalty": (0.0, None),
         "stop_token_ids": (2, ("2",), (2.0,)), "stop_strings": ("\n", ("",), (3,), None), "seed": (-1, 0.5, 2**63)}


def test_samplings_that_cannot_be_are_told_together():
    for turn in range(4):
        given = {name: values[turn % len(values)] for name, values in WRONG.items()}
        with pytest.raises(ConfigError) as error:
            Sampling(**given)
        assert [fault.partition(" = ")[0] for fault in error.value.faults] == list(WRONG)
    whole = numpy.int64(3)
    sampling = Sampling(max_new_tokens=whole, temperature=1, top_k=whole, top_p=1, stop_token_ids=[whole], seed=whole)
    engine = RolloutEngine(mini(), max_batch=2, max_len=32)
    assert len(engine.generate([[4]], sampling=sampling).completion_ids[0]) <= 3


def test_what_it_cannot_run_is_said_at_creation():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    with pytest.raises(ConfigError, match="model type 'gpt2' is not in the table"):
        RolloutEngine(gpt2)
    assert "no causal language model" in cannot_run_because(mini().model)
    assert cannot_run_because(mini()) is None
    with pytest.raises(ConfigError, match="graphs=True: the model is not on a GPU"):
        RolloutEngine(mini(), graphs=True)
    # 256 pages and 2, of keys and values of 2 heads of 12 numbers in fp32 and 2 layers: 6 KiB.
    with pytest.raises(ConfigError, match=r"one row of 4096 tokens needs 1\.51 MiB, 0\.102 MiB of cache are there"):
        RolloutEngine(mini(), max_len=4096, memory_gib=1e-4)
    engine = RolloutEngine(mini(), max_len=64, max_batch=9, memory_gib=12 * 6144 / 2**30)
    assert engine.generate([[3]], sampling=GREEDY).stats.pages == 11


def test_a_prompt_that_fits_no_cache_is_refused():
    engine = RolloutEngine(mini(), max_batch=1, max_len=64)
    engine.generate([[3]], sampling=GREEDY)
    pool = engine._decoder.pool
    held = pool.take(pool.capacity - 1)
    pool._holders, pool._free = pool._holders[:3], [1, 2]
    with pytest.raises(ConfigError, match=f"pages of {PAGE} tokens; the cache has 2"):
        engine.generate([[3] * 40], sampling=GREEDY)
    assert held

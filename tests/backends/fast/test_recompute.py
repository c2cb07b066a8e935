"""Layers recomputed by our function: the same gradients as kept ones, and as torch's own checkpointing."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aligntune.backends.fast import host_buffers, recompute
from aligntune.backends.fast.host_buffers import HostBuffers
from aligntune.backends.fast.recompute import Recompute, install, kept_bytes, recompute_of, remove

LAYERS = 4


def model(*, dropout: float = 0.0, train: str = "all") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=dropout)
    made = LlamaForCausalLM(config).train()
    if train == "layers":  # as under LoRA: the first layer's input asks for no gradient
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("q_proj" in name or "down_proj" in name)
    return made


def gradients(made: Any, *, seed: int = 3) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    made.zero_grad()
    loss = made(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-7, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("first", [None, 0, 1, 3])
@pytest.mark.parametrize("train", ["all", "layers"])
def test_gradients_are_those_of_kept_layers(offload: bool, first: int | None, train: str) -> None:
    loss, expected = gradients(model(train=train))
    made = model(train=train)
    made.gradient_checkpointing_disable()
    ours = install(made, offload=offload)
    assert ours is not None
    ours.first = first
    made.gradient_checkpointing_enable()
    calls = count_forwards(made)
    ours_loss, found = gradients(made)
    assert ours_loss == pytest.approx(loss, rel=1e-6)
    equal(found, expected)
    recomputed = LAYERS if first is None else first
    assert calls == [2] * recomputed + [1] * (LAYERS - recomputed)
    equal(gradients(made)[1], expected)  # buffers that were lent once


def count_forwards(made: Any) -> list[int]:
    calls = [0] * LAYERS
    for number, layer in enumerate(made.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    return calls


@pytest.mark.parametrize("offload", [False, True])
def test_dropout_draws_the_same_again(offload: bool) -> None:
    """The mask of the second run is the first's: gradients equal those of a run that keeps everything."""
    expected = gradients(model(dropout=0.4))[1]
    other = gradients(model(dropout=0.4), seed=4)[1]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(expected[name], other[name], rtol=1e-2)
    made = model(dropout=0.4)
    install(made, offload=offload)
    made.gradient_checkpointing_enable()
    equal(gradients(made)[1], expected)


def test_the_random_state_after_a_step_is_that_of_a_plain_one() -> None:
    drawn = []
    for with_ours in (False, True):
        made = model(dropout=0.4)
        if with_ours:
            install(made)
            made.gradient_checkpointing_enable()
        gradients(made)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_autocast_of_the_forward_is_that_of_the_recomputation() -> None:
    def step(made: Any) -> dict[str, torch.Tensor]:
        ids = torch.arange(13)[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = made(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside, as trainers do
        return {name: p.grad for name, p in made.named_parameters()}

    expected = step(model())
    made = model()
    install(made)
    made.gradient_checkpointing_enable()
    found = step(made)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], expected[name])
    full = gradients(model())[1][name]
    assert not torch.equal(expected[name], full)


def test_a_passing_disable_and_enable_keeps_ours() -> None:
    """TRL turns checkpointing off around a reference pass and on again."""
    made = model()
    ours = install(made)
    assert ours is not None
    made.gradient_checkpointing_enable()
    ours.choose(2)
    made.gradient_checkpointing_disable()
    assert not made.is_gradient_checkpointing
    made.gradient_checkpointing_enable()
    assert [layer.gradient_checkpointing for layer in made.model.layers] == [True, True, False, False]
    assert all(layer._gradient_checkpointing_func.func == ours.run for layer in made.model.layers)


def test_install_takes_over_what_is_on_already_and_remove_gives_it_back() -> None:
    made = model()
    made.gradient_checkpointing_enable()
    plain = set(made.__dict__)
    assert embedded(made).requires_grad
    ours = install(made)
    assert not embedded(made).requires_grad
    made.gradient_checkpointing_enable()
    assert not embedded(made).requires_grad  # nobody wants that gradient
    assert ours is not None and recompute_of(made) is ours
    assert made.model.layers[1]._gradient_checkpointing_func.func == ours.run
    remove(made)
    assert recompute_of(made) is None and plain ^ set(made.__dict__) <= {"_require_grads_hook", "_require_grads_hooks"}
    assert all("checkpoint" in layer._gradient_checkpointing_func.func.__name__ for layer in made.model.layers)
    found, expected = gradients(made)[1], gradients(model())[1]
    equal(found, {name: expected[name] for name in found})


def embedded(made: Any) -> torch.Tensor:
    for parameter in made.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    return made.get_input_embeddings()(torch.arange(3))


def test_a_copy_of_the_model_recomputes_its_own_layers() -> None:
    made = model()
    install(made)
    made.gradient_checkpointing_enable()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.model.layers[1].mlp.up_proj.weight.mul_(2)
    calls = count_forwards(twin)
    equal(gradients(twin)[1], _scaled_reference())
    assert calls == [2] * LAYERS
    assert recompute_of(twin) is not recompute_of(made)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: saved_and_loaded(made)], ids=["copied", "saved"])
def test_a_copied_or_saved_model_has_host_memory_of_its_own(copied: Any) -> None:
    made = model()
    ours = install(made, offload=True)
    made.gradient_checkpointing_enable()
    expected = gradients(made)[1]
    twin = copied(made)
    theirs = recompute_of(twin)
    assert ours is not None and ours.buffers.free
    assert theirs is not None and theirs.offload and theirs.buffers is not ours.buffers and not theirs.buffers.free
    equal(gradients(twin)[1], expected)
    assert theirs.buffers.free.keys() == ours.buffers.free.keys()


def saved_and_loaded(made: Any) -> Any:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _scaled_reference() -> dict[str, torch.Tensor]:
    plain = model()
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(2)
    return gradients(plain)[1]


def test_without_gradients_nothing_is_kept() -> None:
    made = model()
    ours = install(made, offload=True)
    assert ours is not None
    made.gradient_checkpointing_enable()
    with torch.no_grad():
        made(input_ids=torch.arange(5)[None], use_cache=False)
    assert not ours.buffers.free and ours.last_out is None


def test_a_forward_without_a_backward_leaves_the_next_step_whole() -> None:
    expected = gradients(model())[1]
    made = model()
    install(made, offload=True)
    made.gradient_checkpointing_enable()
    made(input_ids=torch.arange(5)[None], use_cache=False)
    equal(gradients(made)[1], expected)


@pytest.mark.parametrize("how", ["let go of", "fails"])
def test_forwards_without_a_backward_give_their_places_back(how: str) -> None:
    """An evaluation in train mode, a loss that raises: each took its buffers for good, until the host was full."""
    made, expected = model(), gradients(model())[1]
    ours = install(made, offload=True)
    assert ours is not None
    made.gradient_checkpointing_enable()
    places = (LAYERS - 1) * 1024  # of 7 x 32 numbers
    ours.buffers.room = 2 * places
    if how == "fails":
        made.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) if how == "fails" else contextlib.nullcontext():
            made(input_ids=torch.arange(7)[None], use_cache=False)
    assert ours.buffers.room == places
    made.model.norm._forward_pre_hooks.clear()
    ours.buffers.room = float("inf")
    equal(gradients(made)[1], expected)


def test_two_forwards_before_their_backwards() -> None:
    """A pairwise loss runs the model twice: inputs of the first must not be written over by the second."""
    def step(made: Any) -> dict[str, torch.Tensor]:
        first = made(input_ids=torch.arange(7)[None], use_cache=False).logits
        second = made(input_ids=torch.arange(20, 29)[None], use_cache=False).logits
        (first.logsumexp(-1).sum() * 0.3 - second.logsumexp(-1).mean()).backward()
        return {name: p.grad for name, p in made.named_parameters()}

    made = model()
    install(made, offload=True)
    made.gradient_checkpointing_enable()
    equal(step(made), step(model()))


def test_a_model_without_such_layers_is_left_alone() -> None:
    made = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert install(made) is None and recompute.KEY not in made.__dict__


def test_host_buffers_are_lent_again() -> None:
    buffers = HostBuffers()
    ours = Recompute([torch.nn.Identity() for _ in range(3)], offload=True, buffers=buffers)
    for _ in range(3):
        x = torch.ones(5, 7, requires_grad=True)
        y = x
        for number in range(3):
            y = ours.run(number, lambda t: t * 3, y)
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((5, 7), 27.0))
    assert {size: len(held) for size, held in buffers.free.items()} == {256: 2}  # the last layer's stays


def tripled(ours: Recompute) -> torch.Tensor:
    """Three layers that each multiply by 3: forward, to be followed by its backward."""
    y = torch.ones(5, 7, requires_grad=True)
    for number in range(3):
        y = ours.run(number, lambda t: t * 3, y)
    return y


def test_what_a_graph_copies_through_is_lent_to_no_launched_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay writes to the addresses of its capture: an input that waits there must not be written over."""
    buffers = HostBuffers(room=4 * 256)
    ours = Recompute([torch.nn.Identity() for _ in range(3)], offload=True, buffers=buffers)

    def held(shelf: dict[int, list[torch.Tensor]]) -> set[int]:
        assert {size for size, hosts in shelf.items() if hosts} <= {256}
        return {host.data_ptr() for host in shelf.get(256, [])}

    tripled(ours).sum().backward()
    first = held(buffers.free)
    assert len(first) == 2 and buffers.room == 2 * 256
    for _ in range(2):  # the second graph's go where the first one's went, as their memory pool is one
        monkeypatch.setattr(host_buffers, "capturing", lambda _: True)
        tripled(ours).sum().backward()
        assert held(buffers.captured) == first and not held(buffers.free), "what launched steps let go of is captured"
    assert buffers.room == 2 * 256
    waiting, unfinished = buffers.captured[256], []
    for host in waiting:
        host.fill_(7)  # as the replay of a forward does
    monkeypatch.setattr(host_buffers, "capturing", lambda _: False)
    for _ in range(2):
        tripled(ours).sum().backward()
        unfinished.append(tripled(ours))  # and one whose backward is still to come
        assert held(buffers.captured) == first and not first & held(buffers.free)
    assert all((host == 7).all() for host in waiting) and len(waiting) == 2
    assert buffers.room == 0, "the host is full: inputs stay where they are, and nothing is taken from graphs"


@pytest.mark.parametrize("offload", [False, True])
def test_layers_that_no_gradient_comes_to_run_once(offload: bool) -> None:
    """An input that nobody waits for would still be on its way when its memory is another's."""
    def frozen() -> Any:
        made = model(train="layers")
        made.model.layers[:2].requires_grad_(False)
        return made

    expected = gradients(frozen())[1]
    made = frozen()
    ours = install(made, offload=offload)
    made.gradient_checkpointing_enable()
    calls = count_forwards(made)
    equal(gradients(made)[1], expected)
    assert calls == [1, 1, 2, 2] and len(expected) == 4
    # The third layer's; the last one's stays, and those before are wanted by nobody.
    assert ours is not None and sum(map(len, ours.buffers.free.values())) == offload


def test_kept_bytes_needs_a_gpu() -> None:
    assert kept_bytes(lambda x: x, (torch.ones(2),)) == (0, 0)


def test_attaching_again_leaves_it_and_detaching_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from aligntune.backends.fast import attach, detach

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = model()
    attach(made)
    ours = install(made, offload=True)
    made.gradient_checkpointing_enable()
    attach(made)
    assert ours is not None and recompute_of(made) is ours
    assert made.model.layers[0]._gradient_checkpointing_func.func == ours.run
    detach(made)
    assert recompute_of(made) is None
    equal(gradients(made)[1], gradients(model())[1])


def test_the_peak_of_a_measured_forward_is_read_before_a_layer_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and anew when a step is measured again."""
    made = model()
    ours = install(made)
    assert ours is not None
    made.gradient_checkpointing_enable()
    seen: list[list[str]] = []

    def gradients_there() -> int:
        seen.append([name for name, p in made.named_parameters() if p.grad is not None])
        return 100 + len(seen)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", gradients_there)
    gradients(made)
    assert seen == [] and ours.forward_peak is None
    for times in (1, 2):
        ours.measure = True
        gradients(made)
        gradients(made)
        assert ours.forward_peak == 100 + times and len(seen) == times
        assert not any("layers" in name for name in seen[-1]) and "lm_head.weight" in seen[-1]

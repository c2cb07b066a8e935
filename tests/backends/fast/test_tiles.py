"""Recomputed layers by tiles of rows: the numbers of whole layers, for less memory."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune.backends.fast import attach, detach, host_buffers, recompute, tiles
from aligntune.backends.fast.attachment import base_model
from aligntune.backends.fast.recompute import install
from aligntune.backends.fast.tiles import Halves, Sums, Tiles, plan, rows_of
from tests.backends.fast import minis

ATTACHED = [name for name in minis.MINIS if name not in ("olmo2", "mixtral", "qwen3_moe")]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def small(monkeypatch: pytest.MonkeyPatch, *, rows: int) -> None:
    """Tiles of so many rows of 44 features, and sums that are never too large."""
    monkeypatch.setattr(tiles, "FEWEST_NUMBERS", rows * 44)
    monkeypatch.setattr(tiles, "FEWEST_GROUPED", 1)
    monkeypatch.setattr(tiles, "ROUND", 1)
    monkeypatch.setattr(tiles, "plan", lambda call, args, parameters=(): plan(call, args, ()))


def adapted(family: str = "llama", *, dropout: float = 0.0, targets: Any = "all-linear", **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(minis.build(family, **options), LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def recomputed(model: Any, *, offload: bool = False, attached: bool = True) -> Any:
    if attached:
        attach(model)
    base = base_model(model)
    assert install(base, offload=offload) is not None
    base.gradient_checkpointing_enable()
    return model


def step(model: Any, batch: dict[str, Any] | None = None, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of one backward from the last hidden states, and these."""
    torch.manual_seed(3)
    model.zero_grad()
    batch = minis.batch(rows=2, length=11) if batch is None else batch
    inner = {name: value for name, value in batch.items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = base_model(model).base_model(**inner, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found and all(g.abs().max() > 0 for g in found.values())
    return found | {"": hidden.detach()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 3e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance * scale, msg=name)


class Spy:
    """What was planned, and how often the MLP's half of a layer ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Tiles | None] = []
        self.rows: list[int] = []
        inner, call = tiles.plan, Halves.__call__

        def planned(*args: Any) -> Tiles | None:
            self.plans.append(inner(*args))
            return self.plans[-1]

        def counted(halves: Halves, hidden: torch.Tensor) -> torch.Tensor:
            self.rows.append(hidden.shape[0] * hidden.shape[1])
            return call(halves, hidden)

        monkeypatch.setattr(tiles, "plan", planned)
        monkeypatch.setattr(Halves, "__call__", counted)


def ends(lengths: list[int]) -> dict[str, Any]:
    """Rows end to end, as trainers hand them to the model."""
    total = sum(lengths)
    at = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.randint(3, minis.VOCAB, (1, total), generator=torch.Generator().manual_seed(1)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "cu_seq_lens_q": at, "cu_seq_lens_k": at,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
        "attention_mask": torch.empty((1, 1, 1, 0), dtype=torch.bool),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=() if name in ("gemma3_text", "phi3", "granite") else pytest.mark.slow)
    for name in ATTACHED])
def test_every_family_trains_the_same_by_tiles(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(recomputed(adapted(family)))
    small(monkeypatch, rows=5)
    spy = Spy(monkeypatch)
    found = step(recomputed(adapted(family)))
    assert spy.plans and set(spy.plans) == {Tiles(6, 22)} and not spy.rows
    same(found, expected)


@pytest.mark.parametrize(("lengths", "offload"), [
    ([6] * 3, True), ([3, 13, 8], True), pytest.param([24], False, marks=pytest.mark.slow),
    pytest.param([4] * 7, False, marks=pytest.mark.slow), pytest.param([8, 8, 8], False, marks=pytest.mark.slow),
])
def test_rows_end_to_end(lengths: list[int], offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length go through attention by groups of whole sequences, others as a whole."""
    expected = step(recomputed(adapted(), offload=offload), ends(lengths))
    small(monkeypatch, rows=6)
    spy = Spy(monkeypatch)
    found = step(recomputed(adapted(), offload=offload), ends(lengths))
    group = {(6,) * 3: 6, (8,) * 3: 8, (4,) * 7: 4}.get(tuple(lengths), sum(lengths))
    assert spy.plans and {planned.group for planned in spy.plans} == {group} and not spy.rows
    same(found, expected)


@pytest.mark.slow
def test_what_trains_as_a_whole_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(recomputed(minis.build("qwen3")))
    small(monkeypatch, rows=5)
    same(step(recomputed(minis.build("qwen3"))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_sums_are_rounded_once(dtype: torch.dtype) -> None:
    parameter = torch.zeros(3, dtype=dtype)
    sums = Sums([parameter, torch.zeros(2)])
    parts = [torch.tensor([1.0, 2.0, 4.0], dtype=dtype), *[torch.full((3,), 2.0**-9, dtype=dtype)] * 8]
    for part in parts:
        sums.add([part, None])
    total, none = sums.rounded()
    assert none is None and total is not None and total.dtype == dtype
    exact = torch.stack(parts).double().sum(0)
    assert torch.equal(total, exact.to(dtype)) and torch.equal(parts[0], torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    naive = parts[0].clone()
    for part in parts[1:]:
        naive += part
    assert dtype == torch.float16 or not torch.equal(naive, total)


def test_a_gradient_that_somebody_holds_is_not_written_into() -> None:
    sums = Sums([torch.zeros(2), torch.zeros(2)])
    held = [torch.ones(2), torch.full((2,), 5.0)]
    sums.add(held)
    sums.add([torch.ones(2), None])
    sums.add([torch.ones(2), torch.ones(2)])
    assert held[0].tolist() == [1, 1] and held[1].tolist() == [5, 5]
    assert [total.tolist() for total in sums.rounded() if total is not None] == [[3, 3], [6, 6]]


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "phi3"])
def test_dropout_draws_in_the_recomputation_what_the_forward_drew(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against finite differences along the gradient: with other masks in the second run the gradient is another's."""
    options = {"resid_pdrop": 0.3} if family == "phi3" else {}
    small(monkeypatch, rows=5)
    model = recomputed(adapted(family, dropout=0.4, dtype=torch.float32, **options))
    spy = Spy(monkeypatch)
    weights = torch.randn(2, 11, 44, generator=torch.Generator().manual_seed(4))
    batch = {name: value for name, value in minis.batch().items() if name != "labels"}

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return (base_model(model).base_model(**batch, use_cache=False).last_hidden_state * weights).sum()

    loss().backward()
    trained = [(p, p.grad.clone()) for name, p in model.named_parameters() if "mlp" in name and p.grad is not None]
    norm = torch.cat([g.flatten() for _, g in trained]).norm()
    assert norm > 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in trained:
                p.add_(g, alpha=sign * 1e-3 / norm.item())
        values.append(loss().item())
        with torch.no_grad():
            for p, g in trained:
                p.sub_(g, alpha=sign * 1e-3 / norm.item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(norm.item(), rel=2e-2)
    assert set(spy.plans) == {Tiles(6, 22)}


@pytest.mark.slow
def test_autocast_and_a_residual_wider_than_the_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(recomputed(adapted()), autocast=True)
    whole = step(recomputed(adapted()))
    small(monkeypatch, rows=5)
    spy = Spy(monkeypatch)
    found = step(recomputed(adapted()), autocast=True)
    assert set(spy.plans) == {Tiles(6, 22)}
    off = max((whole[name] - expected[name]).abs().max() / whole[name].abs().max() for name in whole)
    assert off > 1e-3
    same(found, expected, tolerance=float(off) / 2)


def test_a_first_layer_whose_input_asks_for_no_gradient_and_mlp_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["gate_proj", "down_proj"]
    expected = step(recomputed(adapted(targets=targets)))
    small(monkeypatch, rows=5)
    same(step(recomputed(adapted(targets=targets))), expected)


@pytest.mark.slow
def test_accumulation_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows=5)
    model = recomputed(adapted(), offload=True)
    once = step(model)
    hidden = [base_model(model).base_model(input_ids=minis.batch()["input_ids"],
                                           attention_mask=minis.batch()["attention_mask"]).last_hidden_state]
    (hidden[0] * torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-7)


def test_without_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recomputed(adapted())
    with torch.no_grad():
        expected = model(**minis.batch(), use_cache=False).loss
        small(monkeypatch, rows=5)
        spy = Spy(monkeypatch)
        found = model(**minis.batch(), use_cache=False).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and not spy.rows and spy.plans[0] == Tiles(6, 22)


# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(("tokens", "hidden", "unpacks", "rows"), [
    (8192, 2048, False, 4096),
    (4096, 2048, False, 4096),
    (8191, 2048, False, 8191),  # two would be too small
    (10_000, 2048, False, 5120),
    (4096, 4096, False, 2048),
    (4096, 4096, True, 4096),
    (16384, 4096, True, 4096),
    (342_733, 4096, True, 22_912),  # a fifteenth
    (131_072, 2048, False, 8192),
    (10, 44, False, 10),
])
def test_rows_of_a_tile(tokens: int, hidden: int, unpacks: bool, rows: int) -> None:
    assert rows_of(tokens, hidden, unpacks=unpacks) == rows


def call(width: int = 8192, **kwargs: Any) -> Halves:
    module = torch.nn.Identity()
    return Halves(module, module, *[lambda *_: None] * 4, kwargs, width)  # type: ignore[arg-type]


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_what_is_tiled_and_what_is_not() -> None:
    x = meta(1, 8192, 2048)
    assert plan(call(), [x]) == Tiles(4096, 8192) == plan(call(), [meta(4, 2048, 2048)])
    assert plan(call(width=0), [x]) is None and plan(lambda h: h, [x]) is None
    assert plan(call(), [x, None]) is None and plan(call(), [meta(8192, 2048)]) is None
    assert plan(call(), [meta(1, 0, 2048)]) is None and plan(call(), [meta(1, 2048, 2048)]) is None
    lora, full = [torch.empty(16, 90_000, device="meta")], [torch.empty(3 * 2048, 8192, device="meta")]
    assert plan(call(), [x], lora) == Tiles(4096, 8192)
    assert plan(call(), [x], full) is None  # the sums would take more than tiles save
    assert plan(call(), [meta(1, 131_072, 2048)], full) == Tiles(8192, 131_072)


def flat(rows: int, length: int, **more: Any) -> dict[str, Any]:
    return {"cu_seq_lens_q": torch.empty(rows + 1, device="meta"), "max_length_q": length,
            "attention_mask": torch.empty((1, 1, 1, 0)), "position_ids": meta(1, rows * length), **more}


def test_a_call_of_the_class_is_taken_apart() -> None:
    """How transformers 5.17 asks for recomputation: before the layer's forward has been reached."""
    model = recomputed(adapted())
    layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
    asked = functools.partial(super(type(layer), layer).__call__, position_ids=None)
    parts = tiles.parts_of(asked)
    assert isinstance(parts, Halves) and parts.module is layer and parts.width
    assert parts.kwargs == {"position_ids": None}
    assert tiles.parts_of(parts) is parts and tiles.parts_of(step) is step
    other = functools.partial(layer.mlp.__call__)
    assert tiles.parts_of(other) is other
    handle = layer.register_forward_hook(lambda *_: None)
    assert tiles.parts_of(asked) is asked
    handle.remove()
    detach(model)
    assert tiles.parts_of(asked) is asked


def test_a_class_that_asks_before_its_forward_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(recomputed(adapted()))

    def asks(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(torch.nn.Module.__call__.__get__(self), **kwargs)
        return self._gradient_checkpointing_func(call, *args) if self.gradient_checkpointing else call(*args)

    model = recomputed(adapted())
    for layer in (m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")):
        layer.__dict__["_aligntune"].checkpoints = False
        monkeypatch.setattr(type(layer), "__call__", asks, raising=False)
    small(monkeypatch, rows=5)
    spy = Spy(monkeypatch)
    same(step(model), expected)
    assert spy.plans and set(spy.plans) == {Tiles(6, 22)} and not spy.rows


def test_groups_of_whole_sequences() -> None:
    def planned(rows: int, length: int, **more: Any) -> Tiles | None:
        return plan(call(**flat(rows, length, **more)), [meta(1, 32_768, 2048)])

    assert planned(16, 2048) == planned(64, 512) == planned(8, 4096) == planned(4, 8192) == Tiles(4096, 8192)
    assert planned(2, 16_384) == Tiles(4096, 16_384) and planned(1, 32_768) == Tiles(4096, 32_768)
    assert planned(16, 2048, something=[3], use_cache=False) == Tiles(4096, 8192)
    masked = {"attention_mask": torch.ones(1, 1, 1, 1)}
    for other in ({"max_length_q": 4000}, {"something": {"of": [meta(8192)]}}, masked):
        assert plan(call(**(flat(16, 2048) | other)), [meta(1, 32_768, 2048)]) == Tiles(4096, 32_768)
    # Fewer sequences make no more than tiles do.
    assert plan(call(**flat(4, 2048)), [meta(1, 8192, 2048)]) == Tiles(4096, 8192)


@pytest.mark.parametrize("where", [pytest.param("mlp", marks=pytest.mark.slow), "mlp.gate_proj"])
def test_hooks_see_whole_rows(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows=5)
    model = recomputed(minis.build("llama"))
    seen: list[int] = []
    model.get_submodule(f"model.layers.1.{where}").register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    spy = Spy(monkeypatch)
    step(model)
    assert spy.plans == [Tiles(6, 22), None] and seen == [11, 11] and spy.rows == [22, 22]


@pytest.mark.parametrize("family", [
    pytest.param("olmo2", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_layers_that_see_rows_together_run_as_a_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows=5)
    spy = Spy(monkeypatch)
    step(recomputed(minis.build(family)))
    # Of Qwen 3's mixture the first layer here has an MLP.
    assert spy.plans == {"qwen3_moe": [Tiles(6, 22), None]}.get(family, [None, None])


def test_one_tile_is_the_whole_layer_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step(recomputed(adapted()))
    small(monkeypatch, rows=12)  # 22 rows are not two tiles of 12
    spy = Spy(monkeypatch)
    found = step(recomputed(adapted()))
    assert set(spy.plans) == {None} and spy.rows == [22] * 4
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_a_copy_tiles_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows=5)
    model = recomputed(adapted())
    expected = step(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(step(twin), expected)


# ---------------------------------------------------------------------------------------------------------- host memory


def test_a_full_host_leaves_inputs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_hidden_layers": 5}
    expected = step(recomputed(adapted(**options), attached=False))
    model = recomputed(adapted(**options), offload=True, attached=False)
    ours = recompute.recompute_of(base_model(model))
    assert ours is not None
    ours.buffers.room = 2 * 4096  # two inputs of 22 x 44 x 4 bytes
    same(step(model), expected)
    assert {size: len(held) for size, held in ours.buffers.free.items()} == {4096: 2} and ours.buffers.room == 0
    same(step(model), expected)


def test_large_inputs_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffers, "PIECE", 1024)
    expected = step(recomputed(adapted(), attached=False))
    model = recomputed(adapted(), offload=True, attached=False)
    same(step(model), expected)
    ours = recompute.recompute_of(base_model(model))
    assert ours is not None
    assert {size: len(held) for size, held in ours.buffers.free.items()} == {1024: 4}  # 3,872 bytes


def test_room_is_what_the_control_group_leaves(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   2048 kB\n", "/sys/fs/cgroup/memory.max": "1000000\n",
             "/sys/fs/cgroup/memory.current": "900000\n", "/sys/fs/cgroup/memory.stat": "anon 3\ninactive_file 50000\n"}

    def path(name: str) -> Any:
        file = tmp_path / name.replace("/", "_")
        if name in files:
            file.write_text(files[name])
        else:
            file.unlink(missing_ok=True)
        return file

    monkeypatch.setattr(host_buffers, "Path", path)
    assert host_buffers.host_room() == 150_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert host_buffers.host_room() == 2048 << 10
    del files["/proc/meminfo"]
    assert host_buffers.host_room() is None


def test_a_second_backward_through_an_offloaded_layer_is_refused() -> None:
    model = recomputed(minis.build("llama"), offload=True, attached=False)
    loss = model(**minis.batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()

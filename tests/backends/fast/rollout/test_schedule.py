"""The host's side of a rollout, without a model: pages, slots, the queue, under random prompts, lengths and memory."""

from __future__ import annotations

import random

import pytest
import torch

from aligntune.backends.fast.rollout.cache import PAGE, PagePool, pages_for
from aligntune.backends.fast.rollout.schedule import Row, Schedule
from aligntune.errors import ConfigError


def pool_of(pages: int) -> PagePool:
    return PagePool(layers=1, k_heads=1, head_dim=1, pages=pages + 1, dtype=torch.float32, device=torch.device("cpu"))


class Simulation:
    """Runs a schedule as the engine does. The cache holds, in place of keys, which tokens were written where."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        draw = self.random.randint
        self.slots, self.stride, self.limit = draw(1, 7), draw(1, 20), draw(1, 60)
        self.prompts = [[self.random.randrange(1000) for _ in range(draw(1, 50))] for _ in range(draw(1, 9))]
        least = max(pages_for(len(p) + self.limit - 1) for p in self.prompts) + 1
        self.pool = pool_of(least + draw(0, 12))
        self.schedule = Schedule(self.pool, slots=self.slots, stride=self.stride, ahead=draw(0, 200),
                                 collect=self.collect)
        self.cache: dict[int, int] = {}
        self.rows: list[Row] = []
        self.drawn: dict[int, list[int]] = {}
        for prompt in self.prompts:
            group = [Row(len(self.rows) + g, prompt, self.limit) for g in range(draw(1, 5))]
            self.schedule.add(prompt, group)
            self.rows += group
        # What each row will draw is settled by its number: nothing that happens to it may change that.
        self.fate = {row.number: [1000 + 100 * row.number + i for i in range(draw(1, self.limit))] for row in self.rows}

    def collect(self, row: Row) -> None:
        assert row.slot >= 0
        row.drawn = self.fate[row.number][: row.count]

    def write(self, pages: list[int], at: int, token: int) -> None:
        self.cache[pages[at // PAGE] * PAGE + at % PAGE] = token

    def check(self, row: Row) -> None:
        """Every token that the row has fed is in its pages, at its place."""
        tokens = row.prompt + self.fate[row.number][: row.count]
        assert row.cached == len(tokens) - 1
        found = [self.cache[row.pages[at // PAGE] * PAGE + at % PAGE] for at in range(row.cached)]
        assert found == tokens[:-1]

    def fill(self) -> None:
        schedule = self.schedule
        schedule.grow()
        admitted = schedule.admit()
        for tokens, pages in admitted.prefixes:
            for at, token in enumerate(tokens):
                self.write(pages, at, token)
        for source, target in admitted.copies:
            for place in range(PAGE):
                self.cache[target * PAGE + place] = self.cache.get(source * PAGE + place, -1)
        before = {id(row): row.slot for row in schedule.running}
        moves = schedule.settle()
        assert [row.slot for row in schedule.running] == list(range(len(schedule.running)))
        assert {a for a, _ in moves}.isdisjoint(b for _, b in moves)
        assert sorted(moves) == sorted((before[id(row)], row.slot) for row in schedule.running
                                       if before[id(row)] not in (row.slot, self.slots))
        assert len(schedule.running) <= self.slots
        for row in admitted.rows:
            assert row.token == (row.prompt + self.fate[row.number][: row.count])[-1]
            assert row.offset == row.count
            self.check(row)

    def run(self) -> None:
        schedule, rounds = self.schedule, 0
        while not schedule.done:
            rounds += 1
            assert rounds < 5000, "it goes on for ever"
            self.fill()
            assert schedule.running
            for row in list(schedule.running):
                fate = self.fate[row.number]
                for _ in range(self.stride):
                    self.write(row.pages, row.cached, (row.prompt + fate[: row.count])[-1])  # fails without a page
                    row.count += 1
                    if row.count == len(fate):
                        break
                row.token = fate[row.count - 1]
            for row in list(schedule.running):
                self.check(row)
            for row in list(schedule.running):
                if row.count == len(self.fate[row.number]):
                    schedule.finish(row, "stop")


@pytest.mark.parametrize("seed", range(150))
def test_every_row_gets_through_with_its_own_tokens(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run()
    assert all(row.reason == "stop" and row.count == len(simulation.fate[row.number]) for row in simulation.rows)
    assert simulation.pool.free == simulation.pool.capacity
    assert simulation.pool.most_used <= simulation.pool.capacity


def test_the_simulations_reach_what_they_should() -> None:
    preempted = ahead = 0
    for seed in range(150):
        simulation = Simulation(seed)
        look, counted = simulation.schedule._look_ahead, []
        simulation.schedule._look_ahead = lambda a, look=look, counted=counted: (  # type: ignore[method-assign]
            counted.append(-len(a.prefixes)), look(a), counted.append(len(a.prefixes)))
        simulation.run()
        preempted += simulation.schedule.preemptions > 0
        ahead += sum(counted) > 0
    assert preempted > 10 and ahead > 20, (preempted, ahead)


def test_pages() -> None:
    pool = pool_of(3)
    assert pool.capacity == pool.free == 3
    first = pool.take(2)
    assert 0 not in first
    pool.hold(first[:1])
    pool.drop(first)
    assert pool.free == 2
    with pytest.raises(AssertionError, match="3 pages wanted"):
        pool.take(3)
    pool.drop(first[:1])
    assert pool.free == 3 and pool.most_used == 2
    with pytest.raises(AssertionError, match="dropped twice"):
        pool.drop(first[:1])
    with pytest.raises(AssertionError, match="no holder"):
        pool.hold(first[:1])
    with pytest.raises(ConfigError, match="holds nothing"):
        pool_of(0)


def test_copy() -> None:
    pool = PagePool(layers=2, k_heads=3, head_dim=5, pages=6, dtype=torch.float32, device=torch.device("cpu"))
    with pool.standing():
        pool.memory.copy_(torch.arange(pool.memory.numel()).view(pool.memory.shape))
        before = pool.memory.clone()
        pool.copy([(1, 4), (2, 5)])
        for layer in range(pool.layers):
            for side, pages in enumerate(pool.layer(layer)[:2]):
                assert torch.equal(pages[4], before[layer, side, 1]) and torch.equal(pages[5], before[layer, side, 2])
                assert torch.equal(pages[:4], before[layer, side, :4])
    assert PagePool.page_bytes(layers=16, k_heads=8, head_dim=64, dtype=torch.bfloat16) == 32 * 1024 * PAGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stands_while_rows_run_and_moves(dtype: torch.dtype) -> None:
    """What a kernel is told of it is where it lies then."""
    pool = PagePool(layers=3, k_heads=2, head_dim=8, pages=5, dtype=dtype, device=torch.device("cpu"))
    assert pool.memory is None and pool.nbytes == 3 * 2 * 5 * 2 * PAGE * 8 * dtype.itemsize
    seen, held = [], []
    for _ in range(2):
        with pool.standing():
            assert pool.memory.nbytes == pool.nbytes
            held.append(pool.memory)  # so that the second lies elsewhere
            for index in range(3):
                *sides, place = pool.layer(index)
                for pages, elements in zip(sides, place.elements.tolist(), strict=True):
                    assert pages.shape == (5, 2, PAGE, 8) and elements % PAGE == 0
                    assert place.anchor.data_ptr() + elements * dtype.itemsize == pages.data_ptr()
                seen.append((place.elements.data_ptr(), place.elements.tolist()))
            with pool.standing():
                assert pool.memory is held[-1]
            assert pool.memory is held[-1], "what was there before is not given back"
        assert pool.memory is None
    assert [at for at, _ in seen[:3]] == [at for at, _ in seen[3:]] and seen[0][1] != seen[3][1]
    with pytest.raises(RuntimeError), pool.standing():
        raise RuntimeError
    assert pool.memory is None, "after an error too"


def test_a_row_that_fits_no_cache() -> None:
    schedule = Schedule(pool_of(4), slots=2, stride=8, ahead=0, collect=lambda row: None)
    schedule.add([1] * PAGE, [Row(0, [1] * PAGE, 2 * PAGE + 1)])
    with pytest.raises(ConfigError, match="needs 5 pages of 16 tokens; the cache has 4"):
        schedule.add([1] * PAGE, [Row(1, [1] * PAGE, 2 * PAGE + 2)])

"""Which rows run, in which slots, on which pages: the host's side of a rollout, without a tensor.

Prompts wait in a queue. Rows of one prompt share its whole pages; each takes a copy of the partial one. A row holds
pages for the tokens it has and for those of the next few steps, not for the longest completion it might become: when
pages run out, the prompt that is being handed out gives up its own first, then the youngest row goes back to the front
of the queue. Resumed, it is prefilled with what it had drawn, and goes on drawing what it would have drawn: random
numbers depend on the row and the position alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from aligntune.backends.fast.rollout.cache import PAGE, PagePool, pages_for
from aligntune.errors import ConfigError


@dataclass
class Row:
    """One completion on its way.

    `number` is its place in the results and in the random stream. It has drawn `count` tokens; those in `drawn` have
    been read from the device, where its line of outputs begins with token number `offset`. `token` is fed next.
    `shown`: the slot whose table has its pages, and how many of them.
    """

    number: int
    prompt: list[int]
    limit: int
    token: int = 0
    count: int = 0
    offset: int = 0
    drawn: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    age: int = 0
    reason: str | None = None
    shown: tuple[int, int] = (-1, 0)

    @property
    def cached(self) -> int:
        """Tokens in the cache before the next step: all but the last."""
        return len(self.prompt) + self.count - 1

    @property
    def most_cached(self) -> int:
        """Tokens in the cache when the row is full: its last one is never fed to the model."""
        return len(self.prompt) + self.limit - 1


@dataclass
class Prefix:
    """Tokens that waiting rows start from, and their pages once they are computed."""

    tokens: list[int]
    rows: deque[Row]
    pages: list[int] | None = None


@dataclass
class Admitted:
    """Work before the next step: prefixes to compute (tokens, pages), pages to copy, and the rows that came in."""

    prefixes: list[tuple[list[int], list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Schedule:
    """Rows waiting and running.

    Args:
        pool: the pages.
        slots: rows that may run at once.
        stride: steps between two looks at the device; a running row always has pages for that many.
        ahead: tokens of a prefill up to which prompts that still wait are computed with it.
        collect: fetches a row's drawn tokens from the device, before it loses its slot.
    """

    def __init__(
        self, pool: PagePool, *, slots: int, stride: int, ahead: int, collect: Callable[[Row], None]
    ) -> None:
        self.pool, self.slots, self.stride, self.ahead, self._collect = pool, slots, stride, ahead, collect
        self.waiting: deque[Prefix] = deque()
        self.running: list[Row] = []  # at index i the row in slot i
        self.preemptions = 0
        self.grown: set[int] = set()  # slots whose page table has changed since `settle`
        self._admissions = 0

    def add(self, prompt: list[int], rows: list[Row]) -> None:
        """Queue a prompt's rows.

        Raises:
            ConfigError: the cache could not hold one of them even alone.
        """
        needed = pages_for(len(prompt) + rows[0].limit - 1) + 1
        if needed > self.pool.capacity:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with {rows[0].limit} new ones needs {needed} pages of {PAGE} tokens;"
                f" the cache has {self.pool.capacity}: give it more memory, or ask for shorter completions"
            )
        self.waiting.append(Prefix(prompt[:-1], deque(rows)))

    @property
    def done(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def finish(self, row: Row, reason: str) -> None:
        """The row leaves with its completion; its slot is filled by `settle`."""
        row.reason = reason
        self.pool.drop(row.pages)
        row.pages = []
        self.running.remove(row)

    def grow(self) -> None:
        """Pages for the next `stride` steps of every running row; makes room where there is none."""
        for row in sorted(self.running, key=lambda one: one.age):
            while row.slot >= 0:
                missing = pages_for(min(row.cached + self.stride, row.most_cached)) - len(row.pages)
                if missing <= 0:
                    break
                if missing <= self.pool.free:
                    row.pages += self.pool.take(missing)
                    self.grown.add(row.slot)
                    break
                if not self._evict():
                    self._preempt(max(self.running, key=lambda one: one.age))

    def _evict(self, but: Prefix | None = None) -> bool:
        """A waiting prompt gives up its pages; they are computed again when its next row comes."""
        for prefix in reversed(self.waiting):
            if prefix.pages and prefix is not but:
                self.pool.drop(prefix.pages)
                prefix.pages = None
                return True
        return False

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._collect(row)
        self.pool.drop(row.pages)
        row.pages, row.slot, row.shown = [], -1, (-1, 0)
        self.running.remove(row)
        self.waiting.appendleft(Prefix((row.prompt + row.drawn)[:-1], deque([row])))

    def admit(self) -> Admitted:
        """Take rows from the queue while there are slots and pages; call after `grow`."""
        admitted = Admitted()
        while self.waiting and len(self.running) < self.slots:
            prefix = self.waiting[0]
            if self.running and self._missing(prefix) + len(self.running) > self.pool.free:
                break
            while self._missing(prefix) > self.pool.free:
                evicted = self._evict(but=prefix)
                assert evicted, "`add` lets no row in that does not fit alone"
            self._take(prefix, admitted)
            if not prefix.rows:
                self.waiting.popleft()
        if admitted.prefixes:
            self._look_ahead(admitted)
        return admitted

    def _look_ahead(self, admitted: Admitted) -> None:
        """Where a prefill is launched anyway, compute the next prompts with it: alone each would take as long.

        They hold pages while they wait, out of those that running rows will not soon want, and give them up first.
        """
        spare = self.pool.free - 2 * len(self.running) - self.pool.capacity // 8
        tokens = sum(len(ids) for ids, _ in admitted.prefixes)
        for prefix in self.waiting:
            pages = pages_for(len(prefix.tokens))
            tokens += len(prefix.tokens)
            if pages > spare or tokens > self.ahead:
                return
            if prefix.pages is None and prefix.tokens:
                prefix.pages = self.pool.take(pages)
                admitted.prefixes.append((prefix.tokens, prefix.pages))
                spare -= pages

    def _missing(self, prefix: Prefix) -> int:
        """Pages that the prefix's next row needs from the pool."""
        row = prefix.rows[0]
        whole, partial = divmod(len(prefix.tokens), PAGE)
        own = pages_for(min(row.cached + self.stride, row.most_cached)) - whole
        shared = 0 if prefix.pages is not None else whole + bool(partial)
        return shared + own - (bool(partial) and len(prefix.rows) == 1)

    def _take(self, prefix: Prefix, admitted: Admitted) -> None:
        if prefix.pages is None:
            prefix.pages = self.pool.take(pages_for(len(prefix.tokens)))
            if prefix.tokens:
                admitted.prefixes.append((prefix.tokens, prefix.pages))
        row = prefix.rows.popleft()
        if prefix.rows:
            whole = prefix.pages[: len(prefix.tokens) // PAGE]
            self.pool.hold(whole)
            row.pages = list(whole)
            if len(prefix.pages) > len(whole):
                row.pages += self.pool.take(1)
                admitted.copies.append((prefix.pages[-1], row.pages[-1]))
        else:
            row.pages, prefix.pages = prefix.pages, None  # the last row takes the prompt's own
        self._admissions += 1
        row.age = self._admissions
        row.slot = self.slots  # `settle` finds one
        row.offset = row.count
        row.token = (row.prompt + row.drawn)[-1]
        missing = pages_for(min(row.cached + self.stride, row.most_cached)) - len(row.pages)
        row.pages += self.pool.take(max(0, missing))
        self.running.append(row)
        admitted.rows.append(row)

    def settle(self) -> list[tuple[int, int]]:
        """Give every running row a slot below their number; returns (from, to) of those that had another."""
        count = len(self.running)
        staying = {row.slot: row for row in self.running if row.slot < count}
        holes = iter([slot for slot in range(count) if slot not in staying])
        moves = []
        for row in self.running:
            if row.slot >= count:
                slot = next(holes)
                if row.slot < self.slots:
                    moves.append((row.slot, slot))
                row.slot = slot
        self.running.sort(key=lambda one: one.slot)
        self.grown.clear()
        return moves

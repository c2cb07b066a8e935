"""From a request to the dataset that is trained on: every row is trained or reported."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aligntune.data.convert import Example, Plan, make_plan
from aligntune.data.load import load
from aligntune.data.mask import TRAINING, Masker, Rendered
from aligntune.data.recognise import recognise
from aligntune.data.report import DataReport, Segment, listed
from aligntune.data.request import DataRequest
from aligntune.data.rows import BadRow, Row, RowFault, Rows
from aligntune.data.shapes import BUILDERS, Built, Columns, Piece
from aligntune.data.template import Templates, choose_templates
from aligntune.data.tokens import Encoded, Encoder
from aligntune.errors import DataError

if TYPE_CHECKING:
    import datasets

# Rows that are rendered and tokenised together. 1,000 is also TRL's batch when it unpairs preferences, so the order of
# the rows is the same.
CHUNK = 1000


@dataclass
class PreparedData:
    """What `prepare` hands over.

    Args:
        train: the columns that the algorithm's collator takes.
        eval: the same for evaluation, or None.
        kind: the recognised kind of the training data.
        report: the pre-flight; `report.eval` is that of the evaluation data.
        tokenizer: has the chat template in effect.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    kind: str
    report: DataReport
    tokenizer: Any

    def parts(self) -> list[tuple[str, datasets.Dataset, DataReport]]:
        """The training data and, where there is any, that of evaluation: what a message calls it, rows, report."""
        found = [("the dataset", self.train, self.report)]
        if self.eval is not None and self.report.eval is not None:
            found.append(("the evaluation data", self.eval, self.report.eval))
        return found


def prepare(request: DataRequest, tokenizer: Any) -> PreparedData:
    """Load, convert, template, tokenise and mask the data of `request`, and report on all of it.

    The result depends on the request, the data and the tokenizer alone, so every process of a run makes the same.

    Raises:
        DataError: the data cannot be read, is of a kind that the algorithm does not take, has bad rows
            (`on_bad_row="raise"`), or leaves no row or no supervised token.
    """
    train_rows, eval_rows = load(request)
    templates = choose_templates(request.chat_template, tokenizer)
    train, report, chat = _prepare_part(train_rows, request, templates, tokenizer)
    evaluation = None
    if eval_rows is not None:
        evaluation, report.eval, eval_chat = _prepare_part(eval_rows, request, templates, tokenizer)
        chat = chat or eval_chat
    # The default for base models is handed on only where conversations were made with it.
    used = templates.tokenizer if templates.given or chat else tokenizer
    return PreparedData(train, evaluation, report.kind, report, used)


def _prepare_part(
    rows: Rows, request: DataRequest, templates: Templates, tokenizer: Any
) -> tuple[datasets.Dataset, DataReport, bool]:
    if not len(rows):
        raise DataError(f"{rows.name} has no rows")
    recognised = recognise(rows, request)
    fold = templates.given and templates.own.lacks_system_role
    plan = make_plan(recognised, request, has_template=templates.given, fold=fold)
    tally = Tally()
    worker = Worker(request, plan, Masker(templates, tokenizer), Encoder(tokenizer), tally)
    columns = Columns()
    for chunk in rows.chunks(CHUNK):
        columns.extend(worker.run(chunk))
    report = DataReport(
        source=rows.name, algorithm=request.algorithm, takes=request.takes, kind=recognised.kind, why=recognised.why,
        conversion=plan.description, template=templates.own.name if tally.chat else "", rows_read=len(rows),
        rows_trained=tally.rows, bad=tally.bad, examples=columns.rows, max_seq_length=request.max_seq_length,
        lengths=tally.lengths, tokens=tally.tokens, supervised_tokens=tally.learnt, truncated=tally.cut,
        end_of_turn=tally.closed, masks=dict(tally.masks), warnings=tally.warnings(templates, request, tokenizer),
        notes=list(rows.notes), example=[_segment(piece, tokenizer) for piece in tally.example],
    )  # fmt: skip
    _check(report, request, tally)
    return columns.dataset(report.warnings), report, tally.chat


def _segment(piece: Piece, tokenizer: Any) -> Segment:
    return Segment(piece.title, tokenizer.decode(piece.ids), piece.learnt)


def _check(report: DataReport, request: DataRequest, tally: Tally) -> None:
    assert report.rows_read == report.rows_trained + len(report.bad), "a row was neither trained nor reported"
    shown = "\n".join(f"  {line}" for line in listed(report.bad))
    if report.bad and request.on_bad_row == "raise":
        raise DataError(f"{len(report.bad):,} of {report.rows_read:,} rows of {report.source} cannot be trained:\n"
                        f"{shown}\nMend them, or leave them out: on_bad_row='skip', or 'quarantine', which writes "
                        "all of them to bad_rows.jsonl")
    if not report.rows_trained:
        raise DataError(f"{report.source}: none of {report.rows_read:,} rows can be trained:\n{shown}")
    if report.supervised_tokens == 0:
        raise DataError(f"{report.source}: no token is supervised, so there is nothing to learn")


@dataclass
class Tally:
    """What is counted while rows go by."""

    rows: int = 0
    examples: int = 0
    bad: list[BadRow] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    tokens: int = 0
    learnt: int | None = None
    cut: int = 0
    closed: int | None = None
    masks: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    example: list[Piece] = field(default_factory=list)
    chat: bool = False

    def add(self, where: str, built: Built, example: Example, rendered: list[Rendered], encoded: list[Encoded]) -> None:
        self.examples += 1
        self.lengths.extend(built.lengths)
        self.tokens += built.tokens
        self.cut += built.cut
        if built.learnt is not None:
            self.learnt = (self.learnt or 0) + built.learnt
            self.closed = (self.closed or 0) + bool(built.closed)
            self.masks[rendered[0].method] += 1
        self.example = self.example or built.pieces()
        self.chat = self.chat or isinstance(example.context, list)
        lost = next((one.lost for one in rendered if one.lost), "")
        for name, found in (
            ("lost", bool(lost)),
            ("training", any(one.method == TRAINING for one in rendered)),
            ("extended", any(one.extended for one in rendered)),
            ("unprompted", any(one.unprompted for one in rendered)),
            ("boundary", not all(one.same_prompt for one in encoded)),
            ("same", len(encoded) == 2 and encoded[0].ids == encoded[1].ids),
            ("empty", any(_empty(reply) for reply in example.replies)),
            ("open", built.closed is False and not built.cut),
            ("plain", bool(example.replies) and isinstance(example.context, str) and not example.whole),
        ):
            if found:
                self.counts[name] += 1
                self.first.setdefault(name, f"{where}: {_short(lost)}" if name == "lost" else where)

    def warnings(self, templates: Templates, request: DataRequest, tokenizer: Any) -> list[str]:
        """A sentence for everything that was counted and that a user should know."""
        sentences = {
            "training": f"{TRAINING} for this family renders the row: in the tokenizer's own template, which is what "
                        "inference uses, what the assistant says cannot be told apart",
            "lost": "the chat template deletes text from a supervised turn, which is then not learnt",
            "extended": "the chat template leaves the end of turn out of what it marks as generated; it is supervised "
                        "all the same, or the model would not learn to stop",
            "unprompted": "the reply does not continue the generation prompt, so generation starts from text that was "
                          "not trained on (a template that opens <think>, rows without reasoning)",
            "boundary": "a token spans the end of the prompt, so the prompt alone gives other tokens than it has here; "
                        "that token is supervised",
            "same": "chosen and rejected are the same tokens, which teaches nothing",
            "empty": "the completion is empty: the model learns to stop at once",
            "open": "the last supervised turn does not end in a token that stops generation",
        }  # fmt: skip
        found = [f"{text} ({self._where(name)})" for name, text in sentences.items() if self.counts[name]]
        if self.counts["plain"] and templates.given:
            found.append(f"{self.counts['plain']:,} examples are plain strings and are trained without the chat "
                         "template, as in TRL; apply_chat_template=True makes turns of them")  # fmt: skip
        if not self.chat and self.learnt is not None and tokenizer.eos_token is None:
            found.append("the tokenizer has no end-of-sequence token, so no completion is ended")
        if self.chat and templates.own.dated:
            found.append("the chat template writes today's date: another day gives other tokens")
        return found

    def _where(self, name: str) -> str:
        count = self.counts[name]
        return f"{count:,} of {self.examples:,} examples, first {self.first[name]}"


@dataclass
class Worker:
    """Takes chunks of rows through conversion, rendering, tokenising and shaping; one fault makes its whole row bad."""

    request: DataRequest
    plan: Plan
    masker: Masker
    encoder: Encoder
    tally: Tally

    def run(self, chunk: list[tuple[str, Row | BadRow]]) -> list[Row]:
        """The prepared rows of a chunk; bad ones go to the tally."""
        work: list[tuple[int, Row, list[Example], list[list[Rendered]]]] = []
        bad: dict[int, BadRow] = {}  # by position: `where` need not be the row's alone
        for at, (where, row) in enumerate(chunk):
            if isinstance(row, BadRow):
                bad[at] = row
                continue
            try:
                examples = self.plan.convert(row)
                work.append((at, row, examples, [self._render(example) for example in examples]))
            except RowFault as fault:
                bad[at] = BadRow(where, fault.field, fault.why, row)
        encoded = iter(self.encoder.encode([r for _, _, _, parts in work for part in parts for r in part]))
        found: list[tuple[Built, Example]] = []
        for at, row, examples, parts in work:
            where = chunk[at][0]
            replies = [[next(encoded) for _ in part] for part in parts]
            try:
                found.extend(self._build(where, examples, parts, replies))
            except RowFault as fault:
                bad[at] = BadRow(where, fault.field, fault.why, row)
        self.tally.bad.extend(bad[at] for at in sorted(bad))
        if self.request.takes == "unpaired":  # good completions first, as TRL orders what it unpairs
            found.sort(key=lambda one: not one[1].extra["label"])
        return [built.columns for built, _ in found]

    def _render(self, example: Example) -> list[Rendered]:
        if self.request.takes == "prompts":
            return [self.masker.prompt(example)]
        if self.request.takes == "reward":
            return self.masker.whole(example)
        return self.masker.replies(example)

    def _build(
        self, where: str, examples: list[Example], parts: list[list[Rendered]], replies: list[list[Encoded | RowFault]]
    ) -> Iterator[tuple[Built, Example]]:
        build = BUILDERS[self.request.takes]
        found = []
        for example, rendered, encoded in zip(examples, parts, replies, strict=True):
            good = []
            for one in encoded:
                if isinstance(one, RowFault):
                    raise one
                good.append(one)
            found.append((build(example, good, self.encoder, self.request), example, rendered, good))
        self.tally.rows += 1
        for built, example, rendered, good in found:
            self.tally.add(where, built, example, rendered, good)
        return iter([(built, example) for built, example, _, _ in found])


def _empty(reply: Any) -> bool:
    if isinstance(reply, str):
        return not reply.strip()
    return all(not message["content"].strip() and not message.get("tool_calls") for message in reply
               if message["role"] == "assistant")  # fmt: skip


def _short(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")

"""From rendered text to token ids, with the learnt characters carried over to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.data.mask import Rendered
from aligntune.data.rows import RowFault

TokenSpan = tuple[int, int]


@dataclass(slots=True)
class Encoded:
    """One rendered reply as tokens.

    Args:
        ids: token ids.
        spans: (start, end) tokens that are learnt. A token that spans the edge of a learnt text is learnt.
        same_prompt: the prompt alone gives the tokens that `ids` starts with. Where it does not, the model meets other
            tokens at inference than in training (TRL warns of the same).
    """

    ids: list[int]
    spans: list[TokenSpan]
    same_prompt: bool = True


class Encoder:
    """Tokenises batches of rendered text.

    Args:
        tokenizer: a transformers tokenizer; fast ones give offsets, others are masked by prefixes of ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.enders = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id} - {None}
        self._blank: dict[int, bool] = {}

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded | RowFault]:
        """Ids and learnt spans of each, in order; a fault for those whose spans cannot be carried to tokens."""
        found: list[Encoded | RowFault] = [RowFault("", "")] * len(batch)
        for special in (False, True):
            at = [i for i, rendered in enumerate(batch) if rendered.special is special]
            if at:
                for i, encoded in zip(at, self._encode([batch[i] for i in at], special), strict=True):
                    found[i] = encoded
        return found

    def count(self, batch: Sequence[Rendered]) -> list[int]:
        """The number of tokens of each."""
        return [len(encoded.ids) if isinstance(encoded, Encoded) else 0 for encoded in self.encode(batch)]

    def _encode(self, batch: list[Rendered], special: bool) -> list[Encoded | RowFault]:
        encoded = self._call([rendered.text for rendered in batch], special)
        ids = encoded["input_ids"]
        same = [True] * len(batch)
        asked = [(i, rendered.prompt) for i, rendered in enumerate(batch) if rendered.prompt]
        if asked:
            prompts = self._call([prompt for _, prompt in asked], special)["input_ids"]
            for (i, _), prompt in zip(asked, prompts, strict=True):
                same[i] = ids[i][: len(prompt)] == prompt
        if not encoded.is_fast:
            return [self._by_ids(rendered, row, special) for rendered, row in zip(batch, ids, strict=True)]
        return [
            Encoded(row, [_carry(encoded, i, span, rendered, len(row)) for span in rendered.spans], same[i])
            for i, (rendered, row) in enumerate(zip(batch, ids, strict=True))
        ]

    def _call(self, texts: list[str], special: bool) -> Any:
        # verbose=False: the tokenizer would warn of each text above its own maximum, which is not the limit here.
        return self.tokenizer(
            texts, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip

    def _by_ids(self, rendered: Rendered, ids: list[int], special: bool) -> Encoded | RowFault:
        """Spans without offsets: the text up to each edge must tokenise to how `ids` starts."""
        edges = []
        for edge in (edge for span in rendered.spans for edge in span):
            head = self._call([rendered.text[:edge]], special)["input_ids"][0] if edge else []
            if edge == len(rendered.text):
                head = ids
            if ids[: len(head)] != head:
                return RowFault("tokens", "this tokenizer gives no offsets, and a token spans the edge of a turn")
            edges.append(len(head))
        return Encoded(ids, list(zip(edges[::2], edges[1::2], strict=True)))

    def closed(self, ids: Sequence[int], spans: Sequence[TokenSpan]) -> bool:
        """Whether the last learnt token, blanks aside, can end a turn: an added token or the end of sequence."""
        if not spans:
            return False
        start, end = spans[-1]
        for token in reversed(ids[start:end]):
            if token in self.enders:
                return True
            if token not in self._blank:
                self._blank[token] = self.tokenizer.decode([token]).strip() == ""
            if not self._blank[token]:
                return False
        return False


def _carry(encoded: Any, row: int, span: tuple[int, int], rendered: Rendered, count: int) -> TokenSpan:
    """A span of characters as a span of tokens."""
    start, end = span
    text = len(rendered.text)
    # Text learnt whole includes the tokens that the tokenizer puts before it, and learnt to the end those after it.
    first = 0 if start == 0 and rendered.prompt is None else _forward(encoded, row, start, text, count)
    last = count if end == text else _backward(encoded, row, end - 1)
    return first, max(first, last)


def _forward(encoded: Any, row: int, char: int, stop: int, count: int) -> int:
    """The token of the first character from `char` on that has one: blanks can be trimmed from offsets."""
    for at in range(char, stop):
        token = encoded.char_to_token(row, at)
        if token is not None:
            return token
    return count


def _backward(encoded: Any, row: int, char: int) -> int:
    """One past the token of the last character up to `char` that has one."""
    for at in range(char, -1, -1):
        token = encoded.char_to_token(row, at)
        if token is not None:
            return token + 1
    return 0

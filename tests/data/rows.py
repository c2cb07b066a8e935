"""Rows of every kind, as users hold them."""

from __future__ import annotations

from typing import Any

from aligntune.data import DataRequest, PreparedData, prepare
from tests.data.tokenizers import make


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


MESSAGES = [
    {"messages": [user("What is the capital of France?"), assistant("Paris.")]},
    {"messages": [system("Be brief."), user("Two plus two?"), assistant("four.")]},
]
TWO_TURNS = [{"messages": [user("What is 12 + 30?"), assistant("42."), user("And 42 - 30?"), assistant("12.")]}]
REASONING = [
    {
        "messages": [
            user("What is 12 + 30?"), assistant("<think>\ntwo and forty\n</think>\n\n42."),
            user("And 42 - 30?"), assistant("<think>\ntake thirty\n</think>\n\n12."),
        ]
    }
]  # fmt: skip
ALPACA = [
    {"instruction": "Give three tips.", "input": "", "output": "Eat, sleep, move."},
    {"instruction": "Add the numbers.", "input": "12 and 30", "output": "42"},
]
PROMPT_COMPLETION = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "2 + 2 =", "completion": " 4"},
]
PROMPT_COMPLETION_TURNS = [
    {"prompt": [user("What is the capital of France?")], "completion": [assistant("Paris.")]},
    {"prompt": [user("hello"), assistant("hi"), user("2 + 2?")], "completion": [assistant("4")]},
]
PREFERENCE = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "Grass is", "chosen": " green and tall.", "rejected": " red."},
]
PREFERENCE_TURNS = [
    {"prompt": [user("The sky?")], "chosen": [assistant("It is blue.")], "rejected": [assistant("It is green.")]},
    {"prompt": [user("Grass?")], "chosen": [assistant("Green and tall.")], "rejected": [assistant("Red.")]},
]
WHOLE_CONVERSATIONS = [
    {"chosen": [user("The sky?"), assistant("Blue.")], "rejected": [user("The sky?"), assistant("Green.")]},
]
TRANSCRIPTS = [
    {
        "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: What is 2 + 2?\n\nAssistant: It is 4.",
        "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: What is 2 + 2?\n\nAssistant: I do not know.",
    }
]
GSM8K = [{"question": "Ann has 1,200 apples and buys 34. How many?", "answer": "1200 + 34 = 1234\n#### 1,234"}]
PROMPTS = [{"prompt": [user("Name a colour.")], "difficulty": 1}]
UNPAIRED = [
    {"prompt": "The sky is", "completion": " blue.", "label": True},
    {"prompt": "The sky is", "completion": " green.", "label": False},
]
TEXT = [{"text": "The capital of France is Paris."}, {"text": "Two plus two is four."}]


def prepared(rows: Any, takes: str, family: str = "qwen3", **options: Any) -> PreparedData:
    """`prepare` on rows, with the tokenizer of a family (or the one given as `tokenizer`)."""
    tokenizer = options.pop("tokenizer", None) or make(family)
    options.setdefault("algorithm", {"preference": "dpo", "prompts": "grpo", "unpaired": "kto"}.get(takes, takes))
    return prepare(DataRequest(takes=takes, dataset=rows, **options), tokenizer)


def learnt(data: PreparedData, row: int = 0) -> str:
    """The text of one sft row that is learnt, pieces joined by |."""
    ids, labels = data.train[row]["input_ids"], data.train[row]["labels"]
    pieces: list[list[int]] = []
    before = -100
    for token, label in zip(ids, labels, strict=True):
        if label == -100:
            before = label
            continue
        assert label == token
        if before == -100:
            pieces.append([])
        pieces[-1].append(token)
        before = label
    return "|".join(data.tokenizer.decode(piece) for piece in pieces)

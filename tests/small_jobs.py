"""A tiny model on disk, small data files and recipes over them, for the tests of recipes and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def model_folder(folder: Path) -> str:
    """A random Llama of 40,000 parameters and a byte-level tokenizer, saved."""
    from tests.core import tiny

    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alpaca(path: Path, count: int = 16) -> str:
    return rows_file(path, [{"instruction": f"Say {i}", "input": "", "output": f"{i} " * (i % 3 + 1)}
                            for i in range(count)])


def pairs(path: Path, count: int = 16) -> str:
    return rows_file(path, [{"prompt": f"Say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)}
                            for i in range(count)])


def graded(path: Path, count: int = 16) -> str:
    return rows_file(path, [{"question": f"What is {i} + 1?", "answer": f"It is easy.\n#### {i + 1}"}
                            for i in range(count)])


def write(path: Path, config: dict[str, Any], about: str = "") -> str:
    """A config as a YAML file, with a comment at its top."""
    path.write_text((f"# {about}\n" if about else "") + OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    return str(path)

"""Models and datasets that need no download: `builtin:NAME` wherever a model or dataset is named.

| name | what it is |
|---|---|
| `builtin:tiny` | a Llama of 2.6 million parameters with random weights from a fixed seed |
| `builtin:tiny-instruct` | the same, trained on `builtin:instruct` by the recipe `tiny-instruct` |
| `builtin:arithmetic` | chat rows: a sum, and its answer |
| `builtin:arithmetic-preference` | the same problems with a right and a wrong answer |
| `builtin:arithmetic-brief` | the same problems with a bare right answer and one in a sentence, for reward models |
| `builtin:arithmetic-prompts` | the same problems as prompts with an `answer` column, for rewards |
| `builtin:pydoc` | chat rows from the docstrings of the running Python's standard library |
| `builtin:instruct` | the rows of `builtin:arithmetic` and then those of `builtin:pydoc` |

Every dataset has the splits "train" and "test". Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.errors import ConfigError, unknown

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PREFIX = "builtin:"
MODELS = ("tiny", "tiny-instruct")
DATASETS = ("arithmetic", "arithmetic-preference", "arithmetic-brief", "arithmetic-prompts", "pydoc", "instruct")
SPLITS = ("train", "test")


def is_builtin(name: object) -> bool:
    """Whether `name` is a string that starts with "builtin:"."""
    return isinstance(name, str) and name.startswith(PREFIX)


def names() -> dict[str, list[str]]:
    """The names there are: {"models": [...], "datasets": [...]}, each with its "builtin:" prefix."""
    return {"models": [PREFIX + name for name in MODELS], "datasets": [PREFIX + name for name in DATASETS]}


def _known(kind: str, name: str, choices: tuple[str, ...]) -> str:
    bare = name.removeprefix(PREFIX)
    if bare in choices:
        return bare
    valid = [PREFIX + choice for choice in choices]
    if bare in (*MODELS, *DATASETS):
        other = "dataset" if kind == "model" else "model"
        raise ConfigError(f"{PREFIX}{bare} is a {other}; the builtin {kind}s are {', '.join(valid)}")
    raise ConfigError(unknown(f"builtin {kind}", PREFIX + bare, valid))


def model_path(name: str) -> Path:
    """A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    `tiny-instruct` lies in the package. The weights of `tiny` are written to the cache folder the first time
    (`$ALIGNTUNE_CACHE`, else `$XDG_CACHE_HOME/aligntune`, else `~/.cache/aligntune`; 10 MB).

    Raises:
        ConfigError: no such builtin model.
    """
    from aligntune.builtin.models import folder

    return folder(_known("model", name, MODELS))


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the builtin models: byte-level BPE of 2,048 tokens, digits one by one.

    `<|bos|>`, `<|end|>` (eos and end of turn) and `<|pad|>` are three tokens; the chat template knows the roles
    system, user and assistant and has `{% generation %}` tags.

    Raises:
        ConfigError: no such builtin model.
    """
    from transformers import AutoTokenizer

    from aligntune.builtin.models import PACKAGED

    _known("model", name, MODELS)
    return AutoTokenizer.from_pretrained(PACKAGED / "tiny")


def load_model(
    name: str, *, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> LlamaForCausalLM:
    """A builtin model, in evaluation mode.

    Args:
        name: with or without "builtin:".
        dtype: of the weights; default: float32 (the stored bfloat16 of `tiny-instruct` is widened).
        device: where to put it; default: the CPU.
        kwargs: to `LlamaForCausalLM.from_pretrained`.

    Raises:
        ConfigError: no such builtin model.
    """
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_path(name), dtype=dtype or torch.float32, **kwargs)
    return model if device is None else model.to(device)


def load_dataset(name: str, split: str = "train") -> datasets.Dataset:
    """A builtin dataset; the same rows in the same order every time.

    Args:
        name: with or without "builtin:".
        split: "train" or "test"; no problem or docstring is in both.

    Raises:
        ConfigError: no such builtin dataset or split.
    """
    from datasets import Dataset, DatasetInfo

    from aligntune.builtin import arithmetic, docstrings

    bare = _known("dataset", name, DATASETS)
    if split not in SPLITS:
        raise ConfigError(unknown(f"split of {PREFIX}{bare}", split, SPLITS))
    rows = {
        "arithmetic": arithmetic.chat_rows,
        "arithmetic-preference": arithmetic.preference_rows,
        "arithmetic-brief": arithmetic.brief_rows,
        "arithmetic-prompts": arithmetic.prompt_rows,
        "pydoc": docstrings.chat_rows,
        "instruct": lambda split: [*arithmetic.chat_rows(split), *docstrings.chat_rows(split)],
    }[bare](split)
    parts = {"pydoc": [docstrings.description()], "instruct": [arithmetic.DESCRIPTION, docstrings.description()]}
    described = "; ".join(parts.get(bare, [arithmetic.DESCRIPTION]))
    return Dataset.from_list(rows, info=DatasetInfo(description=described, dataset_name=bare), split=split)

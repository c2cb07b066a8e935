"""`name=value` on the command line: values as YAML reads them, where the option is not a string anyway."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from aligntune.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][\w.\-]*|\d+\.[\w.\-]+|stages\[\d+\][\w.\-]*")
_STRUCTURED = ("[", "{", '"', "'")


def parse(arguments: Iterable[str]) -> dict[str, Any]:
    """`["train.learning_rate=1e-4", ...]` as a mapping.

    Raises:
        ConfigError: every argument that is not `name=value`, is given twice, or whose value cannot be read.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not _NAME.fullmatch(name):
            dashed = name.lstrip("-").replace("-", "_")
            hint = f"; did you mean {dashed}={text or 'VALUE'}?" if name.startswith("-") and dashed else ""
            faults.append(f"{argument!r}: name=value or section.name=value is wanted{hint}")
        elif name in values:
            faults.append(f"{name}: given twice on the command line")
        else:
            try:
                values[name] = value_of(name, text)
            except ConfigError as error:
                faults.append(f"{name}: {error}")
    if faults:
        raise ConfigError.from_faults(faults, "the command line")
    return values


def value_of(name: str, text: str) -> Any:
    """`text` as the option's value: 1e-4 is a number, `[a, b]` a list, `null` nothing, `${x}` itself.

    An option that takes strings alone gets the text as it stands, a commit hash like 12e4567 included.
    """
    if text.startswith(_STRUCTURED):
        return _yaml(text)
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if _only_strings(name.rpartition(".")[2]):
        return text
    try:
        value = _yaml(text)
    except ConfigError:
        return text
    # "Answer: yes" would be a mapping, "- x" a list, "a # b" would lose its end: without brackets it is text.
    return value if isinstance(value, (bool, int, float)) else text


def _only_strings(name: str) -> bool:
    from aligntune.core.resolve import OLD_NAMES, option_table

    row = option_table(None).get(OLD_NAMES.get(name, name))
    return row is not None and set(row.kinds) <= {str, type(None)}


def _yaml(text: str) -> Any:
    """One YAML value by OmegaConf's rules (1e-4 is a number, dates are text); `${` is no interpolation here."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    mark = "\ue000"
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create("value: " + text.replace("${", mark)))
    except (YAMLError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{text!r} cannot be read as YAML: {getattr(error, 'problem', None) or reason}") from error
    return _unmarked(plain["value"], mark)


def _unmarked(value: Any, mark: str) -> Any:
    if isinstance(value, dict):
        return {key: _unmarked(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_unmarked(item, mark) for item in value]
    return value.replace(mark, "${") if isinstance(value, str) else value

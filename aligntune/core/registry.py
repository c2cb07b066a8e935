"""Typed registries of lazy targets: names are known without importing what they name.

A target is a string `"package.module:attribute"`, imported at the first `load`. So `aligntune --help`,
`list_algorithms()` and `explain()` need neither torch nor TRL.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from aligntune.errors import AlignTuneError, ConfigError, unknown

T = TypeVar("T")

Status = Literal["supported", "unsupported", "unavailable"]


@dataclass(frozen=True)
class Support:
    """Whether something can be done here, and why or why not.

    Args:
        status: "supported"; "unsupported" (by decision, on every machine); "unavailable" (on this machine).
        reason: one sentence for people.
        requires: what it needs, in words ("an NVIDIA GPU of compute capability 8.0 or later").
        install: the exact command that would bring a missing package, or "".
    """

    status: Status
    reason: str = ""
    requires: str = ""
    install: str = ""

    def __bool__(self) -> bool:
        return self.status == "supported"

    def __str__(self) -> str:
        parts = [self.status, self.reason and f": {self.reason}", self.requires and f" (needs {self.requires})"]
        return "".join(part for part in parts if part) + (f"; install: {self.install}" if self.install else "")


@dataclass
class Entry(Generic[T]):
    """One registered name."""

    name: str
    target: str | T
    aliases: tuple[str, ...] = ()
    summary: str = ""
    install: str = ""
    _loaded: Any = field(default=None, repr=False)

    def load(self) -> T:
        """Import the target (once) and return it.

        Raises:
            AlignTuneError: the module is missing; names the command that installs it.
        """
        if self._loaded is None:
            if not isinstance(self.target, str):
                self._loaded = self.target
            else:
                module, _, attribute = self.target.partition(":")
                try:
                    self._loaded = getattr(importlib.import_module(module), attribute)
                except ModuleNotFoundError as error:
                    hint = self.install or f"pip install {error.name}"
                    raise AlignTuneError(
                        f"{self.name!r} needs the package {error.name!r}, which is not installed: {hint}"
                    ) from error
        return self._loaded


class Registry(Generic[T]):
    """Names to lazy targets, with aliases, a collision check and a did-you-mean.

    Args:
        what: the noun for messages ("algorithm", "backend", "reward").
        error: the class raised for an unknown name.
    """

    def __init__(self, what: str, error: type[AlignTuneError] = ConfigError) -> None:
        self.what = what
        self._error = error
        self._entries: dict[str, Entry[T]] = {}
        self._aliases: dict[str, str] = {}

    def register(
        self, name: str, target: str | T, *, aliases: tuple[str, ...] = (), summary: str = "", install: str = "",
        replace: bool = False,
    ) -> None:
        """Add `name`. A name or alias that is taken is a `ConfigError` unless `replace=True`."""
        for key in (name, *aliases):
            owner = self._aliases.get(key, key if key in self._entries else None)
            if owner is not None and not (replace and owner == name):
                raise ConfigError(f"{self.what} {key!r} is registered already, as {owner!r} (replace=True replaces it)")
        if name in self._entries:
            self._aliases = {alias: owner for alias, owner in self._aliases.items() if owner != name}
        self._entries[name] = Entry(name, target, aliases, summary, install)
        self._aliases.update(dict.fromkeys(aliases, name))

    def add(self, name: str, **kwargs: Any) -> Callable[[T], T]:
        """`register` as a decorator."""

        def decorate(target: T) -> T:
            self.register(name, target, **kwargs)
            return target

        return decorate

    def resolve(self, name: object) -> str:
        """The registered name behind `name` (aliases, letter case and `-` for `_` are understood).

        Raises:
            the registry's error class, with the nearest valid name.
        """
        if isinstance(name, str):
            for key in (name, name.lower(), name.lower().replace("-", "_")):
                if key in self._entries:
                    return key
                if key in self._aliases:
                    return self._aliases[key]
        raise self._error(unknown(self.what, name, self.names()))

    def entry(self, name: object) -> Entry[T]:
        return self._entries[self.resolve(name)]

    def load(self, name: object) -> T:
        return self.entry(name).load()

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in self._aliases)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

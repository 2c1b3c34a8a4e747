"""Names for things that a user picks: a typed registry whose error says what exists."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from tidegate.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name; third parties add theirs under an entry point group.

    ``kind`` is the word that errors use. An entry point is loaded when its name is asked for; a name
    registered in this process wins over an entry point of the same name.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self._kind = kind
        self._group = group
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its object under ``name`` and returns it unchanged.

        Raises ConfigError when the name is taken.
        """

        def file(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self._kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return file

    def get(self, name: str) -> T:
        """Return what is filed under ``name``. Raises ConfigError listing every name that exists."""
        if name in self._entries:
            return self._entries[name]
        if self._group is not None:
            for point in entry_points(group=self._group, name=name):
                entry: T = point.load()
                return entry
        near = get_close_matches(name, self.names(), n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise ConfigError(f"unknown {self._kind} {name!r}; {hint}: {', '.join(self.names())}")

    def names(self) -> tuple[str, ...]:
        """Return every name, sorted."""
        points = entry_points(group=self._group) if self._group is not None else ()
        return tuple(sorted({*self._entries, *(point.name for point in points)}))

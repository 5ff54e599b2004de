"""A table of named things of one kind, which answers a wrong name with the nearest right one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from .errors import OptionError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to entries, in the order of registration. `kind` is what an error calls an entry: "merge method"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> None:
        """Add an entry; a name can be given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise OptionError(f"unknown {self.kind} '{name}'.{nearest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries  # the Mapping's own would ask for the entry, which is an error of the user's

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

"""The class register of a chain: which class has which prototype, for the life of the chain.

A class is registered once, under the number in which it arrived, and keeps it: a class that sorts
before the others takes the next free number, and one whose pictures are gone keeps its own. The
number decides the prototype (`simplex.prototype_rows`) or the column of a learnable head. Renamed and
merged classes are aliases of a registered one.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compat_jax.errors import UserError, nearest

_SCARCE = 0.9
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Register:
    """Class names in the order of their numbers, and other names of the same classes.

    Attributes:
      names: registered classes; the position of a name is its number.
      aliases: {other name: registered name}.
      num_prototypes: K, how many classes there is room for; None for a head that grows.

    Raises:
      UserError: a name twice, an alias of an unknown class, or more classes than prototypes.
    """

    names: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_prototypes: int | None = None

    def __post_init__(self):
        numbers = {name: number for number, name in enumerate(self.names)}
        check_once(self.names)
        for other, name in self.aliases.items():
            if name not in numbers:
                raise UserError(
                    f"aliases: {other!r} is to be {name!r}, which is no class yet."
                    f"{nearest(name, numbers)}",
                    "aliases",
                )
        room = self.num_prototypes
        if room is not None and len(self.names) > room:
            raise UserError(
                f"num_prototypes is {room:,}, but there are {len(self.names):,} classes: move the chain "
                f"to a larger K first, which maps its versions and galleries without reading a "
                "picture again",
                "num_prototypes",
            )
        object.__setattr__(self, "_numbers", numbers)

    @classmethod
    def of(cls, record: Any) -> "Register":
        """Return the register that a version's record carries."""
        room = record.num_prototypes if record.head_classes is None else None
        return cls(tuple(record.class_names), dict(record.aliases), room)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return self.name(name) is not None

    def name(self, name: str) -> str | None:
        """Return the registered name of a class, or None for a class that is not registered.

        An alias counts before a registered class of the same name: classes can be merged.
        """
        name = self.aliases.get(name, name)
        return name if name in self._numbers else None  # type: ignore[attr-defined]

    def number(self, name: str) -> int:
        """Return the number of a registered class or of an alias.

        Raises:
          UserError: not registered.
        """
        found = self.name(name)
        if found is None:
            raise UserError(f"class {name!r} is not registered.{nearest(name, self.names)}")
        return self._numbers[found]  # type: ignore[attr-defined]

    def extended(
        self, names: Iterable[str], aliases: Mapping[str, str] | None = None
    ) -> "Register":
        """Register classes that are new, sorted by name, behind those that are there.

        Args:
          names: of classes, known ones and aliases among them.
          aliases: {other name: class}; added to those that are there.

        Raises:
          UserError: an alias that stood for another class, or of an unknown class; no room.
        """
        merged = merged_aliases(self.aliases, resolved(aliases or {}))
        known = set(self.names) | set(merged)
        added = tuple(sorted({name for name in names if name not in known}))
        return Register(self.names + added, merged, self.num_prototypes)

    def check_continues(self, older: "Register") -> None:
        """Refuse a register in which classes or aliases of an older one moved or are gone.

        Raises:
          UserError: naming the first difference.
        """
        for number, name in enumerate(older.names):
            mine = self.names[number] if number < len(self.names) else None
            if mine != name:
                now = "missing" if mine is None else f"{mine!r}"
                raise UserError(
                    f"class number {number} is {name!r} in the chain, but {now} here: a class keeps its "
                    "prototype for the life of a chain; continue the chain with update, or begin a "
                    "new one"
                )
        for other, name in older.aliases.items():
            if self.aliases.get(other) != name:
                raise UserError(f"{other!r} is an alias of {name!r} in the chain, but not here")

    def room(self) -> str:
        """Say how many prototypes are in use: "K = 1,024, 1,003 in use (room for 21 more)"."""
        if self.num_prototypes is None:
            return f"{len(self):,} classes"
        left = self.num_prototypes - len(self)
        warning = ": move to a larger K before it is full" if self.is_scarce() else ""
        return (
            f"K = {self.num_prototypes:,}, {len(self):,} in use (room for {left:,} more{warning})"
        )

    def is_scarce(self) -> bool:
        """Return whether nine tenths of the prototypes are in use."""
        return self.num_prototypes is not None and len(self) >= _SCARCE * self.num_prototypes


def check_once(names: Sequence[str]) -> None:
    """Refuse class names of which one is there twice.

    Raises:
      UserError: naming the first.
    """
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise UserError(f"class {name!r} is there twice: give every class a name of its own")


def merged_aliases(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return old and new aliases together.

    Raises:
      UserError: a name that stands for another class already.
    """
    merged = dict(old)
    for other, name in new.items():
        if merged.setdefault(other, name) != name:
            raise UserError(
                f"aliases: {other!r} stands for {merged[other]!r} already, not for {name!r}: a class "
                "keeps its prototype",
                "aliases",
            )
    return merged


def resolved(aliases: Mapping[str, str]) -> dict[str, str]:
    """Follow aliases of aliases to their classes.

    Raises:
      UserError: aliases in a circle.
    """
    found = {}
    for other, name in aliases.items():
        seen = [other]
        while name in aliases and name not in seen:
            seen.append(name)
            name = aliases[name]
        if name in seen:
            raise UserError(f"aliases go round in a circle: {' = '.join(seen[:_NAMED])}", "aliases")
        found[other] = name
    return found

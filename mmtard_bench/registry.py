"""Names for models, data sets, tasks, attacks and protocols, ours and other packages'.

A package adds its own by declaring an entry point in the group ``mmtard_bench``: a module that is
imported, and registers with the decorators below, the first time a name is looked up.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from mmtard_bench.errors import InputError

if TYPE_CHECKING:
    from mmtard_bench.attacks.base import Attack
    from mmtard_bench.data.base import Dataset
    from mmtard_bench.models.clip import Clip
    from mmtard_bench.types import Protocol, Task, ThreatModel

T = TypeVar("T")

_MOST = 40
"""Names that an error sentence lists."""


@cache
def _load_other_packages() -> None:
    for entry in entry_points(group="mmtard_bench"):
        entry.load()


def near_matches(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: near matches of a name, or everything that is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"Known: {', '.join(names[:_MOST])}{more}."


class Registry(Generic[T]):
    """Named things of one kind. Adding a name twice raises; an unknown name suggests others.

    ``built_in`` is the module of this package that registers ours, imported on first use.
    """

    def __init__(self, kind: str, built_in: str) -> None:
        self.kind = kind
        self._built_in = f"mmtard_bench.{built_in}"
        self._items: dict[str, T] = {}

    def _load(self) -> None:
        import_module(self._built_in)
        _load_other_packages()

    def add(self, name: str, item: T) -> None:
        if name in self._items:
            raise InputError(f"The {self.kind} '{name}' is taken; choose another.")
        self._items[name] = item

    def get(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise InputError(f"There is no {self.kind} '{name}'. {near_matches(name, self)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))


models: "Registry[Callable[[], Clip]]" = Registry("model", "models.tiny")
datasets: "Registry[Callable[[], Dataset]]" = Registry("data set", "data.digits")
tasks: "Registry[Task]" = Registry("task", "tasks.declared")
attacks: "Registry[Callable[[ThreatModel, int], Attack]]" = Registry("attack", "attacks.catalogue")
protocols: "Registry[Protocol]" = Registry("protocol", "protocols")


def _decorator(registry: Registry[T], name: str) -> Callable[[T], T]:
    def register(item: T) -> T:
        registry.add(name, item)
        return item

    return register


def register_model(name: str) -> "Callable[[Callable[[], Clip]], Callable[[], Clip]]":
    """Decorate a function without arguments that returns a ``Clip``."""
    return _decorator(models, name)


def register_dataset(name: str) -> "Callable[[Callable[[], Dataset]], Callable[[], Dataset]]":
    """Decorate a function without arguments that returns a ``Dataset``."""
    return _decorator(datasets, name)


def register_attack(
    name: str,
) -> "Callable[[Callable[[ThreatModel, int], Attack]], Callable[[ThreatModel, int], Attack]]":
    """Decorate a function (threat model, number of classes) -> ``Attack``.

    ``{steps}`` and ``{edits}`` in a name stand for every number of them, as in ``pgd-{steps}``.
    """
    return _decorator(attacks, name)


def register_task(task: "Task") -> None:
    """Register a task under its own name."""
    tasks.add(task.name, task)

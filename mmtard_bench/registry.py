"""Names for models, data sets, tasks, attacks and protocols, ours and other packages'.

A package adds its own by declaring an entry point in the group ``mmtard_bench``: a module that is
imported, and registers with the decorators below, the first time a name is looked up.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from pydantic import TypeAdapter

from mmtard_bench.errors import InputError, reason
from mmtard_bench.schema import Text, fitting
from mmtard_bench.types import Task

if TYPE_CHECKING:
    from mmtard_bench.attacks.base import Attack, EngineName, Precision
    from mmtard_bench.data.base import Dataset
    from mmtard_bench.models.clip import Clip
    from mmtard_bench.types import Protocol, ThreatModel

T = TypeVar("T")
P = ParamSpec("P")

RANGES = {"steps": (1, 100_000), "queries": (1, 100_000), "edits": (0, 9)}
"""What may stand in braces in the name of an attack, and from where to where."""

_MOST = 40
"""Names that an error sentence lists."""
_NAME = TypeAdapter[str](Text)
_ATTACK = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:+-]|\{\w+\}){0,100}")
"""Names that records can have, with places for numbers."""


@cache
def _load_other_packages() -> None:
    """Import what other packages register; one that cannot be imported costs only its own names."""
    for entry in entry_points(group="mmtard_bench"):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # anybody's code
            warnings.warn(
                f"The package behind the entry point '{entry.name}' ({entry.value}) could not be "
                f"imported, so what it registers is missing: {reason(error)}. Repair or remove it.",
                stacklevel=2,
            )


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

    ``built_in`` is the module of this package that registers ours, imported on first use;
    ``require`` raises InputError for a name that things of the kind cannot have.
    """

    def __init__(
        self, kind: str, built_in: str, require: Callable[[str], None] = lambda _: None
    ) -> None:
        self.kind = kind
        self._require = require
        self._built_in = f"mmtard_bench.{built_in}"
        self._items: dict[str, T] = {}
        self._taken: set[str] = set()
        self._importing = False

    def _load(self) -> None:
        self._importing = True
        try:
            import_module(self._built_in)
        finally:
            self._importing = False
        _load_other_packages()

    def add(self, name: str, item: T) -> None:
        fitting(_NAME, name, f"The name of the {self.kind}")
        self._require(name)
        if name not in self._items:
            self._items[name] = item
        elif self._importing:
            # Somebody took one of our names before ours were there: only that name is lost.
            self._taken.add(name)
        else:
            raise InputError(f"The {self.kind} '{name}' is taken; choose another.")

    def get(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise InputError(f"There is no {self.kind} '{name}'. {near_matches(name, self)}")
        if name in self._taken:
            raise InputError(
                f"The {self.kind} '{name}' is one of this package's, and another was registered "
                "under its name; register that one under another name."
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))


def _require_attack(name: str) -> None:
    places = re.findall(r"\{(\w+)\}", name)
    known = set(places) <= RANGES.keys() and len(set(places)) == len(places)
    if not known or not _ATTACK.fullmatch(name):
        raise InputError(
            f"'{name}' cannot be the name of an attack; expected letters, digits and . _ : + -, "
            f"and at most one each of {', '.join(f'{{{what}}}' for what in RANGES)}, which stand "
            "for numbers."
        )


models: "Registry[Callable[[], Clip]]" = Registry("model", "models.tiny")
datasets: "Registry[Callable[[], Dataset]]" = Registry("data set", "data.digits")
tasks: "Registry[Task]" = Registry("task", "tasks.catalogue")
attacks: "Registry[Callable[[ThreatModel, int], Attack]]" = Registry(
    "attack", "attacks.catalogue", _require_attack
)
fast_attacks: "Registry[Callable[[ThreatModel, int, Precision], Attack]]" = Registry(
    "fast attack", "attacks.catalogue", _require_attack
)
protocols: "Registry[Protocol]" = Registry("protocol", "tasks.protocols")


def made(registry: Registry[Callable[P, T]], name: str, *args: P.args, **named: P.kwargs) -> T:
    """What a registered function returns. Raises InputError, with its name, if it raises."""
    build = registry.get(name)
    try:
        return build(*args, **named)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # anybody's code
        raise InputError(
            f"The {registry.kind} '{name}' is registered, but its function "
            f"{getattr(build, '__name__', build)} failed: {reason(error)}."
        ) from error


def _decorator(registry: Registry[T], name: str) -> Callable[[T], T]:
    fitting(_NAME, name, f"The name of the {registry.kind}")

    def register(item: T) -> T:
        if not callable(item):
            raise InputError(
                f"The {registry.kind} '{name}' is a {type(item).__name__}; expected a function."
            )
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
    name: str, *, engine: "EngineName" = "reference"
) -> Callable[[Callable[P, "Attack"]], Callable[P, "Attack"]]:
    """Decorate a function that makes an ``Attack``.

    Args:
        name: The name in threat models. ``{steps}``, ``{queries}`` and ``{edits}`` stand for every
            number of them, as in ``pgd-{steps}``.
        engine: "reference": the function takes (threat model, number of classes). "fast": it takes
            (threat model, number of classes, precision) and makes the attack of the fast engine,
            see ``staged``. An attack may have one form or both; with one form, it runs under the
            fast engine in any case.

    Raises:
        InputError: If the name is taken, or cannot be the name of an attack.
    """
    kind: Registry[Any] = attacks if engine == "reference" else fast_attacks
    return _decorator(kind, name)


def register_task(task: "Task") -> None:
    """Register a task under its own name. Raises InputError for anything but a ``Task``."""
    if not isinstance(task, Task):
        raise InputError(f"register_task was given a {type(task).__name__}; expected a Task.")
    tasks.add(task.name, task)


def attack_names() -> list[str]:
    """The names of all attacks, of either engine."""
    return sorted({*attacks, *fast_attacks})


def attack_family(name: str) -> str:
    """The registered name of an attack: "pgd-20" -> "pgd-{steps}". Raises InputError."""
    names = attack_names()
    if name in names and "{" not in name:
        return name
    for family in names:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]{1,9})", re.escape(family))
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        for what, number in match.groupdict().items():
            least, most = RANGES[what]
            if not least <= int(number) <= most:
                raise InputError(f"The attack '{name}' needs {least} to {most} {what}.")
        return family
    hint = near_matches(name, names)
    raise InputError(f"There is no attack '{name}'. {hint}")

"""How values from outside are checked: tables by ``Strict`` models, arguments by ``checked``."""

import functools
import inspect
import operator
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
)
from pydantic.errors import PydanticSchemaGenerationError

from mmtard_bench.errors import (
    InputError,
)
from mmtard_bench.files import read_text

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Strict(BaseModel):
    """Fields as they are declared, no others, no conversion, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text


def _whole(value: object) -> object:
    """Integers of numpy and torch as Python's; what is no integer stays, and is refused."""
    try:
        return value if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return value


Text = Annotated[str, AfterValidator(_said)]
Whole = Annotated[int, BeforeValidator(_whole)]


def checked(function: F) -> F:
    """Check the arguments of a public function, or the fields of a dataclass, as annotated.

    Annotations are pydantic's, with ``InstanceOf`` for classes. What pydantic has no rule for
    (protocols, tensors) and ``SkipValidation`` are left to the function. There is no conversion
    but what an annotation has. Values that do not fit raise InputError, with what was given and
    what was expected.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def kinds() -> dict[str, TypeAdapter[Any] | None]:
        # On the first call: a name in an annotation may be defined further down.
        hints = get_type_hints(function, include_extras=True)
        return {key: _kind(hints[key]) for key in signature.parameters.keys() & hints}

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*arguments, **named)
        except TypeError:
            return function(*arguments, **named)  # whose own words name what is missing
        for key, kind in kinds().items():
            if kind is not None and key in bound.arguments:
                bound.arguments[key] = fitting(kind, bound.arguments[key], f"{name}: {key}")
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def _kind(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return None


def fitting(kind: TypeAdapter[T], value: object, what: str) -> T:
    """The value as it is of a kind. Raises InputError, with what it is called, if it is not."""
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        wanted = dict.fromkeys(
            re.sub(r"^(Input should be|Value error,) ", "", problem["msg"])
            for problem in error.errors(include_url=False)
        )
        given = repr(value)
        given = given if len(given) <= 80 else f"{given[:77]}..."
        raise InputError(
            f"{what} = {given} ({type(value).__name__}) does not fit; expected "
            f"{' or '.join(wanted)}."
        ) from error


_KIND = re.compile(r"[\[-]|^(TaskTable|str)$")
"""What pydantic puts beside keys: the kinds of a union, such as "constrained-int"."""


@contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turn a pydantic error into an InputError: ``what`` is not valid, the reasons, a remedy."""
    try:
        yield
    except ValidationError as error:
        raise InputError(f"{what}: {explain(error)} {remedy}".rstrip()) from error


def explain(error: ValidationError) -> str:
    """The first problems of a pydantic error in one message."""
    said = []
    problems = error.errors()
    # Where a name or a table may stand, a table is not wrong for being no name.
    problems = [
        p for p in problems if not (p["loc"][-1:] == ("str",) and isinstance(p["input"], dict))
    ]
    for problem in problems[:3]:
        where = ".".join(str(part) for part in problem["loc"] if not _KIND.search(str(part)))
        if problem["type"] == "extra_forbidden":
            said.append(f"the key '{where}' is unknown")
        elif problem["type"] == "missing":
            said.append(f"the key '{where}' is missing")
        else:
            said.append(f"'{where}': {problem['msg']}" if where else problem["msg"])
    return "; ".join(said) + "."


M = TypeVar("M", bound=BaseModel)


def read_table(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file that is a ``what``. Raises InputError if it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"The {what} {path} cannot be read: {error}.") from error


def validate(kind: type[M], table: dict[str, Any], what: str, remedy: str = "") -> M:
    """A table as a pydantic model. Raises InputError with what is wrong in it."""
    with explained(f"The {what} is not valid", remedy):
        return kind.model_validate(table)

"""Tasks as suites and recipes declare them in TOML."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmtard_bench.errors import InputError
from mmtard_bench.files import lines_in, read_text
from mmtard_bench.schema import Strict
from mmtard_bench.tasks.catalogue import imagenet_classes
from mmtard_bench.tasks.samples import default_templates, find_task
from mmtard_bench.types import Metric, Task


class TaskTable(Strict):
    """A task that a suite or a recipe declares; ``Task`` documents the keys."""

    name: str = Field(min_length=1)
    data: str = Field(min_length=1)
    templates: list[str] | None = Field(default=None, min_length=1)
    classes: list[str] | Literal["imagenet-1k"] = Field(default_factory=list)
    classes_file: str | None = None
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    convert_rgb: bool = False
    metric: Metric = "zero-shot classification"
    description: str = ""
    n_classes: int | None = Field(default=None, ge=2)
    samples: int | None = Field(default=None, ge=1)
    shard_samples: int | None = Field(default=None, ge=1)
    samples_file: str | None = Field(default=None, min_length=1)


def resolve_task(table: str | TaskTable) -> Task:
    """The task that a suite or recipe names or declares. Raises InputError."""
    if isinstance(table, str):
        return find_task(table)
    templates = table.templates or default_templates(table.data, table.metric)
    own = table.model_dump(exclude={"templates", "classes", "classes_file"})
    return Task(**own, templates=tuple(templates), classes=_classes(table))


def _classes(table: TaskTable) -> tuple[str, ...]:
    if table.classes == "imagenet-1k":
        return imagenet_classes()
    if table.classes_file is None:
        return tuple(table.classes)
    if table.classes:
        raise InputError(f"The task '{table.name}' has classes and classes_file; give one.")
    try:
        names = [line.strip() for line in lines_in(read_text(Path(table.classes_file)))]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The class names of the task '{table.name}' cannot be read: {error}."
        ) from error
    if "" in names:
        raise InputError(
            f"Line {names.index('') + 1} of {table.classes_file}, the class names of the task "
            f"'{table.name}', is empty; expected one name a line, the first for the label 0."
        )
    return tuple(names)

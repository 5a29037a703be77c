"""Recipes: TOML files that say everything about a training run but where it runs.

A recipe is trusted as a script is: it may name a function of any package as its student or as a
teacher (``package.module:function``), which training imports and calls. Nothing but training reads
recipes; those in the cards of checkpoints are never carried out.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmtard_bench.errors import InputError
from mmtard_bench.records.schema import digest_of
from mmtard_bench.registry import near_matches
from mmtard_bench.schema import Strict, read_table, validate
from mmtard_bench.tasks.tables import TaskTable, resolve_task
from mmtard_bench.types import Eps, Norm, Surface

_HOUSEKEEPING = {"description", "validation", "workers", "log_every", "save_every", "keep"}
FOLDER = Path(__file__).parent / "recipes"


class InnerAttack(Strict):
    """PGD while training: ``steps`` steps of ``step_size`` (fractions of a pixel) within eps."""

    norm: Norm = "linf"
    eps: str
    steps: int = Field(ge=1)
    step_size: str

    @model_validator(mode="after")
    def _exact(self) -> "InnerAttack":
        Eps.parse(self.eps, norm=self.norm)
        Eps.parse(self.step_size, norm=self.norm)
        return self


class Lora(Strict):
    """Low-rank adapters (Hu et al., 2022) on qkv and proj of every attention."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)


class Validation(Strict):
    """Held-out accuracy while training, clean and under PGD with the recipe's inner attack.

    ``samples`` are drawn evenly from all classes.
    """

    task: str | TaskTable
    samples: int = Field(ge=1)
    every: int = Field(ge=1)


class Recipe(Strict):
    """A training run. ``batch`` is over all processes; ``warmup`` is a share of the steps.

    ``teachers`` names models by role; a model is whatever ``mmtard-bench run --model`` takes.
    ``surface`` says which pixels are attacked: the data set's own, or those at the student's
    input size.
    """

    description: str = Field(min_length=1)
    method: str
    options: dict[str, bool | int | float] = Field(default={})
    student: str = Field(min_length=1)
    teachers: dict[Literal["clean", "robust"], str] = Field(default={})
    train: str | TaskTable
    validation: Validation
    attack: InnerAttack
    surface: Surface = "native"
    lora: Lora | None = None
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup: float = Field(ge=0, lt=1)
    clip_norm: float = Field(gt=0)
    precision: Literal["no", "bf16"] = "no"
    workers: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)

    @property
    def meaning(self) -> dict[str, Any]:
        """What decides the weights that come out: all but what is only looked at or kept."""
        return self.model_dump(exclude=_HOUSEKEEPING)

    @property
    def digest(self) -> str:
        """SHA-256 of ``meaning``."""
        return digest_of(self.meaning)


@dataclass(frozen=True)
class Named:
    """A recipe and its name: "digits/mmt-ard", or the path it was read from."""

    name: str
    recipe: Recipe


def list_recipes() -> list[str]:
    """The names of the recipes that ship."""
    return sorted(
        path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.toml")
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Named:
    """A recipe by name or path of a .toml file, with ``key=value`` overrides.

    A dotted key reaches into a table (``attack.steps=5``). Values are TOML; what is not TOML is
    taken as a string. Raises InputError for whatever is unknown, impossible or unreadable.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in list_recipes():
        raise InputError(
            f"There is no recipe '{name}'. {near_matches(name, list_recipes())} "
            "A path to a recipe of your own ends in .toml."
        )
    table = read_table(path, "recipe")
    for key, value in map(_override, overrides):
        _put(table, key, value)
    recipe = validate(Recipe, table, f"recipe {name}", "docs/reference/recipes.md lists every key.")
    resolve_task(recipe.train)
    resolve_task(recipe.validation.task)
    return Named(name, recipe)


def _override(text: str) -> tuple[list[str], object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"'--set {text}' is not KEY=VALUE; write for example --set steps=300.")
    try:
        return key.split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.split("."), value


def _put(table: dict[str, Any], key: list[str], value: object) -> None:
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(
                f"'--set {'.'.join(key)}=...': '{part}' is no table of the recipe, so nothing can "
                "be set in it."
            )
    table[key[-1]] = value

"""Figures that others published, as facts with sources. Imports without torch.

Nothing here can check them. The leaderboard shows them in tables of their own, one per protocol and
metric, marked "reported", and never ranks them among records.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtard_bench import registry
from mmtard_bench.errors import InputError
from mmtard_bench.schema import explain
from mmtard_bench.text import escape, table

Text = Annotated[str, Field(min_length=1)]
Radius = Annotated[str, Field(pattern=r"^([1-9]\d*/[1-9]\d*)?$")]


class Reported(BaseModel):
    """One published accuracy, in percent. ``threat`` is "clean", or the name of an attack.

    ``eps`` is the attack's radius, empty for "clean". ``hub`` is the model's repository, or empty.
    ``train_eps`` is the radius that the model was trained for, empty if it was not trained to be
    robust.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    protocol: Text
    model: Text
    hub: str
    backbone: Text
    method: Text
    train_eps: Radius
    metric: Text
    threat: Text
    eps: Radius
    value: Annotated[Decimal, Field(ge=0, le=100)]
    source: Text

    @model_validator(mode="after")
    def _a_ball_for_an_attack(self) -> "Reported":
        if (self.threat == "clean") != (self.eps == ""):
            raise ValueError("an attack needs an eps, and a clean accuracy has none")
        return self

    @property
    def column(self) -> str:
        """For example "apgd-pair 2/255"."""
        return f"{self.threat} {self.eps}".strip()


def read_reported(path: Path) -> list[Reported]:
    """Read a CSV file whose columns are the fields of ``Reported``.

    Raises InputError if the file cannot be read, names a protocol that is not registered, or
    contains a figure twice.
    """
    try:
        text = path.read_text("utf-8")
        lines = list(csv.DictReader(io.StringIO(text), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The published figures in {path} cannot be read: {error}.") from error
    rows: dict[tuple[str, ...], Reported] = {}
    for number, line in enumerate(lines, start=2):
        try:
            row = Reported.model_validate(line)
        except (ValidationError, TypeError) as error:
            why = explain(error) if isinstance(error, ValidationError) else "too many columns."
            raise InputError(f"{path}, line {number}: {why}") from error
        registry.protocols.get(row.protocol)
        place = (row.protocol, row.model, row.metric, row.column)
        if place in rows:
            raise InputError(
                f"{path}, line {number}: an earlier line has the figure for {', '.join(place)}."
            )
        rows[place] = row
    return list(rows.values())


def reported_tables(rows: Sequence[Reported]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The published figures as (title, headers, rows), one table per protocol and metric.

    Models keep the order of the file; they are not ranked by their figures.
    """
    tables: dict[tuple[str, str], list[Reported]] = defaultdict(list)
    for row in rows:
        tables[row.protocol, row.metric].append(row)
    return [
        (f"{protocol}, {metric}", *_table(group)) for (protocol, metric), group in tables.items()
    ]


def reported_section(rows: Sequence[Reported]) -> str:
    """The published figures as markdown; "" if there are none."""
    if not rows:
        return ""
    parts = [
        "## Reported by others",
        "Accuracies in percent, as their authors published them: without samples, seeds or "
        "intervals. **Nobody checked them here**, so they are not ranked among the records above. "
        "Do not compare figures of different protocols.",
    ]
    for title, headers, lines in reported_tables(rows):
        cells = [[escape(cell) for cell in line] for line in lines]
        parts.append(f"### {escape(title)} (reported)\n\n{table(cells, headers)}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Reported]) -> tuple[list[str], list[list[str]]]:
    columns = sorted({r.column for r in rows}, key=lambda c: (c != "clean", c))
    models: dict[str, dict[str, Reported]] = defaultdict(dict)
    for row in rows:
        models[row.model][row.column] = row
    lines = []
    for name, cells in models.items():
        first = next(iter(cells.values()))
        sources = dict.fromkeys(row.source for row in cells.values())
        facts = [name, first.hub, first.backbone, first.method, first.train_eps]
        values = [str(cells[c].value) if c in cells else "" for c in columns]
        lines.append([*facts, "reported", *values, "; ".join(sources)])
    headers = ["model", "hub", "backbone", "method", "trained for", "status", *columns, "source"]
    return headers, lines

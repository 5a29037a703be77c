"""The command that compares two models on the same samples: compare."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from mmtard_bench.cli.common import Commands, records_at
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.records.compare import Comparison
    from mmtard_bench.records.schema import ModelFacts, Record


def add(commands: Commands) -> None:
    """Add compare."""
    command = commands.add_parser(
        "compare", help="compare two models on the same samples, with a test"
    )
    for name in ("a", "b"):
        command.add_argument(
            name, type=Path, metavar=name.upper(), help="a run directory, an entry, or one record"
        )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from mmtard_bench.records.compare import compare
    from mmtard_bench.records.statistics import LEVEL

    sides = [records_at(path) for path in (arguments.a, arguments.b)]
    models = [
        _model(records, path)
        for records, path in zip(sides, (arguments.a, arguments.b), strict=True)
    ]
    found = compare(*sides)
    if arguments.json:
        facts = [{"name": model.name, "digest": model.digest} for model in models]
        rows = [{**asdict(row), "better": row.better} for row in found]
        body = {"a": facts[0], "b": facts[1], "level": LEVEL, "comparisons": rows}
        print(json.dumps(body, indent=1))
        return 0
    for letter, model in zip("AB", models, strict=True):
        print(printable(f"{letter}: {model.name} ({model.digest[:8]})"))
    print(printable(f"\n{_table(found)}\n\n{_conclusion(found)}"))
    return 0


def _model(records: "Sequence[Record]", path: Path) -> "ModelFacts":
    models = {record.model.digest: record.model for record in records}
    if len(models) > 1:
        names = ", ".join(sorted({model.name for model in models.values()}))
        raise InputError(
            f"{path} holds the records of {len(models)} models ({names}); expected one. Name the "
            "directory of one, such as runs/digits-v1/my-clip-1a2b3c4d."
        )
    return next(iter(models.values()))


def _table(found: "Sequence[Comparison]") -> str:
    headers = ["task", "threat model", "n", "A %", "B %", "A - B, points", "only A", "only B"]
    headers += ["p", "p (Holm)", "better"]
    rows = [
        [
            _place(row, found),
            row.what,
            row.n,
            f"{100 * row.a:.1f}",
            f"{100 * row.b:.1f}",
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                *(100 * value for value in (row.a - row.b, *row.interval))
            ),
            row.only_a,
            row.only_b,
            _p(row.p),
            _p(row.p_holm),
            row.better.upper(),
        ]
        for row in found
    ]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _conclusion(found: "Sequence[Comparison]") -> str:
    """How many comparisons were corrected for, and which model is better where."""
    from mmtard_bench.records.statistics import LEVEL

    won = {side: [row for row in found if row.better == side] for side in ("a", "b", "")}
    parts = [
        f"{side.upper()} is better in {len(won[side])} ({_where(won[side], found)})"
        for side in "ab"
        if won[side]
    ]
    if won[""]:
        parts.append(f"no difference is shown in {len(won[''])}")
    several = f"{len(found)} comparisons" if len(found) > 1 else "1 comparison"
    return (
        f"At {LEVEL:.0%}, by McNemar's exact test with Holm's correction for {several}: "
        f"{', '.join(parts)}."
    )


def _where(won: "Sequence[Comparison]", found: "Sequence[Comparison]") -> str:
    """The tasks of some comparisons: "digits/digit: all; digits/unseen: clean"."""
    said = []
    for place in dict.fromkeys(_place(row, found) for row in won):
        here = [row.what for row in won if _place(row, found) == place]
        every = sum(_place(row, found) == place for row in found)
        said.append(f"{place}: {', '.join(here) if len(here) < every else 'all'}")
    return "; ".join(said)


def _place(row: "Comparison", found: "Sequence[Comparison]") -> str:
    """A task, with its suite where there are several."""
    several = len({other.suite for other in found}) > 1
    return f"{row.suite or 'no suite'}: {row.task}" if several else row.task

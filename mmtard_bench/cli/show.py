"""Commands that look at the records of a run: show, plot."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.cli.common import Commands, records_at
from mmtard_bench.markdown import printable

if TYPE_CHECKING:
    from mmtard_bench.records import Record


def add(commands: Commands) -> None:
    """Add show and plot."""
    command = commands.add_parser("show", help="show the records of a run")
    command.add_argument("path", type=Path, help="a run directory, or one record")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_show)

    command = commands.add_parser("plot", help="draw accuracy against eps and against passes")
    command.add_argument("path", type=Path, help="a run directory, or one record")
    command.add_argument("--out", type=Path, help="default: figures/ beside the records")
    command.set_defaults(run=_plot)


def _show(arguments: argparse.Namespace) -> int:
    from mmtard_bench.records import to_text
    from mmtard_bench.summary import table_of

    records = records_at(arguments.path)
    if arguments.json:
        print("[" + ",\n".join(to_text(record).strip() for record in records) + "]")
        return 0
    groups: dict[str, list[Record]] = {}
    for record in records:
        on = f"{record.suite.name} ({record.suite.digest[:8]})" if record.suite else "no suite"
        name = f"{record.model.name} ({record.model.digest[:8]}) on {on}, seed {record.seed}"
        groups.setdefault(name, []).append(record)
    for name, group in groups.items():
        print(f"{printable(name)}\n\n{printable(table_of(group))}\n")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from mmtard_bench.figures import draw

    path: Path = arguments.path
    records = records_at(path)
    folder = arguments.out or (path if path.is_dir() else path.parent) / "figures"
    print("\n".join(map(str, draw(records, folder))))
    return 0

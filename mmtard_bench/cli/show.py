"""Commands that look at the records of a run: show, plot."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.cli.common import Commands, file_of, output, positive, records_at, seed
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable, slug

if TYPE_CHECKING:
    from mmtard_bench.records.schema import Record


def add(commands: Commands) -> None:
    """Add show and plot."""
    command = commands.add_parser("show", help="print the records of a run, or a gallery of images")
    command.add_argument("path", type=Path, help="a run directory, or one record")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument(
        "--gallery",
        action="store_true",
        help="attack some samples of a record again, and write what became of their images",
    )
    _add_gallery(command)
    command.set_defaults(run=_show)

    command = commands.add_parser(
        "plot", help="plot accuracy against eps, and against the cost of attacks in passes"
    )
    command.add_argument("path", type=Path, help="a run directory, or one record")
    command.add_argument(
        "--out",
        type=output,
        help="a directory (default: figures/ and the path's last part)",
    )
    command.set_defaults(run=_plot)


def _add_gallery(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("of a gallery")
    group.add_argument("--task", help="task of the record (default: the first with broken samples)")
    group.add_argument("--threat", help="threat model of the record, such as 'pgd-20 linf 8/255'")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--samples", metavar="ID,ID", help="these samples")
    which.add_argument(
        "--random",
        type=positive,
        metavar="N",
        help="N random samples that were attacked (default: 8)",
    )
    group.add_argument("--seed", type=seed, help="seed of the random choice (default: 0)")
    group.add_argument(
        "--weights", metavar="SPEC", help="load the model from SPEC instead of the record's source"
    )
    group.add_argument(
        "--suite",
        type=Path,
        metavar="FILE.toml",
        help="suite file of the record, if the suite does not ship",
    )
    group.add_argument("--out", type=output, help="a .html or .png file (default: gallery.html)")


def _show(arguments: argparse.Namespace) -> int:
    if arguments.gallery:
        return _gallery(arguments)
    for name in ("task", "threat", "samples", "random", "seed", "weights", "suite", "out"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is for a gallery; add --gallery, or leave it out.")

    from mmtard_bench.records.tables import table_of
    from mmtard_bench.records.worst import counted

    records = records_at(arguments.path)
    if arguments.json:
        print("[" + ",\n".join(record.to_text().strip() for record in records) + "]")
        return 0
    groups: dict[str, list[Record]] = {}
    for record in records:
        on = f"{record.suite.name} ({record.suite.digest[:8]})" if record.suite else "no suite"
        name = f"{record.model.name} ({record.model.digest[:8]}) on {on}, seed {record.seed}"
        groups.setdefault(name, []).append(record)
    for name, group in groups.items():
        shown, others = counted(group)
        print(f"{printable(name)}\n\n{printable(table_of(shown))}\n")
        for record in others:
            where = file_of(record, arguments.path)
            print(printable(f"not counted: {where}: {_why_not(record, shown)}"))
    return 0


def _why_not(record: "Record", shown: "Sequence[Record]") -> str:
    """Why a record is not in the table of its run, and what to do."""
    place = f"{record.threat.name} on {record.task.name}"
    if place in {f"{r.threat.name} on {r.task.name}" for r in shown}:
        return f"there is a newer record of {place}; delete or move this one"
    return (
        f"{place} was evaluated on other data, samples or prompts than the newest record of the "
        "task; run the suite again, then delete or move this one"
    )


def _gallery(arguments: argparse.Namespace) -> int:
    records = records_at(arguments.path)

    from mmtard_bench.evaluation import gallery, gallery_page
    from mmtard_bench.evaluation.device import find_device
    from mmtard_bench.evaluation.sources import load_model_of
    from mmtard_bench.leaderboard.entries.folder import require_outside

    out: Path = arguments.out or require_outside(Path("gallery.html"))
    gallery_page.require_format(out)
    record = gallery.choose_record(records, task=arguments.task, threat=arguments.threat)
    chosen = gallery.choose_samples(
        record,
        ids=arguments.samples.split(",") if arguments.samples else (),
        count=arguments.random or 8,
        seed=arguments.seed or 0,
    )
    clip = load_model_of(record, arguments.weights)
    found = gallery.look(record, chosen, clip, find_device("auto"), suite_file=arguments.suite)
    gallery_page.write_gallery(found, out)
    print(printable(f"{gallery.title_of(found)}\n{gallery.summary_of(found)}\n{out}"))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from mmtard_bench.leaderboard.entries.folder import require_outside
    from mmtard_bench.records.figures import draw

    path: Path = arguments.path
    name = path.resolve().name if path.is_dir() else path.stem
    folder = arguments.out or require_outside(Path("figures") / slug(name))
    print("\n".join(map(str, draw(records_at(path), folder))))
    return 0

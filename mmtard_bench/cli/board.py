"""Commands for the leaderboard."""

import argparse
import sys
from pathlib import Path

from mmtard_bench.cli.common import STATUS_STALE, Commands, say_error


def add(commands: Commands) -> None:
    """Add leaderboard."""
    command = commands.add_parser("leaderboard", help="write the leaderboard from records")
    command.add_argument(
        "--records", type=Path, default=Path("leaderboard/entries"), help="where records are"
    )
    command.add_argument("--output", type=Path, default=Path("leaderboard/README.md"))
    command.add_argument(
        "--reported",
        type=Path,
        help="a CSV file of published figures; reported.csv beside the records unless given",
    )
    command.add_argument("--open", action="store_true", help="show what was written")
    command.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if it is stale"
    )
    command.set_defaults(run=_leaderboard)


def _leaderboard(arguments: argparse.Namespace) -> int:
    import webbrowser

    from mmtard_bench.leaderboard import load_records, render
    from mmtard_bench.records import write_atomically
    from mmtard_bench.reported import read_reported

    beside: Path = arguments.reported or arguments.records.parent / "reported.csv"
    reported = read_reported(beside) if arguments.reported or beside.is_file() else []
    text = render(load_records(arguments.records), reported)
    output: Path = arguments.output
    if arguments.check:
        if output.is_file() and output.read_bytes() == text.encode():
            return 0
        say_error(f"{output} is stale: write it again with mmtard-bench leaderboard.")
        return STATUS_STALE
    write_atomically(output, text)
    print(text)
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        print(f"no program was found that shows it; open {output} yourself", file=sys.stderr)
    return 0

"""Commands for the leaderboard: submit, leaderboard."""

import argparse
import sys
from pathlib import Path

from mmtard_bench.cli.common import STATUS_STALE, Commands, records_at, say_error
from mmtard_bench.errors import InputError
from mmtard_bench.markdown import printable

ENTRIES = Path("leaderboard/entries")


def add(commands: Commands) -> None:
    """Add submit and leaderboard."""
    command = commands.add_parser("submit", help="make a leaderboard entry of a run")
    command.add_argument("path", type=Path, help="a run directory")
    command.add_argument("--name", required=True, help="of the entry: my-clip")
    command.add_argument(
        "--weights", help="where anybody gets them: hf-hub:me/my-clip; as the run had them if not"
    )
    command.add_argument("--paper", help="its https:// address")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another field of the model card: authors, code, licence, contact, ...",
    )
    command.add_argument("--entries", type=Path, default=ENTRIES, help=f"default: {ENTRIES}")
    command.set_defaults(run=_submit)

    command = commands.add_parser("leaderboard", help="write the leaderboard from its entries")
    command.add_argument(
        "--records", type=Path, default=ENTRIES, help="where entries, or records of runs, are"
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


def _submit(arguments: argparse.Namespace) -> int:
    from mmtard_bench.entries.submit import submit

    facts = {"weights": arguments.weights, "paper": arguments.paper}
    facts = {key: value for key, value in facts.items() if value is not None}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: expected KEY=VALUE, such as authors='A. One; B. Two'.")
        facts[key.strip()] = value.strip()
    entry, written = submit(
        records_at(arguments.path), name=arguments.name, facts=facts, root=arguments.entries
    )
    print("\n".join(map(str, written)))
    if entry.card.unsaid:
        print(printable(f"the card does not say: {', '.join(entry.card.unsaid)} (--set KEY=VALUE)"))
    print(f"check it: mmtard-bench verify {entry.place}\nthen: mmtard-bench leaderboard")
    return 0


def _leaderboard(arguments: argparse.Namespace) -> int:
    import webbrowser

    from mmtard_bench.entries.board import read_board
    from mmtard_bench.leaderboard import render
    from mmtard_bench.records import write_atomically

    text = render(read_board(arguments.records, arguments.reported))
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

"""Commands for the leaderboard: submit, leaderboard."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.cli.common import AGAIN, STATUS_STALE, Commands, output, records_at, say_error
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.records.schema import Record

ENTRIES = Path("leaderboard/entries")
README = Path("leaderboard/README.md")


def add(commands: Commands) -> None:
    """Add submit and leaderboard."""
    command = commands.add_parser("submit", help="make a leaderboard entry from a run")
    command.add_argument("path", type=Path, help="a run directory")
    command.add_argument("--name", required=True, help="name of the entry, such as my-clip")
    command.add_argument(
        "--weights",
        help="public source of the weights, such as hf-hub:me/my-clip (default: that of the run)",
    )
    command.add_argument("--paper", help="the https:// address of the paper")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another field of the model card: authors, code, licence, contact, ...",
    )
    command.add_argument("--entries", type=Path, default=ENTRIES, help=f"default: {ENTRIES}")
    command.add_argument(
        "--adversarials",
        type=output,
        metavar="FILE",
        help="attack again, and write the images that break samples into this file",
    )
    command.add_argument("--device", default="auto", help="for --adversarials: auto, cpu, cuda")
    command.set_defaults(run=_submit, kept=AGAIN)

    command = commands.add_parser(
        "leaderboard", help="write the leaderboard from entries or records"
    )
    command.add_argument(
        "--records",
        type=Path,
        default=ENTRIES,
        help=f"directory of entries, or of a run's records (default: {ENTRIES})",
    )
    command.add_argument(
        "--output",
        type=output,
        help=f"markdown file to write (default: {README} for {ENTRIES}; for other records the "
        "tables are only printed)",
    )
    command.add_argument(
        "--reported",
        type=Path,
        help="CSV file of published figures (default: reported.csv beside the records)",
    )
    command.add_argument(
        "--html",
        action="store_true",
        help="also write index.html and plots beside the markdown file; if they exist already, "
        "they are written without this option too",
    )
    command.add_argument("--open", action="store_true", help="open what was written in a browser")
    command.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with status 1 if the files differ from what would be written",
    )
    command.set_defaults(run=_leaderboard)


def _submit(arguments: argparse.Namespace) -> int:
    from mmtard_bench.leaderboard.entries.submit import submit

    facts = {"weights": arguments.weights, "paper": arguments.paper}
    facts = {key: value for key, value in facts.items() if value is not None}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: expected KEY=VALUE, such as authors='A. One; B. Two'.")
        facts[key.strip()] = value.strip()
    records = records_at(arguments.path)
    if arguments.adversarials is not None:
        facts["adversarials"] = _adversarials(records, arguments.adversarials, arguments.device)
    entry, written = submit(records, name=arguments.name, facts=facts, root=arguments.entries)
    print(printable("\n".join(map(str, written))))
    if entry.card.unsaid:
        print(printable(f"the card does not say: {', '.join(entry.card.unsaid)} (--set KEY=VALUE)"))
    board = argparse.Namespace(records=arguments.entries, output=None, reported=None)
    if arguments.entries != ENTRIES:
        board.output = arguments.entries.parent / "README.md"
    check = f"mmtard-bench verify {shlex.quote(str(entry.place))}"
    print(printable(f"check it: {check}\nthen: {_command(board)}"))
    return 0


def _adversarials(records: "list[Record]", path: Path, device: str) -> str:
    """Write images that break the model of a run; returns the file's SHA-256."""
    from mmtard_bench.evaluation.device import Resources, find_device
    from mmtard_bench.leaderboard.entries.submit import newest
    from mmtard_bench.leaderboard.verify.images import gather, write_adversarials
    from mmtard_bench.models.loading import load_known

    records = [record for run in newest(records).values() for record in run]
    model = records[0].model
    clip = load_known(model.source, model.digest, "the run")
    stacks = gather(
        clip,
        records,
        Resources(find_device(device)),
        # Another than the suites have: that these images break samples is news, not a copy.
        seed=1,
        tell=lambda line: print(printable(line), flush=True),
    )
    if not stacks:
        raise InputError(
            f"No image breaks a sample of '{model.name}', so {path} would be empty; leave "
            "--adversarials out."
        )
    file = write_adversarials(path, clip.digest, stacks)
    print(f"{path}: SHA-256 {file.digest}; put it where others can get it")
    return file.digest


def check_tables() -> int:
    """The exit status of ``leaderboard --check --html`` in this directory."""
    return _leaderboard(
        argparse.Namespace(
            records=ENTRIES, output=None, reported=None, html=True, open=False, check=True
        )
    )


def _leaderboard(arguments: argparse.Namespace) -> int:
    import webbrowser

    from mmtard_bench.files import write_atomically
    from mmtard_bench.leaderboard.board import read_board
    from mmtard_bench.leaderboard.markdown import render
    from mmtard_bench.leaderboard.page import site

    board = read_board(arguments.records, arguments.reported)
    out: Path | None = arguments.output
    if out is None and arguments.records.resolve() == ENTRIES.resolve():
        out = README
    if out is None:
        if arguments.html or arguments.open or arguments.check:
            raise InputError(
                f"The tables of {arguments.records} are only printed; to have files (--html, "
                "--open, --check), say where: --output FILE.md."
            )
        print(render(board))
        return 0
    page = out.with_name("index.html")
    if out == page:
        raise InputError(f"{out} is the page's name; expected another --output for the tables.")
    # A page that is there must not contradict the tables beside it.
    html = arguments.html or page.is_file()
    made = site(board, beside=out.name) if html else {}
    texts = {out: render(board, beside=made)}
    texts |= {out.with_name(name): text for name, text in made.items()}
    if arguments.check:
        plots = {path for path in out.parent.glob("*-scatter.svg") if html}
        return _check(texts, sorted(plots - texts.keys()), _command(arguments) + " --html" * html)
    for path, text in texts.items():
        write_atomically(path, text)
    print(texts[out])
    print(printable(f"written: {', '.join(map(str, texts))}"), file=sys.stderr)
    shown = page if html else out
    if arguments.open and not webbrowser.open(shown.resolve().as_uri()):
        print(f"no program was found that shows it; open {shown} yourself", file=sys.stderr)
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """The command that writes a leaderboard from the same records to the same place."""
    words = ["mmtard-bench", "leaderboard"]
    for option in ("records", "output", "reported"):
        value = getattr(arguments, option)
        if value not in (None, ENTRIES):
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _check(texts: Mapping[Path, str], others: Sequence[Path], command: str) -> int:
    """Whether the files are these texts, and plain; ``others`` are plots of no suite."""
    if others:
        say_error(f"{', '.join(map(str, others))} belongs to no suite; remove it.")
        return STATUS_STALE
    stale = [
        path
        for path, text in texts.items()
        if path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode()
    ]
    if not stale:
        return 0
    verb, them = ("is", "it") if len(stale) == 1 else ("are", "them")
    say_error(f"{', '.join(map(str, stale))} {verb} stale: write {them} again with {command}.")
    return STATUS_STALE

"""What the commands share: exit statuses, kinds of arguments, how errors are said."""

import argparse
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.records.schema import Record

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

STATUS_STALE = 1
STATUS_INPUT = 2
STATUS_LOST = 3
STATUS_INTERRUPT = 130
STATUS_PIPE = 141
"""As of a program that SIGPIPE ends."""

KEPT = "What was finished is kept; the same command resumes from there."
AGAIN = "The same command begins again."
"""What commands that take long say when they are stopped."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number from 0 to 1024."""
    if not text.isdigit() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 1024")
    return int(text)


def seed(text: str) -> int:
    """A whole number below 2^32."""
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def say_error(message: str) -> None:
    """Print what went wrong."""
    print(printable(f"mmtard-bench: {message}"), file=sys.stderr)


def say_input_error(error: InputError, arguments: argparse.Namespace) -> None:
    """Print an error; with ``--debug``, the traceback of what caused it as well."""
    if arguments.debug:
        print(printable("".join(traceback.format_exception(error)).rstrip()), file=sys.stderr)
    say_error(str(error))


def output(text: str) -> Path:
    """A place to write to: outside of entries and of directories of entries."""
    from mmtard_bench.leaderboard.entries.folder import require_outside

    try:
        return require_outside(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def records_at(path: Path) -> "list[Record]":
    """The records of a file, an entry or a directory. Raises InputError if there are none."""
    from mmtard_bench.leaderboard.entries.folder import records

    return records(path)


def file_of(record: "Record", path: Path) -> Path:
    """The file below a path that holds a record; the path itself where it is packed with others."""
    marks = [record.identity.encode(), record.created.encode()]
    files = sorted(path.rglob("*.json")) if path.is_dir() else []
    return next((file for file in files if all(m in file.read_bytes() for m in marks)), path)

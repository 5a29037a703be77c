"""The command line: thin; each command calls what does the work, and errors become sentences."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from mmtard_bench import __version__
from mmtard_bench.cli import board, compare, evaluate, listing, show, training, verify
from mmtard_bench.cli.common import STATUS_INPUT, STATUS_INTERRUPT, say_error
from mmtard_bench.errors import InputError
from mmtard_bench.markdown import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    It is 2 for bad input, 3 where another process of the run ended, 130 when it was interrupted.
    """
    parsed = _parser().parse_args(arguments)
    with warnings.catch_warnings():  # an application that calls this has its own way afterwards
        warnings.showwarning = _warn
        return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except InputError as error:
        say_error(str(error))
        return STATUS_INPUT
    except KeyboardInterrupt:
        again = getattr(parsed, "again", "the same command")
        say_error(f"Stopped. What was finished is kept; {again} goes on from there.")
        return STATUS_INTERRUPT
    except BrokenPipeError:
        # The reader of a pipe left (head, less): not our error, and nothing more to say.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmtard-bench", description="How robust is a CLIP-like model, really?"
    )
    parser.add_argument("--version", action="version", version=f"mmtard-bench {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (evaluate, training, listing, show, compare, board, verify):
        module.add(commands)
    return parser


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)

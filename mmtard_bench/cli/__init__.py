"""The command line: thin; each command calls what does the work, and errors become sentences."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from mmtard_bench import __version__
from mmtard_bench.cli import (
    board,
    bound,
    compare,
    evaluate,
    heatmaps,
    listing,
    show,
    training,
    verify,
)
from mmtard_bench.cli.common import (
    STATUS_INPUT,
    STATUS_INTERRUPT,
    STATUS_PIPE,
    Commands,
    say_error,
    say_input_error,
)
from mmtard_bench.cli.output import OutputLost, guarded_errors, guarded_output
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    It is 2 for bad input and for output that cannot be written, 3 where another process of the run
    ended, 130 when it was interrupted, 141 when the reader of a pipe left.
    """
    with guarded_errors():
        parsed = argparse.Namespace()
        try:
            # An application that calls this has its own way with warnings afterwards.
            with guarded_output(), warnings.catch_warnings():
                _parser().parse_args(arguments, parsed)
                warnings.showwarning = _warn
                return _run(parsed)
        except OutputLost as lost:
            return _output_lost(lost, kept=getattr(parsed, "kept", ""))


def _run(parsed: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except InputError as error:
        say_input_error(error, parsed)
        return STATUS_INPUT
    except KeyboardInterrupt:
        say_error(f"Stopped. {getattr(parsed, 'kept', '')}".strip())
        return STATUS_INTERRUPT


def _output_lost(lost: OutputLost, *, kept: str) -> int:
    if not isinstance(lost.error, BrokenPipeError):
        say_error(f"The output could not be written: {lost.error.strerror}. {kept}".strip())
        return STATUS_INPUT
    # Of a command that only prints (list, show) that is no news, as of other Unix commands.
    if kept:
        say_error(f"The reader of the output left, so the command stopped. {kept}")
    return STATUS_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmtard-bench",
        description="Measure how robust CLIP-like vision-language models are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmtard-bench {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error, such as your model's"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (evaluate, training, bound, heatmaps, listing, show, compare, board, verify):
        module.add(commands)
    parser.epilog = _by_group(commands)
    return parser


_GROUPS = {
    "Score models": ("run", "eval", "fetch", "list", "manifest", "doctor"),
    "Train students": ("train", "reproduce", "bound", "heatmaps"),
    "Inspect records": ("show", "compare", "plot"),
    "Leaderboard": ("submit", "verify", "break", "leaderboard"),
}


def _by_group(commands: Commands) -> str:
    """The commands in groups, for the help; argparse itself lists them in one row."""
    helps = {action.dest: action.help for action in commands._choices_actions}
    commands._choices_actions.clear()
    rows = []
    for title, names in _GROUPS.items():
        rows += ["", f"{title}:", *(f"  {name:<12} {helps.pop(name)}" for name in names)]
    assert not helps, f"commands without a group: {sorted(helps)}"
    return "\n".join([*rows, "", "mmtard-bench COMMAND --help describes one command."]).lstrip()


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)

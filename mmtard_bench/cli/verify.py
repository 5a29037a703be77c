"""Commands that check what others say: verify, break."""

import argparse
import contextlib
import secrets
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.cli.board import ENTRIES, check_tables
from mmtard_bench.cli.common import AGAIN, STATUS_INPUT, Commands, positive, say_error, seed
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.evaluation.device import Resources
    from mmtard_bench.leaderboard.entries.verifications import Level

DRAWS = 64
_VERIFY = (
    "Verify entries of the leaderboard. A refused entry gives a message and exit status 2. Levels: "
    "well-formed checks the records; replayed also runs the model on clean images; re-attacked "
    "also attacks random robust samples with another seed; reproduced also runs the suite again."
)


def add(commands: Commands) -> None:
    """Add verify and break."""
    command = commands.add_parser(
        "verify", help="verify leaderboard entries, in four levels", description=_VERIFY
    )
    command.add_argument(
        "entries",
        nargs="*",
        type=Path,
        help="directories of entries, such as leaderboard/entries/my-clip",
    )
    command.add_argument(
        "--since",
        metavar="BASE",
        help="instead of directories: verify the entries that commits since the git revision BASE "
        "add or change",
    )
    command.add_argument(
        "--branch",
        metavar="REVISION",
        help="with --since: verify the leaderboard of this git revision, and that its tables "
        "follow from its records; nothing is checked out (default: the working directory)",
    )
    command.add_argument("--suite", metavar="NAME", help="verify only the records of this suite")
    command.add_argument(
        "--level",
        choices=("well-formed", "replayed", "re-attacked", "reproduced"),
        help="the highest level to check; it includes those before it (default: re-attacked with "
        "--reattack, otherwise replayed)",
    )
    command.add_argument(
        "--reattack",
        type=positive,
        metavar="K",
        help=f"re-attack K robust samples of each task and ball (default for re-attacked: {DRAWS})",
    )
    command.add_argument(
        "--surrogate",
        metavar="SPEC",
        help="another model, best an undefended relative, whose adversarial images the re-attack "
        "tries (default: a shipped one for the shipped data, otherwise none)",
    )
    command.add_argument(
        "--seed", type=seed, help="seed of the draw and of the re-attack (default: random)"
    )
    command.add_argument(
        "--adversarials",
        type=Path,
        metavar="FILE",
        help="check that the adversarial images in FILE break the samples that the records call "
        "broken",
    )
    _add_common(command)
    command.add_argument(
        "--record",
        action="store_true",
        help="write the level into leaderboard/verification.json; needs --by",
    )
    command.add_argument("--by", metavar="NAME", help="name of the verifier, for --record")
    command.set_defaults(run=_verify, kept=AGAIN)

    command = commands.add_parser(
        "break", help="replay adversarial images; record robust samples of an entry that they break"
    )
    command.add_argument("entry", type=Path, help="an entry's directory")
    command.add_argument(
        "--adversarials",
        type=Path,
        metavar="FILE",
        required=True,
        help="a safetensors file of adversarial images",
    )
    command.add_argument("--by", metavar="NAME", required=True, help="name that gets the credit")
    command.add_argument("--paper", help="the https:// address of a paper")
    command.add_argument("--images", help="the https:// address where others find the file")
    _add_common(command)
    command.set_defaults(run=_break, kept=AGAIN)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights", metavar="SPEC", help="load the model from SPEC instead of the card's weights"
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--batch-size", type=positive, help="images per pass (default: what fits in memory)"
    )


def _resources(arguments: argparse.Namespace) -> "Callable[[], Resources]":
    """The device is looked for once it is needed: well-formed needs none."""

    @cache
    def found() -> "Resources":
        from mmtard_bench.evaluation.device import Resources, find_device

        return Resources(find_device(arguments.device), arguments.batch_size)

    return found


def _tell(line: str) -> None:
    print(printable(line), flush=True)


def _entries(arguments: argparse.Namespace, board: Path) -> list[Path]:
    """The entries to verify. The leaderboard of a branch is written below ``board``."""
    if (arguments.since is None) != bool(arguments.entries):
        raise InputError(
            "Name directories of entries, or --since BASE for those that a branch adds or changes."
        )
    if arguments.since is None:
        named: list[Path] = arguments.entries
        return named

    from mmtard_bench.leaderboard.verify.branch import changed_entries, export_board

    changed = changed_entries(arguments.since, branch=arguments.branch or "HEAD")
    if arguments.branch is not None:
        export_board(arguments.branch, board)
    if not changed:
        _tell(f"no entry was added or changed since {arguments.since}")
    for name, what in changed.items():
        _tell(f"since {arguments.since} the entry '{name}' was {what}")
    return [board / ENTRIES / name for name in changed]


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.branch is None:
        return _verify_in(arguments, Path())
    if arguments.since is None or arguments.record:
        raise InputError("--branch goes with --since, and without --record.")

    with tempfile.TemporaryDirectory() as folder:
        status = _verify_in(arguments, Path(folder))
        with contextlib.chdir(folder):
            return status or check_tables()


def _verify_in(arguments: argparse.Namespace, board: Path) -> int:
    from mmtard_bench.leaderboard.entries.folder import read_entry
    from mmtard_bench.leaderboard.entries.text import require_plain

    if arguments.record != (arguments.by is not None):
        raise InputError("--record and --by NAME go together: who verified is written down.")
    if arguments.record:
        require_plain(arguments.by, "--by")
    folders = _entries(arguments, board)

    from mmtard_bench.leaderboard.entries.verifications import LEVELS
    from mmtard_bench.leaderboard.verify.images import read_adversarials
    from mmtard_bench.leaderboard.verify.levels import Options, record, verify

    level: Level = arguments.level or ("re-attacked" if arguments.reattack else "replayed")
    if arguments.reattack and LEVELS.index(level) < LEVELS.index("re-attacked"):
        raise InputError(f"--reattack goes beyond --level {level}; leave one of them out.")
    file = arguments.adversarials
    options = Options(
        level=level,
        draws=arguments.reattack or DRAWS,
        seed=secrets.randbelow(2**32) if arguments.seed is None else arguments.seed,
        adversarials=None if file is None else read_adversarials(file),
        weights=arguments.weights,
        surrogate=arguments.surrogate,
    )
    status = 0
    for folder in folders:
        # What is wrong with one entry must not cost the others their turn.
        try:
            entry = read_entry(folder)
            if arguments.suite is not None:
                entry = entry.only(arguments.suite)
            _tell(f"{entry.card.name} ({folder})")
            found = verify(entry, options, _resources(arguments), lambda line: _tell(f"  {line}"))
            _tell(f"{entry.card.name}: {level}")
            if arguments.record:
                _tell(f"written to {record(entry, found, level, arguments.by)}")
        except InputError as error:
            say_error(f"{folder} is refused: {error}")
            status = STATUS_INPUT
    return status


def _break(arguments: argparse.Namespace) -> int:
    from mmtard_bench.leaderboard.entries.folder import read_entry
    from mmtard_bench.leaderboard.entries.text import require_plain, require_url

    require_plain(arguments.by, "--by")
    for option in ("paper", "images"):
        if getattr(arguments, option) is not None:
            require_url(getattr(arguments, option), f"--{option}")

    from mmtard_bench.leaderboard.verify.breaks import break_entry
    from mmtard_bench.leaderboard.verify.images import read_adversarials

    written = break_entry(
        read_entry(arguments.entry),
        read_adversarials(arguments.adversarials),
        _resources(arguments),
        by=arguments.by,
        paper=arguments.paper,
        images=arguments.images,
        weights=arguments.weights,
        tell=_tell,
    )
    for path in written:
        _tell(f"{path}: keep {arguments.adversarials} where others can get it (--images URL)")
    return 0

"""The command line: thin; each command calls what does the work, and errors become sentences."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench import __version__
from mmtard_bench.errors import InputError
from mmtard_bench.markdown import printable

if TYPE_CHECKING:
    from mmtard_bench.processes import Processes
    from mmtard_bench.records import Record

KINDS = ("models", "datasets", "tasks", "threats", "protocols", "suites", "recipes")
STATUS_STALE = 1
STATUS_INPUT = 2
STATUS_LOST = 3
STATUS_INTERRUPT = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    It is 2 for bad input, 3 where another process of the run ended, 130 when it was interrupted.
    """
    parsed = _parser().parse_args(arguments)
    warnings.showwarning = _warn
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except InputError as error:
        _error(str(error))
        return STATUS_INPUT
    except KeyboardInterrupt:
        again = "the same command with --resume" if run is _train else "the same command"
        _error(f"Stopped. What was finished is kept; {again} goes on from there.")
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

    command = commands.add_parser("run", help="evaluate models on a suite")
    command.add_argument("suite", help="a suite's name, or the path of a .toml file")
    command.add_argument("--model", action="append", required=True, help="may be repeated")
    command.add_argument("--visual", metavar="FILE", help="with the image tower of a checkpoint")
    command.add_argument("--out", type=Path, default=Path("runs"), help="default: runs")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--batch-size", type=_positive, help="found if not given; never changes verdicts"
    )
    command.add_argument(
        "--engine",
        choices=("fast", "reference"),
        default="fast",
        help="our own attacks (default), or the reference libraries' code",
    )
    command.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the fast attacks' passes; float32 confirms what bfloat16 finds",
    )
    command.add_argument("--limit", type=_positive, help="this many samples a task instead")
    command.add_argument("--seed", type=_seed, help="another seed than the suite's")
    command.add_argument(
        "--workers", type=_count, help="threads that decode images; never changes verdicts"
    )
    command.set_defaults(run=_run)

    _add_data(commands)
    _add_training(commands)

    command = commands.add_parser("list", help="list what is registered")
    command.add_argument("kind", choices=KINDS)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="show the records of a run")
    command.add_argument("path", type=Path, help="a run directory, or one record")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_show)

    command = commands.add_parser("plot", help="draw accuracy against eps and against passes")
    command.add_argument("path", type=Path, help="a run directory, or one record")
    command.add_argument("--out", type=Path, help="default: figures/ beside the records")
    command.set_defaults(run=_plot)

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

    command = commands.add_parser("doctor", help="check the installation")
    command.set_defaults(run=_doctor)
    return parser


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "fetch", help="download what a suite needs; then HF_HUB_OFFLINE=1 run works"
    )
    command.add_argument("suite", help="a suite's name, or the path of a .toml file")
    command.add_argument("--model", action="append", default=[], help="may be repeated")
    command.add_argument("--limit", type=_positive, help="for runs with this --limit")
    command.add_argument("--seed", type=_seed, help="for runs with this --seed")
    command.set_defaults(run=_fetch)

    command = commands.add_parser("manifest", help="print the samples that a task is scored on")
    command.add_argument("task", help="a task's name, or a data spec")
    command.add_argument("--n", type=_positive, help="how many (default: all)")
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_manifest)


def _add_training(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("train", help="train a student from a recipe")
    command.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint's directory")
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe"
    )
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument("--device", choices=("auto", "cpu"), default="auto")
    command.add_argument(
        "--tracker", action="append", default=[], help="tensorboard, wandb; may be repeated"
    )
    command.add_argument("--adapter", action="store_true", help="save LoRA adapters on their own")
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "reproduce", help="train every method with several seeds and compare them"
    )
    command.add_argument("study", help="digits")
    command.add_argument("--seeds", type=_positive, default=5)
    command.add_argument("--out", type=Path, help="default: runs/reproduce-STUDY")
    command.add_argument("--method", action="append", help="only this one; may be repeated")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe"
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    command.set_defaults(run=_reproduce)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 1024")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)


def _error(message: str) -> None:
    print(printable(f"mmtard-bench: {message}"), file=sys.stderr)


def _run(arguments: argparse.Namespace) -> int:
    from mmtard_bench.processes import ALONE, ProcessLost, joined

    processes = ALONE
    try:
        with joined() as processes:
            if not processes.first:
                warnings.showwarning = _say_nothing
            try:
                return _run_suite(arguments, processes)
            except InputError as error:  # the same on all processes
                _error_of(processes)(str(error))
                return STATUS_INPUT
    except ProcessLost as error:
        if str(error):
            _error(str(error))
        return STATUS_LOST
    except KeyboardInterrupt:
        if processes.first:
            raise
        return STATUS_INTERRUPT


def _error_of(processes: "Processes") -> Callable[[str], None]:
    """How to say what all processes know: the first speaks for them."""
    return _error if processes.first else _say_nothing


def _say_nothing(*_: object, **__: object) -> None:
    pass


def _run_suite(arguments: argparse.Namespace, processes: "Processes") -> int:
    from mmtard_bench.suites import load_suite

    # Before the slow imports: a slip in the suite's name should not take seconds to hear of.
    suite = processes.agree(lambda: load_suite(arguments.suite))
    specs: list[str] = arguments.model
    if arguments.visual is not None:
        if len(specs) > 1:
            raise InputError(
                f"--visual {arguments.visual} goes with one --model, but there are {len(specs)}; "
                "write MODEL+visual:FILE for the one that it belongs to."
            )
        specs = [f"{specs[0]}+visual:{arguments.visual}"]

    from rich.console import Console

    from mmtard_bench.attacks.base import Engine
    from mmtard_bench.evaluation import find_device
    from mmtard_bench.hub import told
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.processes import local_rank
    from mmtard_bench.progress import RunProgress
    from mmtard_bench.resources import Resources
    from mmtard_bench.runner import run_folder, run_model, with_overrides
    from mmtard_bench.summary import table_of

    suite = with_overrides(suite, n=arguments.limit, seed=arguments.seed)
    place = local_rank() if processes.world > 1 else None
    resources = Resources(
        processes.agree(lambda: find_device(arguments.device, place)),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        processes=processes,
    )
    engine = Engine(arguments.engine, arguments.precision)
    status = 0
    say_error = _error_of(processes)
    progress = RunProgress(Console(highlight=False), quiet=not processes.first)
    with progress, told(progress.say):
        for spec in specs:
            # What is wrong with one model or task must not cost the others their turn.
            records: list[Record] = []
            try:
                clip = processes.agree(partial(load_model, spec))
                for record in run_model(
                    clip, suite, resources, out=arguments.out, progress=progress, engine=engine
                ):
                    records.append(record)
            except InputError as error:
                say_error(str(error))
                status = STATUS_INPUT
            if not records:
                continue
            folder = run_folder(arguments.out, suite, clip)
            text = f"\n{clip.name} on {suite.name}: {folder}\n\n{table_of(records)}\n"
            progress.say(text)
            for record in records:
                if record.error is not None:
                    say_error(record.error)
                    status = STATUS_INPUT
    return status


def _fetch(arguments: argparse.Namespace) -> int:
    from mmtard_bench.suites import load_suite

    suite = load_suite(arguments.suite)

    from mmtard_bench.fetch import fetch
    from mmtard_bench.runner import with_overrides

    suite = with_overrides(suite, n=arguments.limit, seed=arguments.seed)
    problems = fetch(suite, arguments.model, lambda line: print(printable(line), flush=True))
    for problem in problems:
        _error(problem)
    return STATUS_INPUT if problems else 0


def _manifest(arguments: argparse.Namespace) -> int:
    from mmtard_bench.tasks.resolve import find_task, load_manifest

    manifest = load_manifest(find_task(arguments.task), n=arguments.n, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(list(manifest.ids), indent=1))
    else:
        print(printable("\n".join(manifest.ids)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from mmtard_bench.train.recipe import load_recipe

    named = load_recipe(arguments.recipe, arguments.set)

    from rich.console import Console

    from mmtard_bench.train.session import Place, train

    place = Place(
        folder=arguments.out,
        seed=arguments.seed,
        resume=arguments.resume,
        cpu=arguments.device == "cpu",
        trackers=arguments.tracker,
        adapter=arguments.adapter,
    )
    card = train(named, place, Console(highlight=False))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shares = ", ".join(f"{name} {value:.1%}" for name, value in card.metrics.items())
        print(
            f"{named.name}: {named.recipe.steps} steps in {card.seconds:.0f} s, {shares}\n"
            f"{arguments.out}: mmtard-bench run SUITE --model local-dir:{arguments.out}"
        )
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from mmtard_bench.train.reproduce import reproduce

    report = reproduce(
        arguments.study,
        out=arguments.out or Path("runs") / f"reproduce-{arguments.study}",
        seeds=arguments.seeds,
        methods=arguments.method,
        overrides=arguments.set,
        device=arguments.device,
        console=Console(highlight=False),
    )
    print(f"written to {report}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.kind == "tasks" and arguments.json:
        print(json.dumps(_declarations(), indent=1))
        return 0
    rows = _listing(arguments.kind)
    if arguments.json:
        print(json.dumps([{"name": name, "description": text} for name, text in rows], indent=1))
        return 0
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _listing(kind: str) -> list[tuple[str, str]]:
    from mmtard_bench import registry

    if kind == "suites":
        from mmtard_bench.suites import list_suites, load_suite

        suites = [load_suite(name) for name in list_suites()]
        return [(s.name, f"{s.description} ({len(s.threats)} threat models)") for s in suites]
    if kind == "recipes":
        from mmtard_bench.train.recipe import list_recipes, load_recipe

        return [(name, load_recipe(name).recipe.description) for name in list_recipes()]
    if kind == "protocols":
        found = [registry.protocols.get(name) for name in registry.protocols]
        return [(p.name, f"{p.description}; {p.samples}. {p.source}") for p in found]
    if kind == "tasks":
        return [(name, registry.tasks.get(name).description) for name in registry.tasks]
    if kind == "models":
        return [(name, _first_line(registry.models.get(name))) for name in registry.models]
    if kind == "datasets":
        return [(name, _first_line(registry.datasets.get(name))) for name in registry.datasets]
    return [(name, _first_line(registry.attacks.get(name))) for name in registry.attacks]


def _declarations() -> list[dict[str, object]]:
    """The tasks with all that is known of them; long lists of names by their length."""
    from mmtard_bench import registry

    tables = [asdict(registry.tasks.get(name)) for name in registry.tasks]
    for table in tables:
        table["classes"], table["templates"] = len(table["classes"]), len(table["templates"])
    return tables


def _first_line(item: object) -> str:
    return (getattr(item, "__doc__", None) or "").strip().split("\n")[0]


def _records(path: Path) -> "list[Record]":
    from mmtard_bench.leaderboard import load_records
    from mmtard_bench.records import read_record

    records = [read_record(path)] if path.is_file() else load_records(path)
    if not records:
        raise InputError(f"There are no records below {path}.")
    return records


def _plot(arguments: argparse.Namespace) -> int:
    from mmtard_bench.figures import draw

    path: Path = arguments.path
    records = _records(path)
    folder = arguments.out or (path if path.is_dir() else path.parent) / "figures"
    print("\n".join(map(str, draw(records, folder))))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from mmtard_bench.records import to_text
    from mmtard_bench.summary import table_of

    records = _records(arguments.path)
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
        _error(f"{output} is stale: write it again with mmtard-bench leaderboard.")
        return STATUS_STALE
    write_atomically(output, text)
    print(text)
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        print(f"no program was found that shows it; open {output} yourself", file=sys.stderr)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from mmtard_bench.doctor import examine

    problems = 0
    for finding in examine():
        print(f"{finding.name:<22} {finding.value}")
        if finding.problem:
            problems += 1
            print(f"{'':<22} -> {finding.problem}")
    print("everything fits together" if not problems else f"{problems} problem(s)")
    return 1 if problems else 0

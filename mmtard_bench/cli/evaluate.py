"""Commands that evaluate: run, and what prepares a run."""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mmtard_bench.cli.common import (
    KEPT,
    STATUS_INPUT,
    STATUS_INTERRUPT,
    STATUS_LOST,
    Commands,
    count,
    output,
    positive,
    say_error,
    seed,
)
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.evaluation.processes import Processes
    from mmtard_bench.records.schema import Record


def add(commands: Commands) -> None:
    """Add run, fetch and manifest."""
    command = commands.add_parser("run", help="evaluate models on a suite")
    command.add_argument("suite", help="a suite's name, or the path of a .toml file")
    command.add_argument("--model", action="append", required=True, help="may be repeated")
    command.add_argument("--visual", metavar="FILE", help="with the image tower of a checkpoint")
    command.add_argument("--out", type=output, default="runs", help="default: runs")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--batch-size",
        type=positive,
        help="default: what fits in memory, at most 64 (cpu) or 512 (cuda); changes no verdict",
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
    command.add_argument("--limit", type=positive, help="this many samples a task instead")
    command.add_argument("--seed", type=seed, help="another seed than the suite's")
    command.add_argument(
        "--workers", type=count, help="threads that decode images; never changes verdicts"
    )
    command.set_defaults(run=_run, kept=KEPT)

    command = commands.add_parser(
        "fetch", help="download what a suite needs; then HF_HUB_OFFLINE=1 run works"
    )
    command.add_argument("suite", help="a suite's name, or the path of a .toml file")
    command.add_argument("--model", action="append", default=[], help="may be repeated")
    command.add_argument("--limit", type=positive, help="for runs with this --limit")
    command.add_argument("--seed", type=seed, help="for runs with this --seed")
    command.set_defaults(run=_fetch, kept=KEPT)

    command = commands.add_parser("manifest", help="print the samples that a task is scored on")
    command.add_argument("task", help="a task's name, or a data spec")
    command.add_argument("--n", type=positive, help="how many (default: all)")
    command.add_argument("--seed", type=seed, default=0)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_manifest)


def _run(arguments: argparse.Namespace) -> int:
    from mmtard_bench.evaluation.processes import ALONE, ProcessLost, joined

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
            say_error(str(error))
        return STATUS_LOST
    except KeyboardInterrupt:
        if processes.first:
            raise
        return STATUS_INTERRUPT


def _error_of(processes: "Processes") -> Callable[[str], None]:
    """How to say what all processes know: the first speaks for them."""
    return say_error if processes.first else _say_nothing


def _say_nothing(*_: object, **__: object) -> None:
    pass


def _run_suite(arguments: argparse.Namespace, processes: "Processes") -> int:
    from mmtard_bench.tasks.suites import load_suite, with_overrides

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
    from mmtard_bench.evaluation.device import Resources, find_device
    from mmtard_bench.evaluation.processes import local_rank
    from mmtard_bench.evaluation.progress import RunProgress
    from mmtard_bench.evaluation.run import run_folder, run_model
    from mmtard_bench.hub import told
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.records.tables import table_of

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
    tell = _error_of(processes)
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
                tell(str(error))
                status = STATUS_INPUT
            if not records:
                continue
            folder = run_folder(arguments.out, suite, clip)
            text = f"\n{clip.name} on {suite.name}: {folder}\n\n{table_of(records)}\n"
            progress.say(text)
            for record in records:
                if record.error is not None:
                    tell(record.error)
                    status = STATUS_INPUT
    return status


def _fetch(arguments: argparse.Namespace) -> int:
    from mmtard_bench.tasks.suites import load_suite, with_overrides

    suite = load_suite(arguments.suite)

    from mmtard_bench.evaluation.fetch import fetch

    suite = with_overrides(suite, n=arguments.limit, seed=arguments.seed)
    problems = fetch(suite, arguments.model, lambda line: print(printable(line), flush=True))
    for problem in problems:
        say_error(problem)
    return STATUS_INPUT if problems else 0


def _manifest(arguments: argparse.Namespace) -> int:
    from mmtard_bench.tasks.samples import find_task, load_manifest

    manifest = load_manifest(find_task(arguments.task), n=arguments.n, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(list(manifest.ids), indent=1))
    else:
        print(printable("\n".join(manifest.ids)))
    return 0

"""Commands that evaluate: run, and what prepares a run."""

import argparse
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
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
    say_input_error,
    seed,
)
from mmtard_bench.errors import InputError
from mmtard_bench.text import printable

if TYPE_CHECKING:
    from mmtard_bench.evaluation.processes import Processes
    from mmtard_bench.records.schema import Record


def add(commands: Commands) -> None:
    """Add run, eval, fetch and manifest."""
    command = commands.add_parser(
        "run", help="score models on a suite, resumable", description=_RUN
    )
    command.add_argument("suite", help="the name of a suite, or the path of a .toml file")
    _add_models(command)
    command.add_argument(
        "--out", type=output, default="runs", help="directory for records (default: runs)"
    )
    _add_engine(command)
    _add_samples(command, n="the suite's", seed_is="the suite's")
    command.set_defaults(run=_run, kept=KEPT)

    command = commands.add_parser(
        "eval", help="score models on one task, without a suite", description=_EVAL
    )
    _add_models(command)
    command.add_argument("--task", required=True, help="the name of a task, or a data spec")
    command.add_argument(
        "--threat",
        action="append",
        required=True,
        metavar="ATTACK",
        help="an attack, such as apgd-pair (see: list threats); may be repeated",
    )
    command.add_argument(
        "--eps",
        action="append",
        required=True,
        help="the radius as a fraction, such as 4/255, for pixels in [0, 1]; may be repeated",
    )
    command.add_argument(
        "--norm",
        choices=("linf", "l2", "levenshtein"),
        help="default: l2 for cw-l2, levenshtein for attacks on text, otherwise linf",
    )
    command.add_argument(
        "--surface",
        choices=("native", "model"),
        default="native",
        help="attack the pixels of the data set (native, the default) or of the model's input size",
    )
    command.add_argument("--out", type=output, help="directory for records (default: not written)")
    _add_engine(command)
    _add_samples(command, n="all", seed_is="0")
    command.add_argument("--json", action="store_true", help="print one JSON object per record")
    command.set_defaults(run=_eval)

    command = commands.add_parser(
        "fetch", help="download what a suite needs, so that run works offline (HF_HUB_OFFLINE=1)"
    )
    command.add_argument("suite", help="the name of a suite, or the path of a .toml file")
    command.add_argument(
        "--model", action="append", default=[], help="a model to download; may be repeated"
    )
    _add_samples(command, n="the suite's", seed_is="the suite's")
    command.set_defaults(run=_fetch, kept=KEPT)

    command = commands.add_parser("manifest", help="print the samples that a task is scored on")
    command.add_argument("task", help="the name of a task, or a data spec")
    command.add_argument("--n", type=positive, help="number of samples (default: all)")
    command.add_argument("--seed", type=seed, default=0, help="seed of the draw (default: 0)")
    command.add_argument("--json", action="store_true", help="print a JSON list")
    command.set_defaults(run=_manifest)


_RUN = (
    "Score models on every task and threat model of a suite. The command writes one record per "
    "model, task and threat model, and prints a table. The same command resumes a stopped run."
)
_EVAL = (
    "Score models on one task. Each --threat is combined with each --eps: one row of the table per "
    "combination, and a worst case for each norm and eps with several attacks."
)


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="SPEC",
        help="a registered model, ARCHITECTURE:WEIGHTS, hf-hub:ORG/NAME, local-dir:PATH or "
        "module:function; may be repeated",
    )
    command.add_argument(
        "--models-from",
        type=Path,
        metavar="FILE",
        help="a text file with one model per line; # begins a comment",
    )
    command.add_argument(
        "--visual",
        metavar="FILE",
        help="checkpoint whose image tower replaces the model's; allowed with one --model only",
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1"
    )
    command.add_argument(
        "--batch-size",
        type=positive,
        help="images per pass (default: what fits in memory, at most 64 on the CPU, 512 on a "
        "GPU); changes no verdict",
    )
    command.add_argument(
        "--engine",
        choices=("fast", "reference"),
        default="fast",
        help="implementation of the attacks: this project's (fast, the default) or that of the "
        "reference libraries",
    )
    command.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the fast engine (default: float32); float32 confirms every break",
    )
    command.add_argument(
        "--workers",
        type=count,
        help="threads that decode images (default: chosen automatically); changes no verdict",
    )
    command.add_argument(
        "--no-black-box",
        dest="black_box",
        action="store_false",
        help="skip the check for misleading gradients: Square on some of the robust samples, about "
        "5%% more passes; the leaderboard shows that it is missing",
    )


def _add_samples(command: argparse.ArgumentParser, *, n: str, seed_is: str) -> None:
    command.add_argument("--n", type=positive, help=f"samples per task (default: {n})")
    command.add_argument("--limit", dest="n", type=positive, help=argparse.SUPPRESS)
    command.add_argument(
        "--seed", type=seed, help=f"seed of samples and attacks (default: {seed_is})"
    )


def _specs(arguments: argparse.Namespace) -> list[str]:
    """The models that the arguments name. Raises InputError if there are none."""
    specs: list[str] = list(arguments.model)
    if arguments.models_from is not None:
        try:
            text = arguments.models_from.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The list of models {arguments.models_from} cannot be read: {error}."
            ) from error
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        specs += [line for line in lines if line]
    if not specs:
        raise InputError("No model is given; add --model SPEC, or --models-from FILE.")
    if arguments.visual is not None:
        if len(specs) > 1:
            raise InputError(
                f"--visual {arguments.visual} goes with one --model, but there are {len(specs)}; "
                "write MODEL+visual:FILE for the one that it belongs to."
            )
        specs = [f"{specs[0]}+visual:{arguments.visual}"]
    _require_one(specs)
    return specs


def _require_one(specs: Sequence[str]) -> None:
    """Raise InputError if no spec can be a model's, before torch is imported."""
    from mmtard_bench.models.specs import require_form

    wrong = []
    for spec in specs:
        try:
            require_form(spec)
        except InputError as error:
            wrong.append(str(error))
    if len(wrong) == len(specs):
        raise InputError("\n".join(wrong))


def _eval(arguments: argparse.Namespace) -> int:
    specs = _specs(arguments)

    from rich.console import Console

    from mmtard_bench.attacks.base import Engine
    from mmtard_bench.evaluation.device import Resources, find_device
    from mmtard_bench.evaluation.evaluate import execute, threat_model
    from mmtard_bench.evaluation.job import prepare
    from mmtard_bench.evaluation.progress import RunProgress
    from mmtard_bench.evaluation.run import file_name
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.records.tables import table_of
    from mmtard_bench.tasks.samples import find_task, load_task

    threats = [
        threat_model(attack, eps, arguments.norm, arguments.surface)
        for attack in arguments.threat
        for eps in arguments.eps
    ]
    seed = arguments.seed or 0
    data = load_task(find_task(arguments.task), n=arguments.n, seed=seed)
    resources = Resources(
        find_device(arguments.device),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        black_box=arguments.black_box,
    )
    engine = Engine(arguments.engine, arguments.precision)
    status = 0
    with RunProgress(Console(stderr=arguments.json, highlight=False)) as progress:
        for spec in specs:
            # A model that cannot be scored does not stop the others.
            records: list[Record] = []
            try:
                clip = load_model(spec)
                for threat in threats:
                    job = prepare(clip, data, threat, seed=seed, engine=engine)
                    name = f"{clip.name} {data.task.name} {threat.name}"
                    progress.start(name, threat.name, total=len(data.labels), settled=0)
                    records.append(execute(job, resources, report=progress.update))
                    progress.stop()
                    if arguments.out is not None:
                        file = file_name(f"{clip.name}--{data.task.name}", threat, job.identity)
                        records[-1].save(arguments.out / file)
            except InputError as error:
                say_input_error(error, arguments)
                status = STATUS_INPUT
            if arguments.json:
                for record in records:
                    print(json.dumps(json.loads(record.to_text())), flush=True)
            elif records:
                progress.say(f"{clip.name} on {data.task.name}\n\n{table_of(records)}\n")
            for record in records:
                if record.error is not None:
                    say_error(record.error)
                    status = STATUS_INPUT
    return status


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
                if processes.first:
                    say_input_error(error, arguments)
                return STATUS_INPUT
    except ProcessLost as error:
        if str(error):
            say_error(str(error))
        return STATUS_LOST
    except KeyboardInterrupt:
        if processes.first:
            raise
        return STATUS_INTERRUPT


def _say_nothing(*_: object, **__: object) -> None:
    pass


def _run_suite(arguments: argparse.Namespace, processes: "Processes") -> int:
    from mmtard_bench.tasks.suites import load_suite, with_overrides

    # Before the slow imports: a slip in a name should not take seconds to hear of.
    specs = processes.agree(lambda: _specs(arguments))
    suite = processes.agree(lambda: load_suite(arguments.suite))

    from rich.console import Console

    from mmtard_bench.attacks.base import Engine
    from mmtard_bench.evaluation.device import Resources, find_device
    from mmtard_bench.evaluation.processes import local_rank
    from mmtard_bench.evaluation.progress import RunProgress
    from mmtard_bench.evaluation.run import run_folder, run_model
    from mmtard_bench.hub import told
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.records.tables import table_of

    suite = with_overrides(suite, n=arguments.n, seed=arguments.seed)
    place = local_rank() if processes.world > 1 else None
    resources = Resources(
        processes.agree(lambda: find_device(arguments.device, place)),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        processes=processes,
        black_box=arguments.black_box,
    )
    engine = Engine(arguments.engine, arguments.precision)
    status = 0
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
                if processes.first:
                    say_input_error(error, arguments)
                status = STATUS_INPUT
            if not records:
                continue
            folder = run_folder(arguments.out, suite, clip)
            text = f"\n{clip.name} on {suite.name}: {folder}\n\n{table_of(records)}\n"
            progress.say(text)
            for record in records:
                if record.error is not None:
                    if processes.first:
                        say_error(record.error)
                    status = STATUS_INPUT
    return status


def _fetch(arguments: argparse.Namespace) -> int:
    from mmtard_bench.tasks.suites import load_suite, with_overrides

    suite = load_suite(arguments.suite)

    from mmtard_bench.evaluation.fetch import fetch

    suite = with_overrides(suite, n=arguments.n, seed=arguments.seed)
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

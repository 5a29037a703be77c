"""Commands that train."""

import argparse
import os
import shlex
from pathlib import Path

from mmtard_bench.cli.common import KEPT, Commands, output, positive, seed

_TRAIN = """Train a student from a recipe, and write a checkpoint that the other commands can score.
Trust a recipe as you trust a script: models that it names as package.module:function are code,
which is run."""
_REPRODUCE = """Train students, score them under AutoAttack, and write a report with plots.
digits: every method beside its single-teacher baseline. backbones: four kinds of students with one
robust teacher and with two. frontier: clean against robust accuracy of each method, for several
radii of the inner attack. Finished students are reused."""


def add(commands: Commands) -> None:
    """Add train and reproduce."""
    command = commands.add_parser("train", help="train a student from a recipe", description=_TRAIN)
    command.add_argument(
        "recipe",
        help="the name of a recipe (see: list recipes), or the path of a .toml file",
    )
    command.add_argument("--out", type=output, required=True, help="directory for the checkpoint")
    command.add_argument("--seed", type=seed, default=0, help="seed of the run (default: 0)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, such as steps=100 or options.gate=false; may be repeated",
    )
    command.add_argument("--resume", action="store_true", help="resume the run in --out")
    command.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto: a GPU if there is one (default); cpu",
    )
    command.add_argument(
        "--tracker",
        action="append",
        default=[],
        help="send the figures to tensorboard or wandb as well; may be repeated (default: none)",
    )
    command.add_argument(
        "--adapter",
        action="store_true",
        help="also save the LoRA adapters alone, in OUT/adapter; needs a recipe with [lora]",
    )
    command.set_defaults(run=_train, kept=KEPT.replace("command", "command with --resume"))

    command = commands.add_parser(
        "reproduce",
        help="train several methods with several seeds and compare them",
        description=_REPRODUCE,
    )
    command.add_argument("study", help="digits, backbones or frontier")
    command.add_argument(
        "--seeds", type=positive, default=5, help="number of seeds, from 0 (default: 5)"
    )
    command.add_argument(
        "--out",
        type=output,
        help="directory for students and report (default: runs/reproduce-STUDY)",
    )
    command.add_argument(
        "--method",
        action="append",
        help="train this method only; may be repeated (default: those of the study)",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of every recipe; may be repeated",
    )
    command.add_argument(
        "--device", default="auto", help="auto: a GPU if there is one (default); cpu, cuda"
    )
    command.set_defaults(run=_reproduce, kept=KEPT)


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
        model = shlex.quote(f"local-dir:{arguments.out}")
        print(
            f"{named.name}: {named.recipe.steps} steps in {card.seconds:.0f} s, {shares}\n"
            f"{arguments.out}: mmtard-bench run SUITE --model {model}"
        )
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from mmtard_bench.leaderboard.entries.folder import require_outside
    from mmtard_bench.train.study.run import reproduce

    out = arguments.out or require_outside(Path("runs") / f"reproduce-{arguments.study}")
    report = reproduce(
        arguments.study,
        out=out,
        seeds=arguments.seeds,
        methods=arguments.method,
        overrides=arguments.set,
        device=arguments.device,
        console=Console(highlight=False),
    )
    print(f"written to {report}")
    return 0

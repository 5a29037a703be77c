"""What the trainer costs besides forward, backward and optimiser: a share of a step.

``make bench`` prints it for recipes of the digits world. Every call of a tower, of what turns its
output into a loss, of autograd and of the optimiser is timed where it happens; the rest of the
time from step to step, with data loading, the inner attack's arithmetic, clipping, logs and a saved
state every 100 steps, is the overhead. The first steps warm up and are left out, as is validation.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from tabulate import tabulate

from mmtard_bench.train.recipe import load_recipe
from mmtard_bench.train.session import Place, Session, train
from mmtard_bench.train.towers import Output, Tower

WARM_UP = 5


class Clock:
    """Seconds inside timed calls; calls inside timed calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, its time added to ``seconds``."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return wrapped


def measure(recipe: str, steps: int) -> tuple[float, float]:
    """Mean seconds of a step of a recipe, and the share that is overhead."""
    clock, ends = Clock(), []
    step = Session._step

    def watched(session: Session, *arguments: Any) -> None:
        step(session, *arguments)
        ends.append((time.perf_counter(), clock.seconds))

    # The last step validates and writes the model; it is left out.
    quiet = [f"steps={steps}", "validation.every=1000000"]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Session, "_step", watched),
        mock.patch.object(Tower, "forward", clock.timed(Tower.forward)),
        mock.patch.object(Output.cosine, "func", clock.timed(Output.cosine.func)),
        mock.patch.object(F, "log_softmax", clock.timed(F.log_softmax)),
        mock.patch.object(F, "cross_entropy", clock.timed(F.cross_entropy)),
        mock.patch.object(torch.autograd, "grad", clock.timed(torch.autograd.grad)),
        mock.patch.object(torch.Tensor, "backward", clock.timed(torch.Tensor.backward)),
        mock.patch.object(torch.optim.AdamW, "step", clock.timed(torch.optim.AdamW.step)),
    ):
        place = Place(Path(folder) / "run", cpu=not torch.cuda.is_available())
        train(load_recipe(recipe, quiet), place, Console(quiet=True))
    (begin, busy), (end, busy_then) = ends[WARM_UP], ends[-2]
    spent = end - begin
    return spent / (len(ends) - 2 - WARM_UP), 1 - (busy_then - busy) / spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=301)
    arguments = parser.parse_args()
    rows = []
    for recipe in ("digits/clean-ft", "digits/ard", "digits/mmt-ard"):
        seconds, overhead = measure(recipe, arguments.steps)
        rows.append([recipe, f"{1000 * seconds:.0f}", f"{overhead:.1%}"])
    print(tabulate(rows, headers=["recipe", "ms a step", "overhead"], tablefmt="github"))


if __name__ == "__main__":
    main()

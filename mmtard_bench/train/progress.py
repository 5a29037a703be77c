"""What training says while it works: a live bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmtard_bench.train.watch import Figures

_QUIET_SECONDS = 20.0


class TrainProgress:
    """Steps done, loss terms, teacher weights, accuracies and time left."""

    def __init__(self, console: Console, steps: int, begin: int, *, quiet: bool) -> None:
        self.console = console
        self.steps = steps
        self.begin = begin
        self.quiet = quiet
        self._text: dict[str, str] = {}
        self._started = self._spoke = time.monotonic()
        self._bars = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._bar = self._bars.add_task("", total=steps, completed=begin)

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.__exit__(kind, error, trace)

    def show(self, figures: Figures, weights: dict[str, float]) -> None:
        """Take in the figures of a step, and the mean weights of the teachers."""
        terms = [f"{k[5:]} {v:.3g}" for k, v in figures.items() if k.startswith("loss/")]
        if terms:
            self._text["loss"] = " ".join(terms)
        if weights:
            self._text["weights"] = " ".join(f"w_{k} {v:.2f}" for k, v in weights.items())
        for kind in ("train", "validation"):
            clean = figures.get(f"{kind}/clean")
            robust = figures.get(f"{kind}/adv", figures.get(f"{kind}/robust"))
            shares = [f"{value:.0%}" for value in (clean, robust) if value is not None]
            if shares:
                self._text[kind] = f"{'val' if kind == 'validation' else kind} {'/'.join(shares)}"

    def advance(self, step: int) -> None:
        """Say that so many steps are done."""
        text = ", ".join(self._text.values())
        self._bars.update(self._bar, completed=step, description=text)
        now = time.monotonic()
        if self.quiet or self.console.is_terminal or now - self._spoke < _QUIET_SECONDS:
            return
        self._spoke = now
        left = (now - self._started) / (step - self.begin) * (self.steps - step)
        line = f"step {step}/{self.steps}: {text}, about {left:.0f} s left"
        self.console.print(line, markup=False, soft_wrap=True)

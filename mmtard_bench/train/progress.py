"""Progress of training: a live bar in a terminal, otherwise a line from time to time."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from mmtard_bench.evaluation.progress import Live
from mmtard_bench.train.watch import Figures


class TrainProgress(Live):
    """Show finished steps, loss terms, teacher weights, accuracies and the remaining time."""

    def __init__(self, console: Console, steps: int, begin: int, *, quiet: bool) -> None:
        super().__init__(
            console,
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            quiet=quiet,
        )
        self.steps = steps
        self.begin = begin
        self._text: dict[str, str] = {}
        self._started = time.monotonic()
        self._bar = self.bars.add_task("", total=steps, completed=begin)

    def show(self, figures: Figures, weights: dict[str, float]) -> None:
        """Show the figures of a step and the mean weight of each teacher."""
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
        """Show that ``step`` steps are finished."""
        text = ", ".join(self._text.values())
        self.bars.update(self._bar, completed=step, description=text)
        if not self.due():
            return
        spent = time.monotonic() - self._started
        left = spent / (step - self.begin) * (self.steps - step)
        line = f"step {step}/{self.steps}: {text}, about {left:.0f} s left"
        self.console.print(line, markup=False, soft_wrap=True)

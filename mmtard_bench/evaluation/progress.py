"""The progress display of a run: a live bar on a terminal, otherwise a line every minute or so."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    ProgressColumn,
    TaskID,
    TextColumn,
)

from mmtard_bench.evaluation.headway import Progress
from mmtard_bench.text import printable

_QUIET_SECONDS = 20.0


class Live:
    """A bar on a terminal; otherwise lines, whose time ``due`` decides."""

    def __init__(self, console: Console, *columns: ProgressColumn, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.bars = Bars(
            *columns, console=console, transient=True, disable=quiet or not console.is_terminal
        )
        self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        self.bars.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.__exit__(kind, error, trace)

    def due(self) -> bool:
        """Whether it is time for the next line; True restarts the interval. Never with a bar."""
        now = time.monotonic()
        if self.quiet or self.console.is_terminal or now - self._spoke < _QUIET_SECONDS:
            return False
        self._spoke = now
        return True


class RunProgress(Live):
    """Shows the progress of one record at a time and passes every update on to ``also``."""

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        also: Callable[[Progress], None] | None = None,
    ) -> None:
        self._also = also
        super().__init__(
            console,
            # At most 80 columns, with "autoattack-standard linf 8/255" and 9,999 samples.
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("robust {task.fields[robust]}"),
            TextColumn("{task.fields[left]}"),
            quiet=quiet,
        )
        self._bar: TaskID | None = None
        self._name = self._label = self._said = ""
        self._started = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if not self.quiet and not self.console.is_terminal:
            threading.Thread(target=self._keep_speaking, daemon=True).start()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        super().__exit__(kind, error, trace)

    def _keep_speaking(self) -> None:
        """Print a line when it is due, in a thread: one pass may take minutes."""
        while not self._over.wait(1.0):
            if self._bar is not None:
                self._speak()

    def start(self, name: str, label: str, *, total: int, settled: int) -> None:
        """Begin a record of ``total`` samples, of which ``settled`` have a verdict.

        A bar shows ``label``; lines show the whole ``name``.
        """
        self.stop()
        self._name, self._label, self._said = name, label, f"{settled}/{total} samples"
        self._started = self._spoke = time.monotonic()
        self._bar = self.bars.add_task(label, total=total, completed=settled, robust="-", left="")

    def say(self, line: str) -> None:
        """Print lines above the bar."""
        if not self.quiet:
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the record and remove its bar."""
        if self._bar is not None:
            self.bars.remove_task(self._bar)
            self._bar = None

    def update(self, progress: Progress) -> None:
        """Show the progress of the record."""
        assert self._bar is not None
        if self._also is not None:
            self._also(progress)
        robust = f"{progress.robust / progress.seen:.1%}" if progress.seen else "-"
        stage, time_left, passes = _stage(progress), _time_left(progress), _passes_left(progress)
        self.bars.update(
            self._bar,
            description=f"{self._label}\n{stage}" if stage else self._label,
            completed=progress.settled,
            robust=robust,
            left="\n".join(filter(None, (time_left, passes))),
        )
        done = f"{progress.settled}/{progress.total} samples, robust {robust}"
        self._said = ", ".join(filter(None, (done, stage, passes, time_left)))
        self._speak()

    def _speak(self) -> None:
        if self.due():
            line = f"{self._name}: {self._said} after {_duration(time.monotonic() - self._started)}"
            self.console.print(line, markup=False, soft_wrap=True)


def _stage(progress: Progress) -> str:
    """For example "apgd-t: 128 rows, step 37"."""
    pulse = progress.pulse
    return f"{pulse.stage}: {pulse.rows} rows, step {pulse.step}" if pulse.rows else pulse.stage


def _passes_left(progress: Progress) -> str:
    """For example "<= 12.3M passes"."""
    count = progress.passes_left
    if not count:
        return ""
    for least, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= least:
            return f"<= {count / least:.3g}{unit} passes"
    return f"<= {count} passes"


def _time_left(progress: Progress) -> str:
    """For example "~3 h 5 min left"."""
    seconds = progress.seconds_left
    return "" if seconds is None else f"~{_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"

"""What a run says while it works: a live bar on a terminal, a line now and then elsewhere."""

import time
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

from mmtard_bench.headway import Progress
from mmtard_bench.markdown import printable

_QUIET_SECONDS = 20.0


class Live:
    """A bar on a terminal; elsewhere ``due`` says when the next line is."""

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
        """Whether there is no bar and nothing was said for a while; a True counts as saying."""
        now = time.monotonic()
        if self.quiet or self.console.is_terminal or now - self._spoke < _QUIET_SECONDS:
            return False
        self._spoke = now
        return True


class RunProgress(Live):
    """Progress of one record at a time: samples settled, robust accuracy so far, what is left."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
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
        self._name = self._label = ""

    def start(self, name: str, label: str, *, total: int, settled: int) -> None:
        """Begin a record of ``total`` samples, of which some are settled already.

        ``label`` stands beside the bar, the whole ``name`` in lines where there is no bar.
        """
        self.stop()
        self._name, self._label = name, label
        self._spoke = time.monotonic()
        self._bar = self.bars.add_task(label, total=total, completed=settled, robust="-", left="")

    def say(self, line: str) -> None:
        """Print lines above the bar."""
        if not self.quiet:
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the record: its bar goes."""
        if self._bar is not None:
            self.bars.remove_task(self._bar)
            self._bar = None

    def update(self, progress: Progress) -> None:
        """Show how far the record is."""
        assert self._bar is not None
        robust = f"{progress.robust / progress.seen:.1%}" if progress.seen else "-"
        stage, time_left, passes = _stage(progress), _time_left(progress), _passes_left(progress)
        self.bars.update(
            self._bar,
            description=f"{self._label}\n{stage}" if stage else self._label,
            completed=progress.settled,
            robust=robust,
            left="\n".join(filter(None, (time_left, passes))),
        )
        if self.due():
            done = f"{progress.settled}/{progress.total} samples, robust {robust}"
            said = ", ".join(filter(None, (done, stage, passes, time_left)))
            self.console.print(f"{self._name}: {said}", markup=False, soft_wrap=True)


def _stage(progress: Progress) -> str:
    """For example "apgd-t: 128 rows, step 37"."""
    pulse = progress.pulse
    return f"{pulse.stage}: {pulse.rows} rows, step {pulse.step}" if pulse.rows else pulse.stage


def _passes_left(progress: Progress) -> str:
    """For example "12.3M passes at most"."""
    count = progress.passes_left
    if not count:
        return ""
    for least, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= least:
            return f"<= {count / least:.3g}{unit} passes"
    return f"<= {count} passes"


def _time_left(progress: Progress) -> str:
    """For example "~3 h 5 min left"."""
    if progress.seconds_left is None:
        return ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"~{hours // 24} days left"
    if hours:
        return f"~{hours} h {minutes} min left"
    return f"~{minutes} min left" if minutes else f"~{seconds} s left"

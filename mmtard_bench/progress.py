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
    TimeRemainingColumn,
)

from mmtard_bench.batches import Progress
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
    """Progress of one record at a time: samples settled, robust accuracy so far, time left."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__(
            console,
            # At most 80 columns, with "autoattack-standard linf 8/255" and 9,999 samples.
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("robust {task.fields[robust]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            quiet=quiet,
        )
        self._bar: TaskID | None = None
        self._name = ""
        self._started = 0.0
        self._first = 0

    def start(self, name: str, label: str, *, total: int, settled: int) -> None:
        """Begin a record of ``total`` samples, of which some are settled already.

        ``label`` stands beside the bar, the whole ``name`` in lines where there is no bar.
        """
        self.stop()
        self._name, self._first = name, settled
        self._started = self._spoke = time.monotonic()
        self._bar = self.bars.add_task(label, total=total, completed=settled, robust="-")

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
        robust = progress.standing / progress.seen
        assert self._bar is not None
        self.bars.update(self._bar, completed=progress.settled, robust=f"{robust:.1%}")
        if not self.due():
            return
        fresh = progress.settled - self._first
        text = f"{self._name}: {progress.settled}/{progress.total} samples, robust {robust:.1%}"
        if fresh > 0:
            left = (time.monotonic() - self._started) / fresh * (progress.total - progress.settled)
            text += f", about {left:.0f} s left"
        self.console.print(text, markup=False, soft_wrap=True)

"""What a run says while it works: a live bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mmtard_bench.evaluation import Progress

_QUIET_SECONDS = 20.0


class RunProgress:
    """Progress of one record at a time: samples settled, robust accuracy so far, time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            # At most 80 columns, with "autoattack-standard linf 8/255" and 9,999 samples.
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("robust {task.fields[robust]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._name = ""
        self._started = self._spoke = 0.0
        self._first = 0

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

    def start(self, name: str, label: str, *, total: int, settled: int) -> None:
        """Begin a record of ``total`` samples, of which some are settled already.

        ``label`` stands beside the bar, the whole ``name`` in lines where there is no bar.
        """
        self.stop()
        self._name, self._first = name, settled
        self._started = self._spoke = time.monotonic()
        self._bar = self._bars.add_task(label, total=total, completed=settled, robust="-")

    def stop(self) -> None:
        """End the record: its bar goes."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None

    def update(self, progress: Progress) -> None:
        """Show how far the record is."""
        robust = progress.standing / progress.seen
        assert self._bar is not None
        self._bars.update(self._bar, completed=progress.settled, robust=f"{robust:.1%}")
        now = time.monotonic()
        if self.console.is_terminal or now - self._spoke < _QUIET_SECONDS:
            return
        self._spoke = now
        fresh = progress.settled - self._first
        text = f"{self._name}: {progress.settled}/{progress.total} samples, robust {robust:.1%}"
        if fresh > 0:
            left = (now - self._started) / fresh * (progress.total - progress.settled)
            text += f", about {left:.0f} s left"
        self.console.print(text, markup=False, soft_wrap=True)

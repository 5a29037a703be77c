"""What ends training early: the step in progress is finished first, so that the state is whole."""

import signal
import threading
from types import TracebackType
from typing import Self

from mmtard_bench.evaluation.processes import Launcher


class Interruption:
    """Turns the first SIGINT, or the end of the launcher, into ``asked``.

    A second SIGINT interrupts at once, as ever.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._signalled = False
        # Python lets only the main thread handle signals.
        self._listens = threading.current_thread() is threading.main_thread()

    @property
    def asked(self) -> bool:
        """Whether training is to stop after this step."""
        return self._signalled or self._launcher.ended

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

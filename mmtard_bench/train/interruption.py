"""Ctrl-C while training: the step in progress is finished first, so that the state is whole."""

import signal
import threading
from types import TracebackType
from typing import Self


class Interruption:
    """Turns the first SIGINT into ``asked``; a second one interrupts at once, as ever."""

    def __init__(self) -> None:
        self.asked = False
        # Python lets only the main thread handle signals.
        self._listens = threading.current_thread() is threading.main_thread()

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
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""What libraries say to nobody, switched off for a while and then as the application had it."""

import logging
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any


class Muted(ContextDecorator):
    """Something of the whole process that is off while any thread is inside.

    ``off`` switches it off and returns how it was, which ``back`` gets when the last thread leaves.
    """

    def __init__(self, off: Callable[[], Any], back: Callable[[Any], None]) -> None:
        self._off, self._back = off, back
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._off()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._back(self._before)


def _disable() -> int:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    return before


no_logs = Muted(_disable, logging.disable)
"""Without any logger's warnings and remarks."""

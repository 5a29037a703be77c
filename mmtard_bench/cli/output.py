"""Standard output and standard error: closed pipes, full disks, characters that do not fit."""

import codecs
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class OutputLost(BaseException):
    """Standard output takes no more: the reader of a pipe left, or a disk is full.

    No Exception, as KeyboardInterrupt is none: what printed a line has not failed, and an
    evaluation in which it did must not be recorded as one that fails. ``error`` is the system's.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _Stream:
    """A text stream that never raises the system's errors.

    The first one of standard output ends the main thread's work by OutputLost, unless ``quiet``;
    what is written later goes nowhere.
    """

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream = stream
        self._raises = not quiet
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; returns the number of characters."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error
                self._discard()
        # A line of another thread must not end that thread alone.
        if self._error and self._raises and threading.current_thread() is threading.main_thread():
            self._raises = False
            raise OutputLost(self._error)

    def _discard(self) -> None:
        """Let what is still in buffers go nowhere when Python ends."""
        with suppress(OSError, ValueError):  # a stream of a test may have no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks, as JSON writes them, so that JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


@contextmanager
def guarded_output() -> Iterator[None]:
    """Let standard output raise OutputLost instead of OSError, also for what is still buffered."""
    with _guarded(sys.stdout, quiet=False) as out, redirect_stdout(out):
        yield


@contextmanager
def guarded_errors() -> Iterator[None]:
    """Let standard error raise nothing: there is no other place to say so."""
    with _guarded(sys.stderr, quiet=True) as err, redirect_stderr(err):
        yield


@contextmanager
def _guarded(stream: TextIO | None, *, quiet: bool) -> Iterator[Any]:
    """The stream as a ``_Stream`` that escapes what its encoding lacks; None if it is closed."""
    if stream is None:
        yield None
        return
    codecs.register_error("mmtard-bench", _escaped)
    before, guarded = stream.errors, _Stream(stream, quiet=quiet)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="mmtard-bench")
    try:
        yield guarded
    finally:
        try:
            guarded.flush()
        finally:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=before)

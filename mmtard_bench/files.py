"""Text files, atomic writes, and the lock of a directory."""

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mmtard_bench.errors import InputError, StorageError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, fsync, rename."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}. Nothing that was finished "
            "is lost; free space or choose another directory, and run the same command again."
        ) from error


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a directory's lock; the system releases it however the process ends.

    Raises InputError if another process holds it, or if the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"Another process is working in {folder}; wait for it, or give another --out."
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{folder} cannot be written: {error.strerror or error}. Choose another --out."
    )


def is_text(name: str) -> bool:
    """Whether a name from outside is one line that JSON can hold: no control, no broken UTF-8."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def lines_in(text: str) -> list[str]:
    """The lines of a text, without empty ones at its end.

    Not ``splitlines``, which takes more letters for ends of lines: names would be shifted.
    """
    text = text.rstrip()
    return re.split(r"\r\n|\r|\n", text) if text else []


def read_text(path: Path) -> str:
    """A text file, without a mark at its start. Raises OSError, or UnicodeDecodeError."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")  # a pipe would never end
    return path.read_text("utf-8-sig")


def suite_folder() -> Path:
    """Where the suites that ship are: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "suite_files"
    return installed if installed.is_dir() else package.parent / "suites"

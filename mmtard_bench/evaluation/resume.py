"""The settled samples of an unfinished record on disk, so that a run can resume."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from mmtard_bench.errors import StorageError
from mmtard_bench.evaluation.loop import Batch, Embeddings
from mmtard_bench.evaluation.processes import ALONE, Processes
from mmtard_bench.files import write_atomically
from mmtard_bench.records.schema import Sample, digest_of
from mmtard_bench.schema import Strict

_Seconds = Annotated[float, Field(ge=0, le=1e9)]


class _Line(Strict):
    """A batch. ``seal`` is a hash of the rest; a line that was changed is dropped."""

    identity: str
    seconds: _Seconds
    notes: list[str]
    samples: list[Sample] = Field(min_length=1)
    embeddings: list[Embeddings] = Field(default_factory=list)
    model_seconds: _Seconds = 0.0
    seal: str = ""

    def sealed(self) -> str:
        return digest_of(self.model_dump(mode="json", exclude={"seal"}))


class Partial:
    """Batches of an unfinished record, one JSON line each.

    A single process writes ``path``; each of several processes writes a file of its own beside it,
    such as ``X.partial-1of2``. Reading covers all files, whatever the number of processes was.
    ``suits`` decides whether a batch belongs to the record. ``say`` receives a message about
    dropped lines.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        processes: Processes = ALONE,
        *,
        suits: Callable[[Batch], bool] = lambda _: True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path = path
        self._suits, self._say = suits, say
        if processes.world > 1:
            name = f"{path.name}-{processes.rank + 1}of{processes.world}"
            self.path = path.with_name(name)
        self.identity = identity
        self._ours = re.compile(rf"{re.escape(path.name)}(-\d+of\d+)?")

    def read(self) -> list[Batch]:
        """The batches of all files. Drops lines that are cut, changed or of another record.

        If this process's file has such lines, it is rewritten without them: the next batch must not
        continue a line that a crash cut short.
        """
        return [batch for path in self._files() for batch in self._read(path)]

    def append(self, batch: Batch) -> None:
        """Append a batch. Raises StorageError if it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(batch))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path} could not be written: {error.strerror or error}. Finished records "
                "are kept; free space or choose another --out, and run the same command again."
            ) from error

    def remove(self) -> None:
        """Delete the files, once the whole record is on disk."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        folder = self.path.parent
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if self._ours.fullmatch(path.name))

    def _read(self, path: Path) -> list[Batch]:
        *lines, cut = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        batches = [batch for batch in map(self._batch, lines) if batch is not None]
        if dropped := len(lines) - len(batches):
            self._say(
                f"{path}: {dropped} of {len(lines)} lines are not as they were written, or are "
                "of another version, and are dropped; their samples are attacked again."
            )
        if path == self.path and (dropped or cut):
            write_atomically(path, "".join(map(self._line, batches)))
        return batches

    def _batch(self, text: str) -> Batch | None:
        """The batch of a line, or None if the line is not valid."""
        try:
            line = _Line.model_validate_json(text)
            if line.identity != self.identity or line.seal != line.sealed():
                return None
        except (ValidationError, ValueError):
            return None
        batch = Batch(line.samples, line.notes, line.seconds, line.embeddings, line.model_seconds)
        return batch if self._suits(batch) else None

    def _line(self, batch: Batch) -> str:
        line = _Line(
            identity=self.identity,
            seconds=batch.seconds,
            notes=batch.notes,
            samples=batch.samples,
            embeddings=batch.embeddings,
            model_seconds=batch.model_seconds,
        )
        return line.model_copy(update={"seal": line.sealed()}).model_dump_json() + "\n"

"""What is settled of a record that is not finished, on disk, so that little is lost."""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mmtard_bench.batches import Batch, Embeddings
from mmtard_bench.errors import StorageError
from mmtard_bench.processes import ALONE, Processes
from mmtard_bench.records import Sample, write_atomically


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    identity: str
    seconds: float
    notes: list[str]
    samples: list[Sample]
    embeddings: list[Embeddings] = []
    model_seconds: float = 0.0


class Partial:
    """Batches of an unfinished record, one JSON line each.

    ``path`` is the file of a process that is alone; of several, each writes its own, named after
    it: ``X.partial-1of2``. All of them are read, however many processes there are now.
    """

    def __init__(self, path: Path, identity: str, processes: Processes = ALONE) -> None:
        self.path = path
        if processes.world > 1:
            name = f"{path.name}-{processes.rank + 1}of{processes.world}"
            self.path = path.with_name(name)
        self.identity = identity
        self._ours = re.compile(rf"{re.escape(path.name)}(-\d+of\d+)?")

    def read(self) -> list[Batch]:
        """The batches in all files that are whole and of this identity.

        A line cut short ends a file; its own file is then written again without it, as a crash
        must not run into the next line.
        """
        return [batch for path in self._files() for batch in self._read(path)]

    def append(self, batch: Batch) -> None:
        """Add a batch. Raises StorageError if the disk does not take it."""
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
        """Forget the batches, once the whole record is on disk."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        folder = self.path.parent
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if self._ours.fullmatch(path.name))

    def _read(self, path: Path) -> list[Batch]:
        batches = []
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        for text in lines[:-1]:
            try:
                line = _Line.model_validate_json(text)
            except ValidationError:
                break
            if line.identity == self.identity:
                batches.append(_batch(line))
        if path == self.path and (len(batches) != len(lines) - 1 or lines[-1]):
            write_atomically(path, "".join(map(self._line, batches)))
        return batches

    def _line(self, batch: Batch) -> str:
        line = _Line(
            identity=self.identity,
            seconds=batch.seconds,
            notes=batch.notes,
            samples=batch.samples,
            embeddings=batch.embeddings,
            model_seconds=batch.model_seconds,
        )
        return line.model_dump_json() + "\n"


def _batch(line: _Line) -> Batch:
    return Batch(line.samples, line.notes, line.seconds, line.embeddings, line.model_seconds)

"""What a training run leaves on disk: the model with its card, and states to resume from."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmtard_bench.errors import InputError, StorageError, first_line
from mmtard_bench.files import write_atomically
from mmtard_bench.models.text_table import CONFIG, WEIGHTS
from mmtard_bench.records.schema import Digest, Environment
from mmtard_bench.schema import Strict, explain

T = TypeVar("T", bound=BaseModel)

CARD = "card.json"
ORIGIN = "origin.json"


class Origin(Strict):
    """What a run must not change when it resumes; lies in its directory from the start.

    ``digests`` are those of the student's start, of the teachers and of the data.
    """

    recipe: dict[str, Any]
    seed: int
    processes: int
    digests: dict[str, str]


class Progress(Strict):
    """How far a run is; lies in each of its states, whose other ``files`` it seals by SHA-256.

    ``memory`` is that of the method.
    """

    step: int = Field(ge=1)
    seconds: float = Field(ge=0)
    memory: dict[str, float] = Field(default={})
    files: dict[str, Digest] = Field(default={})


class Card(Strict):
    """What a checkpoint is and where it comes from."""

    schema_version: int = 1
    recipe_name: str
    recipe: dict[str, Any]
    recipe_digest: str
    origin: Origin
    seconds: float
    trainable_parameters: int
    metrics: dict[str, float]
    weights_digest: str
    environment: Environment


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save's RuntimeErrors name its writer's file; others are no matter of storage.
        writer = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
        if isinstance(error, RuntimeError) and not writer:
            raise
        # That writer says nothing of the system's error, and closes the file with another one.
        system = error if isinstance(error, OSError) else error.__context__
        why = "the file is cut short, as on a full disk" if writer else first_line(error)
        why = getattr(system, "strerror", None) or why
        raise StorageError(
            f"{path} could not be written: {why}. What was saved before is kept; free space, then "
            "run the same command with --resume."
        ) from error


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write safetensors whole or not at all. Raises StorageError."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_file(tensors, temporary)
            # mkstemp makes files that only their owner can read.
            temporary.chmod(0o644)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_model(folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write an open_clip directory."""
    write_weights(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_card(folder: Path) -> Card | None:
    """The card of a finished run, or None. Raises InputError if it cannot be read."""
    return _read(folder / CARD, Card, "Restore it, or delete it, and --resume writes it again.")


def settle_origin(folder: Path, origin: Origin, *, main: bool) -> None:
    """Write down where a run comes from, or see that it still comes from there.

    Raises InputError that names what has changed since the run began.
    """
    begun = _read(folder / ORIGIN, Origin, "Restore it, or choose another --out.")
    if begun is None:
        if main:
            write_atomically(folder / ORIGIN, origin.model_dump_json(indent=1) + "\n")
        return
    changed = list(differences(begun.model_dump(), origin.model_dump()))
    if changed:
        raise InputError(
            f"{folder} was begun with something else: {', '.join(changed)}. Go on as it began, or "
            "choose another --out."
        )


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys in which two tables differ, with both values: "steps (300, now 400)"."""
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} ({a}, now {b})"


def _read(path: Path, kind: type[T], remedy: str) -> T | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        why = f"{error.strerror}."
    except ValidationError as error:
        why = explain(error)
    raise InputError(f"{path} is damaged: {why} {remedy}")


class States:
    """Full states of a run under ``folder``/states; keeps the last ``keep``."""

    def __init__(self, folder: Path, keep: int, steps: int) -> None:
        self.folder = folder / "states"
        self.keep = keep
        self.steps = steps

    def _steps(self) -> dict[int, Path]:
        found = {}
        for path in self.folder.glob("step-*"):
            match = re.fullmatch(r"step-(\d+)", path.name)
            # The file is written by us, last: what lacks it is not ours, or not whole.
            if match and (path / "progress.json").is_file():
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def latest(self) -> tuple[Path, Progress] | None:
        """The newest whole state and how far it is.

        Raises InputError for one that is not as it was saved: torch loads some damage in silence.
        """
        states = self._steps()
        if not states:
            return None
        step, folder = list(states.items())[-1]
        remedy = f"Delete {folder}, and --resume continues from the state before."
        progress = _read(folder / "progress.json", Progress, remedy)
        assert progress is not None
        why = self._damage(step, folder, progress)
        if why:
            raise InputError(f"The state {folder} is damaged: {why}. {remedy}")
        return folder, progress

    def _damage(self, step: int, folder: Path, progress: Progress) -> str:
        """What is not as it was saved in a state, or an empty text."""
        if progress.step != step or step > self.steps:
            return f"progress.json says step {progress.step} of {self.steps}"
        found, sealed = _digests(folder), progress.files
        wrong = [name for name in {*found, *sealed} if found.get(name) != sealed.get(name)]
        return f"{', '.join(sorted(wrong))}: not as saved" if wrong else ""

    def save(self, write: Callable[[Path], None], progress: Progress, *, main: bool) -> None:
        """Save a state: ``write`` fills a directory, on every process; ``main`` completes it.

        Raises StorageError, and then leaves the earlier states as they were.
        """
        final = self.folder / f"step-{progress.step:07d}"
        partial = self.folder / f".partial-{progress.step:07d}"
        try:
            with storage(final):
                partial.mkdir(parents=True, exist_ok=True)
                write(partial)
                if main:
                    _sync(partial)
                    sealed = progress.model_copy(update={"files": _digests(partial)})
                    write_atomically(partial / "progress.json", sealed.model_dump_json())
                    if progress.step in self._steps():
                        shutil.rmtree(final)
                    partial.rename(final)
        except StorageError:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if main:
            for old in list(self._steps().values())[: -self.keep]:
                shutil.rmtree(old)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a state, by name, but for its progress."""
    found = {}
    for path in folder.iterdir():
        if path.name != "progress.json":
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def claim(folder: Path, *, resume: bool) -> None:
    """Make a run's directory, or see that it is one. Raises InputError if it is taken."""
    ours = (folder / ORIGIN).exists()
    if ours and not resume:
        raise InputError(
            f"{folder} holds a training run; add --resume to continue it, or choose another "
            "--out. Nothing there was touched."
        )
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file; choose another --out for the directory.")
        others = [path for path in folder.glob("*") if path.name != ".lock"]
        if not ours and others:
            raise InputError(
                f"{folder} is not empty and holds no training run; choose another --out. Nothing "
                "there was touched."
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be used: {error.strerror or error}. Choose another --out."
        ) from error

"""Files that come with models: read without running what is in them, refused in sentences."""

import json
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtard_bench.errors import InputError, first_line

# TeCoA's checkpoints hold their best accuracy as a NumPy number, which numpy 1 and 2 find in
# different modules. It is made from bytes; no code is run.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]

MOST_TENSORS = 50_000
"""In one file: the largest models have some 2,000, and checkpoints keep three of each."""
LARGEST_INDEX = 8 << 20
"""Bytes that a file may spend on naming its tensors: some 160 for each of ``MOST_TENSORS``."""
_LAYERS = re.compile(r"(^|_)(layers?|depths?)$")
LARGEST_CONFIG = 64 << 20
"""Bytes of a JSON file: a table of a million prompts would fit."""


def read_weights(spec: str, path: Path) -> Any:
    """What a weights file holds: safetensors by its ending, else what ``torch.save`` wrote.

    Tensors of a large file are mapped, not read, until they are used. Raises InputError for what
    is missing, damaged, no weights, or would run code.
    """
    check_file(spec, path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles: they are read, or refused below
            return torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # safetensors, torch, pickle and system errors have no common base
        raise InputError(
            f"'{spec}' could not be loaded: {path} {why_unreadable(error)}."
        ) from error


def read_json(spec: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for anything else."""
    try:
        config = json.loads(read_config(spec, path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{spec}': {path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"'{spec}': {path.name} holds no JSON object; expected a configuration.")
    return config


def read_config(spec: str, path: Path) -> bytes:
    """The content of a small file. Raises InputError for what is missing, large, or no file."""
    try:
        size = _require_regular(spec, path)
        if size <= LARGEST_CONFIG:
            return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"'{spec}': {path} cannot be read: {error.strerror}; expected the configuration that "
            "was written with the weights."
        ) from error
    raise InputError(
        f"'{spec}': {path} has {size} bytes; a configuration has {LARGEST_CONFIG} at most. Use the "
        "file that was written with the weights."
    )


def check_file(spec: str, path: Path) -> None:
    """Raise InputError for what cannot be weights.

    A file that is missing or empty, a device or pipe, a web page, a pointer to a file, or an index
    of so many tensors that reading them would not end.
    """
    try:
        _require_regular(spec, path)
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(
            f"'{spec}': {path} cannot be read: {error.strerror}; expected a weights file."
        ) from error
    text = head.lstrip().lower()
    if not text:
        why = "is empty: download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        why = (
            "holds a web page instead of weights, as a log-in page or a link to a preview gives: "
            "delete it, and download the file itself"
        )
    elif text.startswith(b"version https://git-lfs"):
        why = "is a pointer of Git LFS instead of the weights: run git lfs pull where it lies"
    elif max(_index(path, head), default=0) > LARGEST_INDEX:
        why = (
            f"names its tensors in more than {LARGEST_INDEX} bytes, or more than {MOST_TENSORS} of "
            "them; the largest models have some 2,000. Save the state dict of the model alone"
        )
    else:
        return
    raise InputError(f"'{spec}' could not be loaded: {path} {why}.")


def _require_regular(spec: str, path: Path) -> int:
    """The size of a file; reading a pipe or a device might not end. Raises InputError, OSError."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise InputError(
            f"'{spec}': {path} is a pipe or a device; expected a file, which can be read twice."
        )
    return found.st_size


def _index(path: Path, head: bytes) -> Iterator[int]:
    """How many bytes a weights file spends on its index, before that is read."""
    if path.suffix == ".safetensors":
        yield int.from_bytes(head[:8], "little") if path.stat().st_size > LARGEST_INDEX else 0
    elif is_zipfile(path):
        try:
            with ZipFile(path) as archive:
                entries = archive.infolist()
        except BadZipFile:  # torch says what is wrong
            return
        yield len(entries) * LARGEST_INDEX // MOST_TENSORS
        yield from (each.file_size for each in entries if each.filename.endswith(".pkl"))


def count_tensors(path: Path) -> int:
    """How many tensors a file that ``check_file`` accepts can hold at most."""
    with suppress(ValueError, BadZipFile), path.open("rb") as file:
        if path.suffix == ".safetensors":
            return len(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        if is_zipfile(file):
            return len(ZipFile(file).infolist())
    return path.stat().st_size  # no index, or a damaged one, of which the library says more


def why_unreadable(error: BaseException) -> str:
    """What is wrong with a weights file that a library failed to read, as a predicate."""
    text = str(error)
    if "TorchScript" in text:
        return (
            "is a TorchScript archive, which holds code, and code that comes with weights is never "
            "run; OpenAI's own weights are ARCH:openai. For others, save the state dict of one "
            "that you trust: torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    if "Weights only load failed" in text or "Unsupported operand" in text:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", text)
        return (
            f"holds more than tensors ({found[1] if found else 'a pickle of something else'}), "
            "which could run code, so it is not read; save its state dict alone, with torch.save"
        )
    if any(word in text for word in ("deserializ", "zip archive", "EOF", "Ran out of input")):
        return f"is truncated or damaged: copy or download it again ({first_line(error)})"
    return f"cannot be read as weights ({first_line(error)})"


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps weights from filling a module, in words; empty if they fit.

    Each tensor must be there, none may be left over, and shapes and kinds of number must agree;
    precision need not. Of many problems of one kind, the first of each part of the module (what
    stands before the first dot) is named, four at most.
    """
    missing = [key for key in expected if key not in given]
    left = [key for key in given if key not in expected]
    wrong = {}
    for key in given.keys() & expected.keys():
        if given[key].shape != expected[key].shape:
            shapes = f"{tuple(given[key].shape)}, expected {tuple(expected[key].shape)}"
            wrong[key] = f"has the shape {shapes}"
        elif given[key].is_floating_point() != expected[key].is_floating_point():
            wrong[key] = f"is {given[key].dtype}, expected {expected[key].dtype}"
    shown = _first_of_each_part(key for key in expected if key in wrong)[:2]
    said = [_named(missing, "missing"), _named(left, "unknown")]
    said.append("; ".join(f"'{key}' {wrong[key]}" for key in shown) + _more(len(wrong), shown))
    return "; ".join(filter(None, said))


def named(keys: Iterable[str]) -> str:
    """The first tensor of each part of a module, four at most, and how many there are besides."""
    keys = list(keys)
    shown = _first_of_each_part(keys)[:4]
    return ", ".join(f"'{key}'" for key in shown) + _more(len(keys), shown)


def _named(keys: list[str], what: str) -> str:
    return f"{named(keys)} {'is' if len(keys) == 1 else 'are'} {what}" if keys else ""


def _first_of_each_part(keys: Iterable[str]) -> list[str]:
    firsts: dict[str, str] = {}
    for key in keys:
        firsts.setdefault(key.partition(".")[0], key)
    return list(firsts.values())


def _more(count: int, shown: list[str]) -> str:
    return f" and {count - len(shown)} more" if count > len(shown) else ""


def bound_layers(spec: str, config: object, tensors: int) -> None:
    """Refuse a configuration with more layers than there are tensors: building would not end."""
    for key, value in pairs(config):
        if _LAYERS.search(key):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > tensors:
                    raise InputError(
                        f"'{spec}': the configuration asks for {count} layers ({key}), but the "
                        f"weights have {tensors} tensors. Use the files that were written together."
                    )


def pairs(value: object) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pairs(inner)


def assume(spec: str, note: str) -> str:
    """Warn of what is assumed about a model, and return it for ``Clip.notes``."""
    warnings.warn(f"'{spec}': {note}", stacklevel=3)
    return note

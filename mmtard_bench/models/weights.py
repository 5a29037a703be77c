"""Weights files of unknown origin: read without running what is in them, refused in sentences."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

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


def check_file(spec: str, path: Path) -> None:
    """Raise InputError for a file that is missing, empty, a web page or a pointer to a file."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError as error:
        raise InputError(
            f"'{spec}': {path} cannot be read: {error.strerror}; expected a weights file."
        ) from error
    if not head:
        why = "is empty: download it again"
    elif head.startswith((b"<!doctype", b"<html", b"<?xml")):
        why = (
            "holds a web page instead of weights, as a log-in page or a link to a preview gives: "
            "delete it, and download the file itself"
        )
    elif head.startswith(b"version https://git-lfs"):
        why = "is a pointer of Git LFS instead of the weights: run git lfs pull where it lies"
    else:
        return
    raise InputError(f"'{spec}' could not be loaded: {path} {why}.")


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
    precision need not.
    """
    missing = [f"'{key}' is missing" for key in expected if key not in given]
    left, wrong = [], []
    for key, value in given.items():
        if key not in expected:
            left.append(f"'{key}' is unknown")
        elif value.shape != expected[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            wrong.append(f"'{key}' has the shape {shapes}")
        elif value.is_floating_point() != expected[key].is_floating_point():
            wrong.append(f"'{key}' is {value.dtype}, expected {expected[key].dtype}")
    said = []
    for problems in (missing, left, wrong):
        more = f" and {len(problems) - 2} more like it" if len(problems) > 2 else ""
        if problems:
            said.append("; ".join(problems[:2]) + more)
    return "; ".join(said)

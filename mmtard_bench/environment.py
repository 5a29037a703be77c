"""Where a record was made: versions, device, commit."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmtard_bench.records.schema import Environment

_PACKAGES = ("mmtard-bench", "torch", "open_clip_torch", "pyautoattack", "torchattacks", "datasets")


def describe(device: torch.device, batch_size: int, processes: int = 1) -> Environment:
    """The environment of this process, one of ``processes`` that are alike, for a record."""
    return Environment(
        versions={name: _version(name) for name in _PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        device=_device_name(device),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        git_revision=_git_revision(),
        processes=processes if processes > 1 else None,
    )


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _git_revision() -> str | None:
    """The commit of this package's checkout, with a mark if it has local changes."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()

"""What is installed, what the machine has, and what of it does not fit together."""

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "mmtard-bench",
    "torch",
    "torchvision",
    "open_clip_torch",
    "torchattacks",
    "pyautoattack",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tabulate",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``problem`` says what to do, if something is wrong."""

    name: str
    value: str
    problem: str = ""


def examine() -> Iterator[Finding]:
    """Look at the installation, line by line."""
    yield Finding("python", platform.python_version())
    yield Finding("platform", platform.platform())
    for package in _PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "missing", "install it: pip install mmtard-bench")
    yield _torchvision()
    yield from _devices()
    yield from _caches()


def _torchvision() -> Finding:
    """A torchvision built for another torch fails as soon as it is imported."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # ImportError, RuntimeError ("torchvision::nms does not exist"), ...
        return Finding(
            "torch and torchvision",
            f"do not match ({str(error).splitlines()[0]})",
            "install both from one place in one command: pip install --force-reinstall torch "
            "torchvision; a CPU-only torch cannot work with the registry's torchvision",
        )
    return Finding("torch and torchvision", "match")


def _devices() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    count = torch.cuda.device_count()
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        yield Finding(f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB")
    if not count:
        yield Finding("cuda", "no device; runs use the CPU")


def _caches() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    yield Finding("hub cache", str(home) + ("" if home.is_dir() else " (not there yet)"))
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    if offline not in ("", "0"):
        yield Finding("hub", f"offline (HF_HUB_OFFLINE={offline}): only the cache is used")

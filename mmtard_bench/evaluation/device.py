"""The device, the batch size and the float32 mode of a run. None of them changes a verdict."""

import logging
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Classifier, T
from mmtard_bench.errors import InputError, ModelError, reason
from mmtard_bench.evaluation.processes import ALONE, Processes
from mmtard_bench.records.schema import Environment


@dataclass(frozen=True)
class Resources:
    """The device of a run, and how the run uses it.

    ``batch_size``: images per pass; default: as many as fit in memory, at most 64 on a CPU and 512
    on a GPU. ``workers``: threads that decode images during the attack; default: chosen from the
    number of cores; 0: none. Each of several ``processes`` attacks its share of the samples.
    ``black_box``: whether an evaluation ends with the check of ``evaluation.black_box``.
    """

    device: torch.device
    batch_size: int | None = None
    workers: int | None = None
    processes: Processes = ALONE
    black_box: bool = True


@contextmanager
def full_float32() -> Iterator[None]:
    """Run passes in float32 with gradients, without TF32 and autocast.

    The caller may be within ``torch.autocast``, ``no_grad`` or ``inference_mode``; this context
    overrides them and restores them at its end.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def find_device(name: str | torch.device, place: int | None = None) -> torch.device:
    """The device of this name; "auto" is a CUDA device if there is one, else the CPU.

    ``place`` is the number of this process on its machine: process i uses GPU i. Raises InputError
    for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and place is not None and torch.cuda.is_available():
        name = f"cuda:{place % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # unknown names and absent devices raise various errors
        raise InputError(
            f"The device '{name}' cannot be used: {reason(error)}; expected auto, cpu or cuda."
        ) from error
    return device


MOST = {"cpu": 64, "cuda": 512}
"""The largest automatic batch size. Larger batches are hardly faster per image."""
STATE = 16
"""How many copies of an image a search holds per row, temporary copies included."""
GRAPH = 2
"""The memory of a pass as a multiple of the activations that it saves for its backward pass."""
USED = 0.6
"""The share of the available memory for rows. Images and results need the rest."""

_SIGNS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "CUDA out of memory",
    "_STATUS_ALLOC_FAILED",
)
"""Parts of the text of a RuntimeError that reports a lack of memory."""

_LOG = logging.getLogger(__name__)
_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files with the memory limit and use of a Linux container: control groups version 2, then 1."""


def batch_size_of(given: int | None, fit: int, device: torch.device) -> int:
    """The batch size, when ``fit`` rows fit in memory: the ``given`` one, or the default.

    On a CPU a given size is lowered to ``fit``: the system kills a process that takes too much
    memory. A GPU raises an error instead, so its size stays.
    """
    size = given or min(fit, MOST.get(device.type, 64))
    if device.type == "cpu" and size > fit:
        _LOG.warning("A batch of %d does not fit in memory; the next ones have %d.", size, fit)
        return fit
    return size


def rows_that_fit(model: Classifier, image: Tensor, available: float) -> int:
    """How many rows fit in ``available`` bytes, for a model on the device of an image (3, H, W)."""
    pixels = STATE * image.nbytes
    if 2 * pixels > USED * available:
        return 1
    graph = GRAPH * max(_saved(model, image, 2) - _saved(model, image, 1), 0)
    return max(1, int(min(USED * available / (pixels + graph), 2**20)))


def _saved(model: Classifier, image: Tensor, rows: int) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would keep its own graph

    points = image.expand(rows, -1, -1, -1).clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        model(points)
    return sum(found.values())


def available_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate; infinite if the system does not report them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    return min(_of_machine(), *(_of_group(*names) for names in _GROUPS))


def _of_machine() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (OSError, ValueError, AttributeError):  # another system than Linux or macOS
        return float("inf")


def _of_group(limit: str, usage: str, cache: str) -> float:
    root = Path("/sys/fs/cgroup")
    try:
        most, used = (float((root / name).read_text()) for name in (limit, usage))
        stat = (root / limit).with_name("memory.stat").read_text()
        freed = dict(line.split() for line in stat.splitlines()).get(cache, "0")
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return float("inf")
    return max(most - used + float(freed), 0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports a lack of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def smaller(size: int, *, least: int = 1) -> int:
    """Half a batch size that did not fit in memory. Raises ModelError if there is none."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size <= least:
        raise ModelError(
            f"Memory does not suffice for a batch of {size}. Free some, use a device that has "
            "more, or attack smaller images (surface 'model')."
        )
    half = max(size // 2, least)
    _LOG.warning("A batch of %d does not fit in memory; the next ones have %d.", size, half)
    return half


def halving(work: Callable[[int], T], size: int, *, least: int = 1) -> tuple[T, int]:
    """Call ``work`` with ``size``, and with half of it again while memory does not suffice.

    Returns the result of ``work`` and the size that fits. Raises ModelError if none fits.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:  # several kinds say that memory did not suffice
            if not is_out_of_memory(error):
                raise
        size = smaller(size, least=least)


_PACKAGES = ("mmtard-bench", "torch", "open_clip_torch", "pyautoattack", "torchattacks", "datasets")


def describe(device: torch.device, batch_size: int, processes: int = 1) -> Environment:
    """The environment for a record: this process, one of ``processes`` that are alike."""
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

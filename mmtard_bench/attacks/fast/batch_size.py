"""How many rows go through a model at once: as many as fit in memory, up to where more gain little.

No size is tried out: a pass of one image and one of two say what a row needs. What does not fit
all the same is done again in smaller batches.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Classifier, T
from mmtard_bench.errors import ModelError

MOST = {"cpu": 64, "cuda": 512}
"""Rows get hardly cheaper beyond."""
STATE = 16
"""Copies of an image that a search keeps of a row, with those that a step makes."""
GRAPH = 2
"""What a pass needs, over the activations that its backward pass looks at."""
USED = 0.6
"""The share of the available memory that rows may take: images and results need some, too."""

_SIGNS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "CUDA out of memory",
    "_STATUS_ALLOC_FAILED",
)
"""Parts of the texts of RuntimeError where memory did not suffice."""

_LOG = logging.getLogger(__name__)
_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""The limit and the use of memory of a Linux container: of control groups version 2, and 1."""


def batch_size_of(given: int | None, fit: int, device: torch.device) -> int:
    """The batch size where so many rows fit: as it is given, or chosen if it is None.

    One that is given is lowered on a CPU alone: there a process that takes too much is killed, and
    a GPU says that it does.
    """
    size = given or min(fit, MOST.get(device.type, 64))
    if device.type == "cpu" and size > fit:
        _LOG.warning("A batch of %d does not fit in memory: going on with %d.", size, fit)
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
    """Bytes that this process can still take; infinite where the system does not say."""
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
    """Whether an exception says that memory did not suffice."""
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
    _LOG.warning("A batch of %d does not fit in memory: going on with %d.", size, half)
    return half


def halving(work: Callable[[int], T], size: int, *, least: int = 1) -> tuple[T, int]:
    """What ``work`` gives with the first batch size that fits, from ``size`` down, and that size.

    Raises ModelError if none does.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:  # several kinds say that memory did not suffice
            if not is_out_of_memory(error):
                raise
        size = smaller(size, least=least)

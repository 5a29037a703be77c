"""What a run is made with. None of it changes a verdict."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mmtard_bench.processes import ALONE, Processes


@dataclass(frozen=True)
class Resources:
    """A device, and how it is used.

    Without a ``batch_size`` it is what fits in memory, up to where more gain little. ``workers``
    threads decode images while the attack runs (as many as fit if None, none for 0). Of several
    ``processes`` each works on its share.
    """

    device: torch.device
    batch_size: int | None = None
    workers: int | None = None
    processes: Processes = ALONE


@contextmanager
def full_float32() -> Iterator[None]:
    """Whatever the caller set: float32 passes, not rounded to TF32 or by autocast, with gradients.

    An application may call from under ``torch.autocast``, ``no_grad`` or ``inference_mode``.
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

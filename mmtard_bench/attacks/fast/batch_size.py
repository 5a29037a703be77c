"""How many rows should go through a model at once."""

import time

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Classifier

SIZES = {"cpu": (16, 32, 64, 128), "cuda": (16, 32, 64, 128, 256, 512, 1024)}
GAIN = 0.95
"""A larger batch must make rows cheaper by this factor to be worth its memory."""
STATE = 16
"""Copies of an image that a search keeps of a row."""


def find_batch_size(model: Classifier, image: Tensor) -> int:
    """The batch size from which on rows get no cheaper, or no longer fit in a GPU's memory.

    ``image`` is (3, H, W), on the device that the model is on.
    """
    best, least = 1, float("inf")
    for size in SIZES.get(image.device.type, (64,)):
        try:
            seconds = _seconds(model, image.expand(size, -1, -1, -1)) / size
        except torch.OutOfMemoryError:
            break
        if seconds > GAIN * least or not _fits(image, size):
            break
        best, least = size, seconds
    return best


def _seconds(model: Classifier, images: Tensor) -> float:
    """Of a forward and a backward pass, the second time."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        points = images.clone().requires_grad_()
        logits = model(points)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), points, allow_unused=True)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - started
    return seconds


def _fits(image: Tensor, size: int) -> bool:
    if not image.is_cuda:
        return True
    needed = torch.cuda.max_memory_reserved(image.device) + STATE * size * image.nbytes
    return needed <= 0.8 * torch.cuda.get_device_properties(image.device).total_memory

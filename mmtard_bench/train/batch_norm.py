"""Batch normalisation over the global batch, whatever the number of processes.

torch.nn.SyncBatchNorm does the same on GPUs only, and a run must not depend on where it runs.
"""

import torch
import torch.distributed.nn.functional as distributed
from torch import Tensor, nn

from mmtard_bench.errors import InputError


class GlobalBatchNorm(nn.BatchNorm2d):
    """As ``nn.BatchNorm2d``, with the statistics of all processes' (N, C, H, W), N equal on each.

    Gradients flow through the sums, so that their mean over processes is that of one process.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # Statistics in full precision, as every implementation of it keeps them.
        images = input.float()
        mean = _mean_over_processes(images.mean((0, 2, 3)))
        centred = images - mean[:, None, None]
        variance = _mean_over_processes(centred.square().mean((0, 2, 3)))
        processes = torch.distributed.get_world_size()
        self._remember(mean, variance, processes * input.numel() // input.shape[1])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def _mean_over_processes(values: Tensor) -> Tensor:
    total: Tensor = distributed.all_reduce(values)  # type: ignore[no-untyped-call]
    return total / torch.distributed.get_world_size()


def normalises_over_batch(module: nn.Module) -> bool:
    """Whether there is batch normalisation of any kind in a module."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def synchronise(module: nn.Module) -> None:
    """Replace every ``nn.BatchNorm2d`` below a module, sharing parameters and statistics.

    Raises InputError for batch normalisation of another kind, which may do more than normalise.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and type(child) is not nn.BatchNorm2d:
            raise InputError(
                f"The student's layer {type(child).__name__} cannot be trained by several "
                "processes: its statistics would be of each one's images. Use one process."
            )
        if isinstance(child, nn.BatchNorm2d):
            norm = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, norm)
        else:
            synchronise(child)

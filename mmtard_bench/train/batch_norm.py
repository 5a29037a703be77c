"""Batch normalisation over the global batch, for any number of processes.

torch.nn.SyncBatchNorm does this on GPUs only. Here the result does not depend on the device.
"""

import torch
import torch.distributed.nn.functional as distributed
from torch import Tensor, nn

from mmtard_bench.errors import InputError


class GlobalBatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with statistics over the inputs (N, C, H, W) of all processes.

    N is the same in every process. Gradients flow through the sums, so that the mean of the
    processes' gradients equals the gradient of a single process.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # Statistics are computed in float32, as in other implementations.
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
    """Whether a module contains batch normalisation of any kind."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def synchronise(module: nn.Module) -> None:
    """Replace every ``nn.BatchNorm2d`` inside a module by ``GlobalBatchNorm``, in place.

    The new layers share the parameters and running statistics of the old ones.

    Raises:
        InputError: For batch normalisation of another class, which may do more than normalise.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and type(child) is not nn.BatchNorm2d:
            raise InputError(
                f"The student's layer {type(child).__name__} cannot be trained by several "
                "processes: each process would normalise by its own images. Use one process."
            )
        if isinstance(child, nn.BatchNorm2d):
            norm = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, norm)
        else:
            synchronise(child)

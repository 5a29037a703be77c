"""``torchattacks.CW`` with a c of its own for every sample, and three of its flaws mended."""

import contextlib
import io

import torch
import torchattacks
from torch import Tensor, nn

from mmtard_bench.attacks.base import margin


class _Quiet(Tensor):
    """A tensor whose value as a number is always 0, and so never rises."""

    def item(self) -> int:
        return 0


class WeightedCW(torchattacks.CW):  # type: ignore[misc]  # untyped third party
    """``torchattacks.CW`` with a c of its own for every sample.

    Three of its pieces would make models look robust. Its arctanh is infinite at pixels of exactly
    0 or 1, which could then never move; here they start slightly inside the box. Its margin masks
    classes by multiplying their logits with zero, which is wrong as soon as logits are negative.
    And it gives up on the whole batch as soon as the summed cost rises, which a single sample with
    a large c brings about; here the cost that it compares stays silent.
    """

    def __init__(self, model: nn.Module, c: Tensor, *, steps: int, lr: float) -> None:
        # It complains on stdout about models whose parameters it does not see.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(model, c=1, kappa=0, steps=steps, lr=lr)
        self.sample_c = c
        self.set_device(c.device)

    def f(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weighted = self.sample_c * margin(outputs, labels).clamp_min(0)
        return weighted.as_subclass(_Quiet)

    def inverse_tanh_space(self, x: Tensor) -> Tensor:
        return torch.atanh((2 * x - 1) * 0.999)

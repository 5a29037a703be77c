"""The model for the searches of the fast engine: passes, precision and time."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Classifier, Precision, T


class Passes:
    """Forward and backward passes through a classifier, and the seconds they took.

    With a lower ``precision`` they run under autocast; ``confirm`` runs in float32.
    """

    def __init__(self, model: Classifier, device: torch.device, precision: Precision) -> None:
        self.model = model
        self.device = device
        self.lower = precision != "float32"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @torch.no_grad()
    def logits(self, points: Tensor) -> Tensor:
        """Logits (N, C) of points (N, 3, H, W), without a graph."""
        return self._timed(lambda: self._model(points))

    def gradient(
        self, points: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, C), the loss of each row (N,), and its gradient by the points."""

        def work() -> tuple[Tensor, Tensor, Tensor]:
            leaf = points.detach().requires_grad_()
            with torch.enable_grad():
                logits = self._model(leaf)
                losses = loss(logits)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            return logits.detach(), losses.detach(), gradient

        return self._timed(work)

    @torch.no_grad()
    def confirm(self, points: Tensor, labels: Tensor) -> Tensor:
        """Whether the classifier in float32 agrees that points are misclassified, (N,)."""
        return self._timed(lambda: self.model(points).argmax(1) != labels)

    def take_seconds(self) -> float:
        """Seconds in the model since the last call; on a GPU those of the GPU."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _model(self, points: Tensor) -> Tensor:
        if not self.lower:
            return self.model(points)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(points).float()

    def _timed(self, work: Callable[[], T]) -> T:
        # A clock on the host would measure how fast a GPU's queue is filled.
        if self.device.type == "cuda":
            start, end = _event(), _event()
            start.record()
            result = work()
            end.record()
            self._events.append((start, end))
            return result
        started = time.perf_counter()
        result = work()
        self._seconds += time.perf_counter() - started
        return result


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

"""The classifier that attacks get: it counts passes and detects NaN."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmtard_bench.errors import ModelError
from mmtard_bench.tasks.classifier import ZeroShotClassifier


class Watched(nn.Module):
    """Counts passes and records whether logits and gradients were finite.

    With NaN, an attack could count a wrong answer as correct, or never move; both would look
    robust. ``require_finite`` reads the result once per batch, so that no step waits for the
    device. ``passes`` counts images in forward passes plus images in backward passes; ``beat`` is
    called after each forward pass.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.passes = 0
        self.beat: Callable[[], None] = lambda: None

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self._hooked(images))
        self._require_gradient(images, logits)
        return self._seen(logits)

    def require_finite(self) -> None:
        """Raise ModelError if a logit or a gradient was not finite."""
        if not self.finite:
            raise ModelError(
                "The model returned NaN or infinite logits or gradients while it was attacked."
            )

    def _require_gradient(self, images: Tensor, answers: Tensor) -> None:
        if torch.is_grad_enabled() and images.requires_grad and not answers.requires_grad:
            raise ModelError(
                "No gradient reaches the pixels, so that attacks by gradients cannot work: "
                "encode_image runs under torch.no_grad or torch.inference_mode, detaches its "
                "answer, or leaves torch. Let it be differentiable; parameters may stay frozen."
            )

    def _hooked(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.clone()
            images.register_hook(self._look)  # type: ignore[no-untyped-call]
        return images

    def _seen(self, answer: Tensor) -> Tensor:
        self._look(answer.detach())
        self.beat()
        return answer

    def _look(self, values: Tensor) -> None:
        self.passes += len(values)
        self.finite = self.finite & torch.isfinite(values).all()


class WatchedPrompts(Watched):
    """The same for a zero-shot classifier, with its text side; a ``PromptedClassifier``."""

    model: ZeroShotClassifier

    def __init__(self, model: ZeroShotClassifier, device: torch.device) -> None:
        super().__init__(model, device)
        self.names = model.names
        self.prompts_a_name = model.prompts_a_name
        self.head = model.head

    def features(self, images: Tensor) -> Tensor:
        features = self.model.features(self._hooked(images))
        self._require_gradient(images, features)
        return self._seen(features)

    def embed_names(self, names: Sequence[str], *, keep: bool = False) -> Tensor:
        return self._seen(self.model.embed_names(names, keep=keep))


def require_logits(logits: Tensor, *, rows: int, classes: int) -> None:
    """Raise ModelError unless logits are finite and (rows, classes)."""
    if tuple(logits.shape) != (rows, classes):
        raise ModelError(
            f"The model returned logits of shape {tuple(logits.shape)} for {rows} images and "
            f"{classes} classes; expected ({rows}, {classes})."
        )
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(1).sum())
        raise ModelError(
            f"The model returned NaN or infinite logits for {bad} of {rows} images; expected "
            "finite numbers. Check its weights and precision."
        )

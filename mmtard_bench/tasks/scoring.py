"""The metric of zero-shot classification: verdicts by a new float32 pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.errors import shown
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.schema import Flag
from mmtard_bench.tasks.classifier import ZeroShotClassifier, embed_names
from mmtard_bench.tasks.prompts import require_distinct
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.watched import Watched, WatchedPrompts, require_logits


@dataclass(frozen=True)
class Verdict:
    """The result of a new pass for one image.

    In retrieval ``rank`` is that of the image's best caption, and ``embedding`` is the image
    embedding: float32 bytes in hexadecimal.
    """

    right: bool
    prediction: int
    rank: int | None = None
    embedding: str = ""


@dataclass(frozen=True)
class Aim:
    """Samples of a batch that are attacked together.

    The attack gets ``classifier``. ``places`` are the positions of the samples in the batch, and
    ``labels`` (N,) are their correct columns of the classifier.
    """

    classifier: Watched
    places: list[int]
    labels: Tensor


class ZeroShotScorer:
    """Zero-shot classification. Raises ModelError for different classes with equal tokens.

    Classes with the same name share a column: two equal columns would make the margin zero for
    every image, and attacks on the margin would not move. The prediction is the lowest label of a
    name.

    ``classifier`` and ``labels`` (N,), its correct columns, are for checks of the model.
    ``ranked``: whether verdicts have ranks, so that every image needs a new pass after an attack.
    """

    ranked = False

    def __init__(self, clip: Clip, data: TaskData, device: torch.device) -> None:
        require_distinct(clip, data)
        self.clip = clip
        names = tuple(dict.fromkeys(data.classes))
        column = {name: place for place, name in enumerate(names)}
        self.classifier = ZeroShotClassifier(clip, names, data.templates, device)
        self.columns = len(names)
        self.labels = torch.tensor([column[data.classes[i]] for i in data.labels], device=device)
        self._classes = torch.tensor(data.labels, device=device)
        self._predicted = torch.tensor([data.classes.index(name) for name in names], device=device)

    def doubts(self) -> list[Flag]:
        """The flags of the text side."""
        return check_head(self.classifier.head, self.classifier.names)

    def aims(self, rows: Sequence[int]) -> list[Aim]:
        """The classifier for attacks on the images of these rows: one for all."""
        watched = WatchedPrompts(self.classifier, self.labels.device)
        return [Aim(watched, list(range(len(rows))), self.labels[rows])]

    @torch.no_grad()
    def judge(
        self, images: Tensor, rows: Sequence[int], *, size: int, names: Sequence[str | None] = ()
    ) -> list[Verdict]:
        """Verdicts by a new float32 pass over the images of some rows, ``size`` at a time.

        A name in ``names`` that is not None replaces the class name of its row. It is encoded
        again, independently of the attack. Raises ModelError for unusable output.
        """
        features = [self.classifier.features(part) for part in torch.split(images, size)]
        logits = torch.cat([part @ self.classifier.head.T for part in features])
        labels = self.labels[rows]
        edited = {i: name for i, name in enumerate(names) if name is not None}
        if edited:
            places, texts = list(edited), list(edited.values())
            prompts = embed_names(self.clip, texts, self.classifier.templates, logits.device)
            logits[places, labels[places]] = (torch.cat(features)[places] * prompts).sum(1)
        require_logits(logits, rows=len(images), classes=self.columns)
        predictions = self._predicted[logits.argmax(1)]
        right = (predictions == self._classes[rows]).tolist()
        return [Verdict(*pair) for pair in zip(right, predictions.tolist(), strict=True)]


_SAME = 1e-12  # less than 1 is the cosine where embeddings differ by more than float32 rounds


_CHUNK = 1024  # rows of the head that are compared at once


def check_head(head: Tensor, names: Sequence[str]) -> list[Flag]:
    """Flag different class names with equal text embeddings (C, D)."""
    rows = F.normalize(head.double().cpu(), dim=1)
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    numbers = [first[name] for name in names]
    pairs = [
        (start + i, other)
        for start in range(0, len(rows), _CHUNK)
        for i, other in (rows[start : start + _CHUNK] @ rows.T > 1 - _SAME).nonzero().tolist()
        if numbers[start + i] < numbers[other]
    ]
    if not pairs:
        return []
    one, other = (shown(names[place]) for place in pairs[0])
    detail = (
        f"{len(pairs)} pairs of classes have different names and one text embedding, {one} and "
        f"{other} for one: the text tower does not read what differs, and which of them is "
        "predicted means nothing"
    )
    return [Flag(code="equal-class-embeddings", detail=detail)]

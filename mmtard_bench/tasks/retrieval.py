"""Retrieval between images and captions, clean and under attack.

The gallery is made of the manifest's samples alone: their images, and their distinct captions. An
image matches a caption if it has a caption of that text.

**Image to text.** The query is an image; it is answered at k if one of its captions is among the
first k of the gallery. Under attack, the query image is the adversarial one.

**Text to image.** The query is a caption; it is answered at k if an image that has it is among the
first k. Under attack, every image of the gallery is replaced by its adversarial one at once. Images
that are wrong at rank 1 on clean pixels are not attacked, as everywhere here, and stay clean.

**Ties** are lost: a non-matching item with the score of the best matching one stands before it, so
that a model which gives all pairs one score recalls nothing.

**What the figures under attack are worth.** The attack is aimed at image-to-text rank 1 and may
stop there. Image-to-text recall at 1 is attacked as accuracy is in classification. Recall at 5 and
10, and all of text-to-image, are what is left of them by those same images: upper bounds, which an
attack with that aim could lower. The more so for attacks of the reference code, which give back the
clean image where they do not succeed; PGD gives its last.

**Shared captions.** No caption of an image's own competes with it, and every other one does: images
that share some of their captions, but not all, are attacked apart from the rest.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmtard_bench.errors import ModelError
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.schema import Flag
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.scoring import Aim, Verdict
from mmtard_bench.tasks.watched import Watched, require_logits

NOTE = (
    "The attack is aimed at image-to-text rank 1: recalls under attack at 5 and 10, and from text "
    "to image, are upper bounds."
)
Own = frozenset[int]
"""The captions of an image, by their places in the gallery."""

_CHUNK = 1024  # captions whose scores with all images are in memory together


def ranks_of(scores: Tensor, matching: Tensor) -> Tensor:
    """Where the best matching item of each query stands, from 1: (Q,).

    ``scores`` and ``matching`` are (Q, G); each query needs a matching item, and scores that are
    finite. Non-matching items with the same score stand before.
    """
    best = scores.masked_fill(~matching, float("-inf")).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~matching).sum(1)


class RetrievalClassifier(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> logits (N, K): what an image attack sees of a gallery.

    A column stands for the captions of an image, and its logit is the highest of theirs, so that
    the image's own column is the highest exactly if one of its captions is at rank 1. That is what
    untargeted means here, and any attack on a classifier pursues it, with a margin or DLR loss as
    well as with cross-entropy: the loss of the best matching caption among the gallery.

    An image is attacked on a classifier whose column for it holds its captions and no other (see
    ``RetrievalScorer.aims``): that column is the highest exactly if the image is at rank 1.
    """

    def __init__(self, gallery: ZeroShotClassifier, columns: Tensor) -> None:
        super().__init__()
        self.gallery = gallery
        self.columns: Tensor
        self.register_buffer("columns", columns)
        self.count = int(columns.max()) + 1

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.gallery(images)
        merged = scores.new_full((len(scores), self.count), float("-inf"))
        return merged.scatter_reduce(1, self.columns.expand_as(scores), scores, "amax")


def apart(matches: Iterable[Sequence[int]]) -> set[Own]:
    """Those captions of an image, as a set, of which no image has some but not all."""
    every = set(map(frozenset, matches))
    owners = Counter(place for own in every for place in own)
    return {own for own in every if all(owners[place] == 1 for place in own)}


def columns_of(merged: Iterable[Own], captions: int) -> list[int]:
    """The column of each caption: those of a merged set have one, every other has its own."""
    first = {place: min(own) for own in merged for place in own}
    numbers: dict[int, int] = {}
    return [numbers.setdefault(first.get(place, place), len(numbers)) for place in range(captions)]


def fewest_columns(matches: Iterable[Sequence[int]], captions: int) -> int:
    """The least number of columns that any image of a gallery is attacked on."""
    alone = apart(matches)
    others = set(map(frozenset, matches)) - alone
    merged = sum(len(own) - 1 for own in alone)
    return captions - merged - max((len(own) - 1 for own in others), default=0)


class RetrievalScorer:
    """Ranks of images among captions, and of captions among images."""

    ranked = True

    def __init__(self, clip: Clip, data: TaskData, device: torch.device) -> None:
        self.data = data
        self.gallery = ZeroShotClassifier(clip, data.classes, data.templates, device)
        self.apart = apart(data.matches)
        self.classifier = self._classifier(self.apart)
        self.labels = self.classifier.columns[list(data.labels)]
        self.columns = self.classifier.count

    def doubts(self) -> list[Flag]:
        """Nothing: captions of one embedding tie, and ties are lost."""
        return []

    def aims(self, rows: Sequence[int]) -> list[Aim]:
        """What an attack on the images of these rows sees: one classifier for most of them.

        Images that share some of their captions with others need one for each set of captions.
        """
        groups: dict[Own | None, list[int]] = {}
        for place, row in enumerate(rows):
            own = frozenset(self.data.matches[row])
            groups.setdefault(None if own in self.apart else own, []).append(place)
        aims = []
        for shared, places in groups.items():
            classifier = self._classifier([*self.apart, shared]) if shared else self.classifier
            first = [self.data.labels[rows[place]] for place in places]
            watched = Watched(classifier, self.labels.device)
            aims.append(Aim(watched, places, classifier.columns[first]))
        return aims

    def _classifier(self, merged: Iterable[Own]) -> RetrievalClassifier:
        columns = columns_of(merged, len(self.data.classes))
        return RetrievalClassifier(
            self.gallery, torch.tensor(columns, device=self.gallery.head.device)
        )

    @torch.no_grad()
    def judge(
        self, images: Tensor, rows: Sequence[int], *, size: int, names: Sequence[str | None] = ()
    ) -> list[Verdict]:
        """As ``ZeroShotScorer.judge``; the prediction is the place of the caption ranked first.

        It is the label where that caption matches. Captions have no class names: ``names`` that
        are not None raise ModelError.
        """
        if any(name is not None for name in names):
            raise ModelError("The attack edited class names, of which retrieval has none.")
        features = torch.cat([self.gallery.features(part) for part in torch.split(images, size)])
        scores = features @ self.gallery.head.T
        require_logits(scores, rows=len(images), classes=len(self.data.classes))
        matching = self._matching(rows)
        ranks = ranks_of(scores, matching).tolist()
        others = scores.masked_fill(matching, float("-inf")).argmax(1).tolist()
        return [
            Verdict(rank == 1, self.data.labels[row] if rank == 1 else other, rank, _pack(feature))
            for row, rank, other, feature in zip(rows, ranks, others, features, strict=True)
        ]

    def caption_ranks(
        self, embeddings: Mapping[str, tuple[str, str]]
    ) -> dict[str, tuple[tuple[int, int, int], ...]]:
        """For each sample its captions: (place in the gallery, clean rank, adversarial rank).

        ``embeddings`` are those of each sample's clean and adversarial image, by its id.
        """
        ids = self.data.manifest.ids
        ranks = [
            self._text_to_image(_unpack([embeddings[name][which] for name in ids], self.gallery))
            for which in (0, 1)
        ]
        return {
            name: tuple((place, ranks[0][place], ranks[1][place]) for place in own)
            for name, own in zip(ids, self.data.matches, strict=True)
        }

    def _text_to_image(self, features: Tensor) -> list[int]:
        matching = self._matching(range(len(features))).T
        heads, owners = (torch.split(t, _CHUNK) for t in (self.gallery.head, matching))
        parts = zip(heads, owners, strict=True)
        return [rank for head, own in parts for rank in ranks_of(head @ features.T, own).tolist()]

    def _matching(self, rows: Sequence[int]) -> Tensor:
        """Which captions each row matches: (N, G), bool."""
        pairs = [(i, place) for i, row in enumerate(rows) for place in self.data.matches[row]]
        matching = torch.zeros(len(rows), len(self.data.classes), dtype=torch.bool)
        matching[tuple(zip(*pairs, strict=True))] = True
        return matching.to(self.labels.device)


def _pack(feature: Tensor) -> str:
    return feature.cpu().numpy().tobytes().hex()


def _unpack(packed: Sequence[str], like: ZeroShotClassifier) -> Tensor:
    data = bytearray.fromhex("".join(packed))
    flat = torch.frombuffer(data, dtype=torch.float32)
    return flat.view(len(packed), -1).to(like.head.device)

"""Retrieval between images and captions, clean and under attack.

The gallery holds the images and the distinct captions of the manifest's samples. An image matches a
caption if one of its own captions has the same text.

**Image to text.** The query is an image. It counts for recall at k if one of its captions is among
the first k captions of the gallery. Under attack, the query is the adversarial image.

**Text to image.** The query is a caption. It counts for recall at k if a matching image is among
the first k images. Under attack, all images of the gallery are adversarial at once. As in
classification, an image whose clean answer at rank 1 is wrong is not attacked and stays clean.

**Ties** count against the model: a non-matching item with the same score ranks before the matching
one. A model that gives one score to all pairs therefore has recall 0.

**What the figures under attack mean.** The attack lowers image-to-text recall at 1, as it lowers
accuracy in classification, and may stop there. Recall at 5 and 10 and all text-to-image recalls are
measured on the same adversarial images. They are upper bounds: an attack on them would lower them
further, above all where attacks of the reference code return the clean image of a sample that they
do not break (PGD returns its last image).

**Shared captions.** An image's own captions never compete with each other; all other captions do.
Images that share some captions, but not all, are therefore attacked separately.
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
"""The captions of an image, by their indices in the gallery."""

_CHUNK = 1024  # captions whose scores with all images are in memory together


def ranks_of(scores: Tensor, matching: Tensor) -> Tensor:
    """The rank of the best matching item of each query, from 1: (Q,).

    ``scores`` and ``matching`` are (Q, G). Each query needs a matching item and finite scores.
    Non-matching items with the same score rank before it.
    """
    best = scores.masked_fill(~matching, float("-inf")).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~matching).sum(1)


class RetrievalClassifier(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> logits (N, K): a gallery as a classifier, for attacks.

    A column holds the captions of one image; its logit is the highest score among them. The
    column of an image is therefore the highest exactly if one of its captions is at rank 1, and any
    untargeted attack on a classifier (cross-entropy, margin or DLR loss) attacks recall at 1.

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
    """The sets of captions that images share completely or not at all."""
    every = set(map(frozenset, matches))
    owners = Counter(place for own in every for place in own)
    return {own for own in every if all(owners[place] == 1 for place in own)}


def columns_of(merged: Iterable[Own], captions: int) -> list[int]:
    """The column of each caption: captions of a merged set share one, others have their own."""
    first = {place: min(own) for own in merged for place in own}
    numbers: dict[int, int] = {}
    return [numbers.setdefault(first.get(place, place), len(numbers)) for place in range(captions)]


def fewest_columns(matches: Iterable[Sequence[int]], captions: int) -> int:
    """The smallest number of columns of the classifiers for the images of a gallery."""
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
        """No flags: captions with equal embeddings tie, and ties count against the model."""
        return []

    def aims(self, rows: Sequence[int]) -> list[Aim]:
        """The classifiers for attacks on the images of these rows: one for most of them.

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
        """As ``ZeroShotScorer.judge``; the prediction is the index of the caption at rank 1.

        If that caption matches the image, the prediction is the label. Captions have no class
        names: ``names`` other than None raise ModelError.
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
        """For each sample its captions: (index in the gallery, clean rank, adversarial rank).

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

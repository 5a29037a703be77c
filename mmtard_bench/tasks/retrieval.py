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

**Shared captions.** Recall at 1 is an upper bound, too, where images share captions and have others
besides: of A {x, common} and B {y, common} the attack on A may not aim at y, though y above x and
common would lose rank 1. A record's note says how many images this concerns. Where images have one
caption each, as on the digits, there are none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.checks import ModelError, require_logits
from mmtard_bench.attacks.watched import Watched
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.resolve import TaskData
from mmtard_bench.tasks.scoring import Verdict
from mmtard_bench.tasks.zero_shot import ZeroShotClassifier

NOTE = (
    "The attack is aimed at image-to-text rank 1: recalls under attack at 5 and 10, and from text "
    "to image, are upper bounds."
)
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

    Images that share a caption share a column, with the captions of them all: no caption of an
    image's own may compete with it. An image whose column is not the highest is not at rank 1; the
    reverse may fail where its column has captions that it lacks (``sheltered``): the verdict is
    the rank's, but the attack does not aim at those.
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


def columns_of(matches: Sequence[Sequence[int]], captions: int) -> list[int]:
    """The column of each caption: captions that images share, directly or by others, have one."""
    parent = list(range(captions))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for own in matches:
        for place in own[1:]:
            parent[root(place)] = root(own[0])
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(place), len(numbers)) for place in range(captions)]


def sheltered(matches: Sequence[Sequence[int]], columns: Sequence[int]) -> int:
    """How many images have a column with captions that are not theirs: no attack aims at those."""
    sizes = Counter(columns)
    return sum(sizes[columns[own[0]]] > len(own) for own in matches)


def notes_on(matches: Sequence[Sequence[int]], captions: int) -> list[str]:
    """What a record must say about recalls under attack."""
    count = sheltered(matches, columns_of(matches, captions))
    if not count:
        return [NOTE]
    return [
        NOTE,
        f"{count} of {len(matches)} images share captions with images that have others besides. "
        "The attack does not aim at those others, so recall at 1 under attack is an upper bound, "
        "too.",
    ]


class RetrievalScorer:
    """Ranks of images among captions, and of captions among images."""

    ranked = True

    def __init__(self, clip: Clip, data: TaskData, device: torch.device) -> None:
        self.data = data
        self.gallery = ZeroShotClassifier(clip, data.classes, data.templates, device)
        columns = torch.tensor(columns_of(data.matches, len(data.classes)), device=device)
        self.classifier = RetrievalClassifier(self.gallery, columns)
        self.labels = columns[list(data.labels)]
        self.columns = self.classifier.count

    def watched(self) -> Watched:
        """The classifier for an attack."""
        return Watched(self.classifier, self.labels.device)

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

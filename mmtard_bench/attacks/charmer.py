"""Character-level attacks on class names, after Charmer (Abad Rocamora et al., 2024, ICML).

For each image the attacker may make up to k edits (insert, delete or replace a character) of the
name of its true class. Every template gets the edited name; all other prompts stay. The sample is
broken if the image is then misclassified. The edited name may not be that of another class.

The first edit is exhaustive: candidates do not depend on the image, so all of them are encoded, and
the one with the lowest logit is the exact worst case over the alphabet. Each further edit is
greedy, as Charmer: from each of the best few names so far, places are ranked by the logit that a
test character (a space, or nothing where a space stands) leaves there, and every character is tried
at the best of them. A larger k begins with the search of the smaller, so that it is never weaker.

Alphabet, test character and the number of places are those of LEAF's evaluation (Abad Rocamora et
al., 2025, "Robustness in Both Domains: CLIP Needs a Robust Text Encoder"; ``utils_attacks.py`` and
``eval_zero_shot_text.py`` of its repository). What LEAF calls "constrained" is more: there an
attacked text must have fewer words of an English dictionary than the text, so that no new word
arises. No dictionary is used here. LEAF's search is greedy from the first edit on and keeps one
sentence.

``forward`` counts, for each sample, its image's passes and the prompts that were scored for it, as
if it were alone; prompts that several samples share are in fact encoded once.
"""

import re
import string
from collections.abc import Iterable, Mapping, Set as AbstractSet
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Attack, AttackResult, PromptedClassifier, Work
from mmtard_bench.errors import InputError
from mmtard_bench.records.edits import plain
from mmtard_bench.registry import register_attack
from mmtard_bench.types import ThreatModel

ALPHABET = (
    string.ascii_lowercase + " " + string.ascii_uppercase + string.digits + string.punctuation
)
"""What may be inserted, or replace a character: printable ASCII."""

PLACES = 20
PARENTS = 5
_TEST = " "


def places(name: str) -> range:
    """Positions of one edit: 2i inserts before character i (or at the end), 2i + 1 replaces it."""
    return range(2 * len(name) + 1)


def edited(name: str, place: int, character: str) -> str:
    """Insert a character, or replace one; an empty ``character`` deletes it."""
    i = place // 2
    return name[:i] + character + name[i + place % 2 :]


def edits_at(name: str, place: int, alphabet: str) -> list[str]:
    """The names after one edit at a position, without the name itself."""
    characters = [*alphabet] if place % 2 == 0 else ["", *alphabet]
    return [new for c in characters if (new := edited(name, place, c)) != name]


def _probe(name: str, place: int) -> str:
    test = edited(name, place, _TEST)
    return test if test != name else edited(name, place, "")


@dataclass(frozen=True)
class Found:
    """The worst name that the search found for each of N images.

    ``logits`` (N, C) and the head's ``rows`` (N, D) are those with this name. ``names`` has None
    where no edit is worse than the original name. ``prompts`` counts the scored prompts.
    """

    names: list[str | None]
    rows: Tensor
    logits: Tensor
    prompts: list[int]


@dataclass(frozen=True)
class Neighbours:
    """Names and their rows of the head, (M, D)."""

    names: list[str]
    rows: Tensor


@torch.no_grad()
def worst_names(
    model: PromptedClassifier,
    features: Tensor,
    labels: Tensor,
    *,
    edits: int,
    alphabet: str = ALPHABET,
) -> Found:
    """Search names within ``edits`` edits for the lowest true logit; see the module.

    ``features`` (N, D) are ``model.features`` of the images, ``labels`` (N,). An image that is
    misclassified after an edit leaves the search.
    """
    logits = features @ model.head.T
    rows = model.head[labels].clone()
    names: list[str | None] = [None] * len(labels)
    prompts = [0] * len(labels)
    first: dict[int, Neighbours] = {}
    every = [plain(name) for name in model.names]
    for i, (feature, label) in enumerate(zip(features, labels.tolist(), strict=True)):
        own = model.names[label]
        taken = {name for j, name in enumerate(every) if j != label}
        parents = [own]
        for step in range(edits):
            if step and int(logits[i].argmax()) != label:
                break
            if step == 0:
                if label not in first:
                    where = {own: places(own)}
                    first[label] = _neighbours(model, where, taken, alphabet, keep=True)
                around = first[label]
            else:
                chosen = {parent: _best_places(model, feature, parent) for parent in parents}
                prompts[i] += sum(len(places(parent)) for parent in parents) * model.prompts_a_name
                around = _neighbours(model, chosen, taken, alphabet)
            if not around.names:
                break
            prompts[i] += len(around.names) * model.prompts_a_name
            scores = around.rows @ feature
            best = int(scores.argmin())
            if scores[best] < logits[i, label]:
                logits[i, label] = scores[best]
                names[i], rows[i] = around.names[best], around.rows[best]
            order = scores.argsort(stable=True)[: 4 * PARENTS].tolist()
            parents = list(dict.fromkeys(around.names[j] for j in order))[:PARENTS]
    return Found(names, rows, logits, prompts)


def _neighbours(
    model: PromptedClassifier,
    chosen: Mapping[str, Iterable[int]],
    taken: AbstractSet[str],
    alphabet: str,
    *,
    keep: bool = False,
) -> Neighbours:
    """The names after one edit at the given positions, except names of other classes."""
    names: list[str] = []
    rows = [model.head[:0]]
    for parent, where in chosen.items():
        for place in where:
            # A name that two places make is scored twice: lists of a place are kept, and met again
            # with other images.
            made = edits_at(parent, place, alphabet)
            new = [name for name in made if plain(name) not in taken]
            if new:
                names += new
                rows.append(model.embed_names(new, keep=keep))
    return Neighbours(names, torch.cat(rows))


def _best_places(model: PromptedClassifier, feature: Tensor, parent: str) -> list[int]:
    """The positions at which a test character lowers the true logit most."""
    probes = model.embed_names([_probe(parent, place) for place in places(parent)])
    kept = (probes @ feature).topk(min(PLACES, len(probes)), largest=False)
    chosen: list[int] = kept.indices.tolist()
    return chosen


def edits_of(threat: ThreatModel) -> int:
    """The k in the name of an attack."""
    match = re.search(r"-k([0-9]+)", threat.attack)
    assert match is not None
    return int(match[1])


def described(edits: int) -> dict[str, str | int | float]:
    """The search's parameters, for a record."""
    return {"edits": edits, "alphabet": ALPHABET, "places": PLACES, "parents": PARENTS}


@register_attack("text-charmer-k{edits}")
def build_text(threat: ThreatModel, n_classes: int) -> Attack:
    """Edits of the class name: the first exhaustive, further ones greedy as Charmer's."""
    edits = edits_of(threat)
    if threat.norm != "levenshtein" or str(threat.eps) != f"{edits}/1":
        raise InputError(
            f"{threat.attack} edits a class name: expected the norm levenshtein and eps "
            f"{edits}/1; {threat.norm} {threat.eps} was given."
        )

    def run(work: Work) -> AttackResult:
        labels = work.labels
        prompted = cast("PromptedClassifier", work.model)
        with torch.no_grad():
            features = prompted.features(work.images)
        found = worst_names(prompted, features, labels, edits=edits)
        broken = (found.logits.argmax(1) != labels).tolist()
        # Where no edit is worse than none, the name itself is the worst within the budget: a noisy
        # model, or a borderline sample, may be wrong with it in this pass.
        own = (prompted.names[label] for label in labels.tolist())
        names = [
            name or same if b else name
            for b, name, same in zip(broken, found.names, own, strict=True)
        ]
        return AttackResult(
            adversarial=work.images,
            broken_by=[threat.attack if b else None for b in broken],
            forward=[1 + count for count in found.prompts],
            backward=[0] * len(broken),
            names=names,
        )

    return Attack(threat.attack, described(edits), run, edits=edits)

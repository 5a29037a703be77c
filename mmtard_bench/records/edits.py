"""Edits of a class name, as records keep them and as anybody can check them."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmtard_bench.schema import Strict

ClassName = Annotated[str, Field(max_length=1000)]
"""So short that anybody's record can be checked: the distance takes time by both lengths."""


class NameEdit(Strict):
    """The name of a sample's class, and what an attack made of it; templates stay as they are."""

    original: ClassName
    adversarial: ClassName

    @property
    def distance(self) -> int:
        """The number of edits between the two."""
        return levenshtein(self.original, self.adversarial)

    def within(self, edits: int) -> bool:
        """Whether the two are at most so many edits apart; lengths alone may tell."""
        if abs(len(self.original) - len(self.adversarial)) > edits:
            return False
        return self.distance <= edits


def levenshtein(one: str, other: str) -> int:
    """The least number of characters to insert, delete or replace (Levenshtein, 1966).

    By the recurrence of Wagner and Fischer (1974), which shares nothing with the way in which
    attacks make their candidates.
    """
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def names_another_class(names: Sequence[str], label: int, name: str) -> bool:
    """Whether a name is one of another class, letter case and spaces aside.

    An edit that turns "cat" into "car" where both are classes is no misspelling but an answer.
    """
    return any(plain(other) == plain(name) for i, other in enumerate(names) if i != label)


def plain(name: str) -> str:
    """A name without what most tokenizers do not see: letter case, and spaces but single ones."""
    return " ".join(name.casefold().split())

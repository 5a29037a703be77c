"""Edits of a class name, as records store them; everybody can check them."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmtard_bench.schema import Strict

ClassName = Annotated[str, Field(max_length=1000)]
"""The length is limited because computing a distance takes time in proportion to both lengths."""


class NameEdit(Strict):
    """The name of a sample's class before and after an attack; templates do not change."""

    original: ClassName
    adversarial: ClassName

    @property
    def distance(self) -> int:
        """The number of edits between the two names."""
        return levenshtein(self.original, self.adversarial)

    def within(self, edits: int) -> bool:
        """Whether at most ``edits`` edits separate the two names."""
        # A difference in length is a lower bound of the distance, and faster to compute.
        if abs(len(self.original) - len(self.adversarial)) > edits:
            return False
        return self.distance <= edits


def levenshtein(one: str, other: str) -> int:
    """The smallest number of characters to insert, delete or replace (Levenshtein, 1966).

    The recurrence is that of Wagner and Fischer (1974). It shares no code with the attacks, which
    generate candidates instead.
    """
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def names_another_class(names: Sequence[str], label: int, name: str) -> bool:
    """Whether a name equals that of another class, apart from letter case and spaces.

    If "cat" and "car" are both classes, an edit from one to the other changes the class instead of
    misspelling it.
    """
    return any(plain(other) == plain(name) for i, other in enumerate(names) if i != label)


def plain(name: str) -> str:
    """A name in lower case with single spaces: most tokenizers ignore these differences."""
    return " ".join(name.casefold().split())

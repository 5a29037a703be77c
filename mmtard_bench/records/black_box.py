"""The check of a record by an attack without gradients, and the test of its result.

An attack by gradients can be misled. Square is not: it only reads the answers (Andriushchenko et
al., 2020). Imports without torch.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mmtard_bench.schema import Strict

HONEST = 0.02
"""The share of an honest model's robust samples that Square may break; measured: 1% at most."""
LEVEL = 1e-3
"""The highest probability that a model with this share gets the flag for one record."""
FEWEST = 50
"""Records with fewer samples are not checked: their intervals are wider than what it could find."""


class BlackBox(Strict):
    """``attack`` broke ``broken`` of ``drawn`` samples that the record calls robust."""

    attack: Annotated[str, Field(pattern=r"^square-[1-9][0-9]{0,5}$")]
    drawn: Annotated[int, Field(ge=0, le=2**53)]
    broken: Annotated[int, Field(ge=0, le=2**53)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.broken > self.drawn:
            raise ValueError(f"{self.broken} of {self.drawn} samples are broken")
        return self

    @property
    def beats_gradients(self) -> bool:
        """Whether more samples are broken than an honest model explains (binomial test)."""
        from scipy.special import bdtrc  # slow to import, and reading a record needs no test

        p = float(bdtrc(self.broken - 1, self.drawn, HONEST)) if self.broken else 1.0
        return p < LEVEL


def wants_check(attack: str, norm: str, metric: str, n: int) -> bool:
    """Whether a record of ``n`` samples is checked.

    Not checked are attacks on text alone, retrieval, and attacks that include Square themselves.
    """
    pixels = norm != "levenshtein" and metric != "retrieval"
    return pixels and not includes_square(attack) and n >= FEWEST


def includes_square(attack: str) -> bool:
    """Whether Square is a part of the attack."""
    return attack.startswith("square-") or attack == "autoattack-standard"

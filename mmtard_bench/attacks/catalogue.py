"""Find an attack by name. Importing this module registers all attacks."""

import re

from mmtard_bench import registry
from mmtard_bench.attacks import cw, pgd, reference
from mmtard_bench.attacks.base import Attack
from mmtard_bench.errors import InputError
from mmtard_bench.types import ThreatModel

__all__ = ["build_attack", "cw", "pgd", "reference"]

_MOST_STEPS = 100_000


def attack_family(name: str) -> str:
    """The registered name of an attack: "pgd-20" -> "pgd-{steps}". Raises InputError."""
    if name in registry.attacks and "{" not in name:
        return name
    match = re.fullmatch(r"(.+)-(\d{1,9})", name)
    family = f"{match[1]}-{{steps}}" if match else ""
    if match is None or family not in registry.attacks:
        hint = registry.near_matches(name, registry.attacks)
        raise InputError(f"There is no attack '{name}'. {hint}")
    if not 1 <= int(match[2]) <= _MOST_STEPS:
        raise InputError(f"The attack '{name}' needs 1 to {_MOST_STEPS} steps.")
    return family


def build_attack(threat: ThreatModel, *, n_classes: int) -> Attack:
    """The attack of a threat model, for a task with so many classes. Raises InputError."""
    if n_classes < 2:
        raise InputError(f"A task needs at least two classes to be attacked; it has {n_classes}.")
    return registry.attacks.get(attack_family(threat.attack))(threat, n_classes)

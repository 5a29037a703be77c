"""Find an attack by name. Importing this module registers all attacks."""

import re

from mmtard_bench import registry
from mmtard_bench.attacks import charmer, cw, joint, pgd, reference
from mmtard_bench.attacks.base import Attack, Engine
from mmtard_bench.attacks.fast.ensemble import FAST
from mmtard_bench.errors import InputError
from mmtard_bench.types import ThreatModel

__all__ = ["build_attack", "charmer", "cw", "joint", "pgd", "reference"]


def attack_family(name: str) -> str:
    """The registered name of an attack: "pgd-20" -> "pgd-{steps}". Raises InputError."""
    if name in registry.attacks and "{" not in name:
        return name
    for family in registry.attacks:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]{1,9})", re.escape(family))
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        for what, number in match.groupdict().items():
            least, most = registry.RANGES[what]
            if not least <= int(number) <= most:
                raise InputError(f"The attack '{name}' needs {least} to {most} {what}.")
        return family
    hint = registry.near_matches(name, registry.attacks)
    raise InputError(f"There is no attack '{name}'. {hint}")


def build_attack(threat: ThreatModel, *, n_classes: int, engine: Engine) -> Attack:
    """The attack of a threat model, for a task with so many classes. Raises InputError.

    The fast engine has what is in ``FAST``; of the others there is one form.
    """
    if n_classes < 2:
        raise InputError(f"A task needs at least two classes to be attacked; it has {n_classes}.")
    family = attack_family(threat.attack)
    if engine.name == "fast" and family in FAST:
        return FAST[family](threat, n_classes, engine.precision)
    if engine.precision != "float32":
        raise InputError(
            f"The precision {engine.precision} is for attacks of the fast engine; {threat.attack} "
            f"runs in float32 here. Those with another: {', '.join(FAST)}."
        )
    attack = registry.made(registry.attacks, family, threat, n_classes)
    if not isinstance(attack, Attack):
        raise InputError(
            f"The attack '{family}' was registered with a function that returned a "
            f"{type(attack).__name__}; expected an Attack."
        )
    return attack

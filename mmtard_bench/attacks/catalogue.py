"""Find an attack by name. Importing this module registers all attacks."""

from mmtard_bench import registry
from mmtard_bench.attacks import charmer, cw, joint, pgd, reference
from mmtard_bench.attacks.base import Attack, Engine
from mmtard_bench.attacks.fast import ensemble
from mmtard_bench.errors import InputError
from mmtard_bench.registry import attack_family
from mmtard_bench.types import ThreatModel

__all__ = ["build_attack", "charmer", "cw", "ensemble", "joint", "pgd", "reference"]


def build_attack(threat: ThreatModel, *, n_classes: int, engine: Engine) -> Attack:
    """Build the attack of a threat model for a task with ``n_classes`` classes.

    The fast engine runs the attacks in ``registry.fast_attacks``; all other attacks have one form
    under both engines. Raises InputError for an unknown attack.
    """
    if n_classes < 2:
        raise InputError(f"A task needs at least two classes to be attacked; it has {n_classes}.")
    family = attack_family(threat.attack)
    if engine.name == "fast" and family in registry.fast_attacks:
        attack = registry.made(registry.fast_attacks, family, threat, n_classes, engine.precision)
    elif engine.precision != "float32":
        raise InputError(
            f"The precision {engine.precision} is for attacks of the fast engine; {threat.attack} "
            "runs in float32 here. Those with another: "
            f"{', '.join(registry.fast_attacks)}."
        )
    elif family not in registry.attacks:
        raise InputError(
            f"The attack '{family}' is of the fast engine only; the engine {engine.name} has none "
            "of that name."
        )
    else:
        attack = registry.made(registry.attacks, family, threat, n_classes)
    if not isinstance(attack, Attack):
        raise InputError(
            f"The attack '{family}' was registered with a function that returned a "
            f"{type(attack).__name__}; expected an Attack."
        )
    return attack

"""Square alone, and a fast attack of another package."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.attacks.base import Attack, AttackResult, CountPasses, Engine, norm_of
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.cli import main
from mmtard_bench.evaluation.job import threat_facts
from mmtard_bench.testing import check_attack
from tests.conftest import Linear, attack

PLUGIN = '''
"""One restart of APGD on the margin, as another package would add it."""
import mmtard_bench as mb
from mmtard_bench.attacks import losses
from mmtard_bench.attacks.fast.apgd import Apgd
from mmtard_bench.attacks.fast.ensemble import staged


@mb.register_attack("apgd-margin-{steps}", engine="fast")
def build(threat, n_classes, precision):
    """APGD on the margin."""
    steps = int(threat.attack.rpartition("-")[2])
    search = Apgd(
        name="apgd-margin",
        loss=losses.negative_margin,
        norm=threat.pixel_norm,
        eps=float(threat.eps),
        steps=steps,
    )
    return staged(threat, [search], {"code": "other 1", "steps": steps}, precision)
'''


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", "5/255"), ("l2", "64/255")])
def test_square_stays_in_the_ball_and_its_budget(engine, norm, eps):
    model = Linear(3)
    images, labels = model.samples(24)
    counter = CountPasses(model)
    found = attack(
        "square-150", counter, images, labels, eps=eps, norm=norm, engine=engine, classes=3
    )
    radius = float(eps.split("/")[0]) / 255
    assert bool((found.adversarial >= 0).all() and (found.adversarial <= 1).all())
    assert float(norm_of(found.adversarial - images, norm).max()) <= radius * (1 + 1e-5)
    broken = [name is not None for name in found.broken_by]
    assert 0 < sum(broken) < 24
    assert {name for name in found.broken_by if name} <= {"square", "square-150"}
    assert (model(found.adversarial).argmax(1) != labels).tolist() == broken
    # Nothing that lies beyond the boundary's distance, which is known in closed form, is broken.
    assert not any(model.distance(images, labels, norm)[broken] > radius * (1 + 1e-5))
    assert counter.backward_rows == sum(found.backward) == 0
    # The first and the last images are looked at as well.
    assert max(found.forward) <= 150 + 3
    assert counter.forward_rows == sum(found.forward)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd-40", "apgd-pair", "square-500"])
def test_the_kit_passes_our_attacks(name, norm):
    found = check_attack(name, norm=norm)
    assert found.breakable >= 15
    # The cross-entropy of PGD may run after another class than the nearest.
    least = {"pgd-40": 0.8, "apgd-pair": 1, "square-500": 0.3}[name]
    assert found.broken >= least * found.breakable


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("outside", "distance"),
        ("claims", "classified correctly"),
        ("shares", "depend on the other samples"),
        ("forgets", "not one result for each sample"),
    ],
)
def test_the_kit_finds_a_fault(fault, words, own):
    @mb.register_attack("faulty")
    def faulty(threat, n_classes):
        def run(work):
            count, image = len(work.ids), work.images.clone()
            nobody = [None] * count
            if fault == "outside":
                image[0] = (image[0] + 2 * float(threat.eps)).clamp(0, 1)
            if fault == "claims":
                nobody[0] = "faulty"
            if fault == "shares" and count > 16:
                found = attack("pgd-40", work.model, image, work.labels, eps=str(threat.eps))
                image, nobody = found.adversarial, found.broken_by
            if fault == "forgets":
                return iter([([0], AttackResult(image[:1], [None], [0], [0]))])
            return AttackResult(image, nobody, [0] * count, [0] * count)

        return Attack("faulty", {}, run)

    with pytest.raises(AssertionError, match=words):
        check_attack("faulty")


def test_square_finds_what_there_is_to_find():
    """In L-inf the corners of the ball suffice on a linear model, and Square proposes corners."""
    model = Linear(2)
    images, labels = model.samples(16)
    found = attack("square-3000", model, images, labels, eps="16/255", engine="fast")
    distance = model.distance(images, labels, "linf")
    broken = torch.tensor([name is not None for name in found.broken_by])
    assert broken[distance < 0.7 * 16 / 255].all()
    assert broken.any()


def test_another_package_adds_a_fast_attack(tmp_path, own, capsys):
    (tmp_path / "other_attacks.py").write_text(PLUGIN)
    exec(Path(tmp_path / "other_attacks.py").read_text(), {"__name__": "other_attacks"})
    words = {"task": "digits/digit", "threat": "apgd-margin-20", "eps": "8/255", "n": 8}
    record = mb.evaluate("tiny-clip", **words)
    assert record.robust_accuracy == 0
    assert record.threat.parameters == {"code": "other 1", "steps": 20}
    assert record.threat.block is None
    with pytest.raises(mb.InputError, match="of the fast engine only"):
        mb.evaluate("tiny-clip", **words, engine="reference")
    assert "apgd-margin-{steps}" in mb.list_attacks()
    command = "eval --model tiny-clip --task digits/digit --threat apgd-margin-5 --eps 8/255 --n 8"
    assert main(command.split()) == 0
    assert "apgd-margin-5 linf 8/255" in capsys.readouterr().out
    assert main(["list", "threats"]) == 0
    assert "APGD on the margin." in capsys.readouterr().out


def test_a_later_version_of_an_attack_is_another_identity():
    threat = mb.ThreatModel("pgd-3", "linf", "2/255")
    first = build_attack(threat, n_classes=3, engine=Engine())
    assert threat_facts(threat, first).parameters == dict(first.parameters)
    later = threat_facts(threat, replace(first, version=2)).parameters
    assert later == {**first.parameters, "version": 2}

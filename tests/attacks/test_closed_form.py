"""Attacks on linear models, where margin and dual norm give the truth."""

import pytest
import torch

from mmtard_bench.attacks.base import norm_of
from mmtard_bench.attacks.cw import minimal_l2
from mmtard_bench.errors import InputError
from tests.conftest import Linear, attack


def middle(distance: torch.Tensor) -> str:
    """A radius that breaks about half of the samples, as a fraction."""
    return f"{round(float(distance.median()) * 10000)}/10000"


ENGINES = ["reference", "fast"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("pgd-40", 2),
        ("cw-linf-40", 2),
        ("apgd-pair", 2),
        ("apgd-pair", 3),
        ("apgd-pair", 6),
        ("autoattack-standard", 2),
        ("autoattack-standard", 6),
    ],
)
def test_attacks_reach_exactly_the_robust_accuracy_of_the_closed_form(name, classes, norm, engine):
    if name.startswith("cw-linf") and norm == "l2":
        pytest.skip("cw-linf is an L-inf attack, and says so")
    model = Linear(classes)
    images, labels = model.samples(32)
    distance = model.distance(images, labels, norm)
    eps = middle(distance)
    result = attack(name, model, images, labels, eps=eps, norm=norm, engine=engine)
    number = eval(eps)
    # The few samples within rounding of the radius could fall on either side.
    clear = (distance - number).abs() > 1e-4 * number
    broken = torch.tensor([name is not None for name in result.broken_by])
    assert clear.sum() >= 30
    assert torch.equal(broken[clear], (distance < number)[clear])


def test_cw_norm_is_within_five_percent_of_the_optimum():
    # Two classes: with more, C&W descends on the runner-up, which may not be the nearest class.
    model = Linear(2)
    images, labels = model.samples(24)
    # Move away from the boundary, to distances such as natural images have.
    images = (images + 0.03 * model.weight[labels].view_as(images)).clamp(0.2, 0.8)
    labels = model(images).argmax(1)
    found = minimal_l2(model, images, labels)
    optimum = model.distance(images, labels, "l2")
    ratio = norm_of(found - images, "l2") / optimum
    assert (model(found).argmax(1) != labels).all()
    assert optimum.median() > 0.2
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1.05, ratio


def test_cw_breaks_what_its_distance_says():
    model = Linear(4)
    images, labels = model.samples(24)
    images = (images + 0.03 * model.weight[labels].view_as(images)).clamp(0.2, 0.8)
    labels = model(images).argmax(1)
    optimum = model.distance(images, labels, "l2")
    eps = middle(optimum)
    result = attack("cw-l2", model, images, labels, eps=eps, norm="l2")
    broken = torch.tensor([name is not None for name in result.broken_by])
    assert not broken[optimum > eval(eps)].any()
    assert broken[optimum * 1.05 < eval(eps)].all()


def test_cw_treats_every_sample_alone():
    """A hopeless sample in the batch must not end the search for the others."""
    model = Linear(2)
    images, labels = model.samples(6)
    alone = minimal_l2(model, images, labels)
    stubborn = (images[:1] + 0.4 * model.weight[labels[:1]].view_as(images[:1])).clamp(0, 1)
    together = minimal_l2(
        model, torch.cat([images, stubborn]), torch.cat([labels, model(stubborn).argmax(1)])
    )
    assert torch.allclose(together[:6], alone, atol=1e-5)


def test_cw_is_quiet_about_models_without_parameters(capfd):
    model = Linear(2)
    images, labels = model.samples(2)
    attack("cw-l2", model.forward, images, labels, eps="1/2", norm="l2")
    assert capfd.readouterr().out == ""


def test_cw_moves_pixels_that_start_on_the_box():
    model = Linear(2)
    images, _ = model.samples(8)
    images = images.round()
    labels = model(images).argmax(1)
    found = minimal_l2(model, images, labels)
    assert (model(found).argmax(1) != labels).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("pgd-5", "linf"),
        ("cw-linf-5", "linf"),
        ("cw-l2", "l2"),
        ("apgd-pair", "linf"),
        ("apgd-pair-5r", "linf"),
        ("autoattack-standard", "linf"),
        ("autoattack-rand", "linf"),
    ],
)
def test_every_threat_model_works_with_few_classes(name, norm, classes, engine):
    model = Linear(classes)
    images, labels = model.samples(3)
    # The radius is far beyond every boundary: a working attack breaks all samples.
    eps = "3/4" if norm == "l2" else "1/4"
    result = attack(name, model, images, labels, eps=eps, norm=norm, engine=engine)
    reach = model.distance(images, labels, norm) < (0.7 if norm == "l2" else 0.2)
    broken = torch.tensor([b is not None for b in result.broken_by])
    assert reach.any()
    assert broken[reach].all()
    adversarial = result.adversarial[broken]
    assert (model(adversarial).argmax(1) != labels[broken]).all()
    uses_dlr = name.startswith("a") and not (name.startswith("apgd-pair") and classes == 2)
    assert any("margin" in note for note in result.notes) == (classes < 4 and uses_dlr)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "norm"), [("cw-linf-5", "l2"), ("cw-l2", "linf")])
def test_attacks_of_one_norm_refuse_the_other(name, norm, engine):
    model = Linear(2)
    images, labels = model.samples(2)
    with pytest.raises(InputError, match=f"'{norm}' was given"):
        attack(name, model, images, labels, eps="1/4", norm=norm, engine=engine)


def test_fewer_classes_than_two_are_refused():
    model = Linear(2)
    images, labels = model.samples(2)
    with pytest.raises(InputError, match="at least two classes"):
        attack("pgd-5", model, images, labels, eps="1/4", classes=1)

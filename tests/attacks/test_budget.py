"""Budgets by counting passes, and the ball and box for any input."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from mmtard_bench.attacks import reference
from mmtard_bench.attacks.base import Engine, norm_of
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.fast.square import Square
from mmtard_bench.types import Eps, ThreatModel
from tests.conftest import Linear, attack, passes


class Constant(nn.Module):
    """Always right and never moved: every attack spends its whole budget on it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.arange(self.classes, 0, -1).float().repeat(len(images), 1)
        return logits + 1e-6 * images.flatten(1).mean(1, keepdim=True) * torch.arange(self.classes)


# What each attack may spend on a sample that it cannot break, in forward and backward passes.
# APGD evaluates the start and each of its 100 steps; every restart or target costs one more look.
BUDGETS = {
    "pgd-1": (2, 1),
    "pgd-20": (21, 20),
    "cw-linf-7": (8, 7),
    "apgd-pair": (1 + 1 + 101 + 1 + 9 * (1 + 101) + 1, 101 + 9 * 101),
    "apgd-pair-5r": (1 + 5 * 101 + 1 + 1 + 9 * (1 + 101) + 1, 5 * 101 + 9 * 101),
    # A deterministic model: 20 passes to see that it is, then one draw a step stands for all 20.
    "autoattack-rand": (2 * (20 + 1 + 101 + 1), 2 * (20 + 101)),
}


# The fast engine looks once at the clean image for targets, and last points need no gradient.
FAST_BUDGETS = {
    "pgd-1": (2, 1),
    "pgd-20": (21, 20),
    "cw-linf-7": (8, 7),
    "apgd-pair": (101 + 1 + 9 * 101, 100 + 9 * 100),
    "apgd-pair-5r": (5 * 101 + 1 + 9 * 101, 5 * 100 + 9 * 100),
    "autoattack-standard": (101 + 1 + 9 * 101 + 9 * 201 + 5001, 100 + 9 * 100 + 9 * 100),
}


@pytest.mark.parametrize(
    ("engine", "name", "budget", "batch_size"),
    [("reference", *item, 64) for item in BUDGETS.items()]
    + [("fast", *item, 64) for item in FAST_BUDGETS.items()]
    + [("fast", "apgd-pair", FAST_BUDGETS["apgd-pair"], size) for size in (1, 7)],
)
def test_budget_on_a_sample_that_stands(engine, name, budget, batch_size):
    model = passes(Constant(12))
    images = torch.rand(2, 3, 8, 8)
    labels = torch.zeros(2, dtype=torch.long)
    result = attack(
        name,
        model,
        images,
        labels,
        eps="8/255",
        classes=12,
        engine=engine,
        batch_size=batch_size,
    )
    assert result.broken_by == [None, None]
    forward, backward = budget
    assert result.backward == [backward, backward]
    assert result.forward == [forward, forward]
    # The attack's own account agrees with an independent count.
    assert model.forward_rows == sum(result.forward)
    assert model.backward_rows == sum(result.backward)
    # What a run says is left at worst.
    threat = ThreatModel(name, "linf", Eps.parse("8/255"))
    most = build_attack(threat, n_classes=12, engine=Engine(engine)).passes
    if name == "autoattack-rand":
        assert most > 20 * (forward + backward) / 2  # of a model that is random
    else:
        assert most == forward + backward


class Noisy(Constant):
    """The same with noise that changes no prediction."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + 1e-3 * torch.rand(len(images), 1)


def test_a_random_model_gets_every_draw():
    images = torch.rand(2, 3, 8, 8)
    labels = torch.zeros(2, dtype=torch.long)
    result = attack("autoattack-rand", Noisy(12), images, labels, eps="8/255", classes=12)
    assert result.forward == [2 * (2 + 1 + 20 * 101 + 1)] * 2
    assert result.backward == [2 * (2 + 20 * 101)] * 2


class Switching(Constant):
    """The same in one of two states, by the toss of a coin: two passes often agree."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + 1e-3 * torch.randint(2, ())


@pytest.mark.parametrize("seed", range(6))
def test_a_model_of_few_random_states_gets_every_draw(seed):
    images = torch.rand(1, 3, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = attack(
            "autoattack-rand", Switching(12), images, torch.zeros(1).long(), eps="8/255", classes=12
        )
    assert result.backward[0] > 2 * 20 * 101


def test_budget_of_cw_l2():
    model = passes(Linear(3))
    images, labels = model.model.samples(4)
    # Nothing lies within this radius, so the search over c runs to its end.
    result = attack("cw-l2", model, images, labels, eps="1/100000", norm="l2", classes=3)
    # Nine searches of 200 steps, none of them cut short.
    assert result.backward == [9 * 200] * 4
    assert result.forward == result.backward
    assert model.forward_rows == sum(result.forward)
    assert model.backward_rows == sum(result.backward)


def test_budget_of_autoattack_standard():
    model = passes(Constant(12))
    images = torch.rand(1, 3, 8, 8)
    result = attack(
        "autoattack-standard",
        model,
        images,
        torch.zeros(1, dtype=torch.long),
        eps="8/255",
        classes=12,
    )
    assert result.broken_by == [None]
    apgd = 1 + 101 + 1, 101
    targeted = 1 + 9 * (1 + 101) + 1, 9 * 101
    # FAB, for each target: the clean prediction, the target, 100 x (gradient, prediction), a look.
    fab = 1 + 9 * (2 + 200 + 1) + 1, 9 * 100
    square = 1 + 1 + 5000 + 1, 0
    stages = (apgd, targeted, fab, square)
    assert result.backward == [sum(backward for _, backward in stages)]
    assert abs(result.forward[0] - sum(forward for forward, _ in stages)) <= 2
    assert model.forward_rows == result.forward[0]
    assert model.backward_rows == result.backward[0]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 6),
    numerator=st.integers(1, 120),
    name=st.sampled_from(["pgd-1", "pgd-6", "cw-linf-3"]),
    engine=st.sampled_from(["reference", "fast"]),
    norm=st.sampled_from(["linf", "l2"]),
    extreme=st.booleans(),
)
def test_no_adversarial_leaves_the_ball_or_the_box(
    seed, classes, numerator, name, engine, norm, extreme
):
    if name.startswith("cw-linf"):
        norm = "linf"
    model = Linear(classes, seed=seed)
    images = torch.rand((5, 3, 6, 6), generator=torch.Generator().manual_seed(seed))
    images = images.round() if extreme else images
    labels = model(images).argmax(1)
    eps = f"{numerator}/255" if norm == "linf" else f"{numerator}/40"
    result = attack(name, model, images, labels, eps=eps, norm=norm, seed=seed, engine=engine)
    _assert_inside(result.adversarial, images, norm, eps)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-pair", "autoattack-standard", "autoattack-rand", "cw-l2"])
def test_larger_attacks_stay_inside(name, norm, engine, monkeypatch):
    if name == "cw-l2" and norm == "linf":
        pytest.skip("cw-l2 is an L2 attack")
    if engine == "fast" and name in ("autoattack-rand", "cw-l2"):
        pytest.skip("one form under both engines")
    # Only ball and box are asserted: Square need not end.
    monkeypatch.setitem(Square.__init__.__kwdefaults__, "steps", 300)
    short = reference._square
    monkeypatch.setattr(reference, "_square", lambda threat, _: short(threat, 300))
    for seed in range(2):
        model = Linear(5, seed=seed)
        images = torch.rand((6, 3, 6, 6), generator=torch.Generator().manual_seed(seed)).round()
        labels = model(images).argmax(1)
        eps = "20/255" if norm == "linf" else "1/2"
        result = attack(name, model, images, labels, eps=eps, norm=norm, seed=seed, engine=engine)
        _assert_inside(result.adversarial, images, norm, eps)


def _assert_inside(adversarial, images, norm, eps):
    numerator, denominator = map(int, eps.split("/"))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    radius = numerator / denominator
    assert norm_of(adversarial - images, norm).max() <= radius * (1 + 1e-5) + 1e-6

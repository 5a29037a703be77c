"""The adapter against the reference code itself."""

import pytest
import torch
from pyautoattack import AutoAttack

from mmtard_bench.attacks.reference import share
from tests.conftest import Linear, attack


class Small(torch.nn.Module):
    """A convolutional model with curved boundaries, from a seed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, stride=2),
                torch.nn.Tanh(),
                torch.nn.Flatten(),
                torch.nn.Linear(8 * 9, 12),
            )
        self.requires_grad_(False)

    def forward(self, images):
        return 20 * self.layers(images)


@pytest.mark.parametrize(
    ("version", "norm", "eps"),
    [
        ("standard", "linf", "8/255"),
        pytest.param("standard", "l2", "60/255", marks=pytest.mark.slow),
        ("rand", "linf", "8/255"),
    ],
)
def test_autoattack_equals_a_direct_call_sample_for_sample(version, norm, eps):
    model = Small()
    images = torch.rand((12, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    labels = model(images).argmax(1)
    numerator, denominator = map(int, eps.split("/"))
    with torch.random.fork_rng():
        direct = AutoAttack(
            model,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=numerator / denominator,
            seed=11,
            version=version,
        )
        expected, _ = direct.run_standard_evaluation(images, labels, batch_size=64)
    result = attack(f"autoattack-{version}", model, images, labels, eps=eps, norm=norm, seed=11)
    assert torch.equal(result.adversarial, expected)
    broken = torch.tensor([name is not None for name in result.broken_by])
    assert torch.equal(broken, model(expected).argmax(1) != labels)
    assert 0 < broken.sum() < len(broken) or version == "rand"
    stages = {"standard": {"apgd-ce", "apgd-t", "fab-t", "square"}, "rand": {"apgd-ce", "apgd-dlr"}}
    assert {name for name in result.broken_by if name} <= stages[version]


def test_global_randomness_is_left_alone():
    model = Linear(5)
    images, labels = model.samples(4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    attack("apgd-pair", model, images, labels, eps="1/255")
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_adversarials():
    model = Linear(5)
    images, labels = model.samples(4)
    first, again, other = (
        attack("pgd-3", model, images, labels, eps="8/255", seed=seed).adversarial
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shares_add_up():
    assert share(10, 4) == [3, 3, 2, 2]
    assert sum(share(1_000_003, 64)) == 1_000_003

"""A folded tower is the same function; what cannot be folded stays as it is."""

import pytest
import torch
from torch import nn

import mmtard_bench as mb
from mmtard_bench.models.folding import fold, folded, using
from tests.conftest import ToyClip, wrap


def probe(size: int = 32) -> torch.Tensor:
    return torch.rand((4, 3, size, size), generator=torch.Generator().manual_seed(0))


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def test_batch_normalisation_is_folded_and_nothing_changes():
    clip = mb.load_model("student-tecoa")
    clip.to(torch.device("cpu"))
    own, digest = clip.module.visual, clip.digest
    tower = fold(clip, probe())
    assert norms(own) > 0
    assert norms(tower) == 0
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    images = probe()[:2].flip(0).requires_grad_()
    plain = clip.image_features(images)
    (expected,) = torch.autograd.grad(plain[:, 0].sum(), images)
    with using(clip, tower):
        assert clip.module.visual is tower
        folded = clip.image_features(images)
        (gradient,) = torch.autograd.grad(folded[:, 0].sum(), images)
    assert clip.module.visual is own
    assert clip.digest == digest
    assert torch.allclose(folded, plain, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5 * float(expected.abs().max()))


class Tower(nn.Module):
    """A convolution and its normalisation, with something in between or around."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.twist = twist
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            for values in (self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias):
                values.copy_(torch.randn(values.shape, generator=generator))
            self.norm.running_mean.normal_(generator=generator)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.twist == "untraceable" and images.sum() < 0:
            return images
        features = self.conv(images)
        if self.twist == "used twice":
            return (self.norm(features) + features).flatten(1)[:, :16]
        if self.twist == "random":
            return (self.norm(features) + torch.rand(30, 30)).flatten(1)[:, :16]
        return self.norm(features).flatten(1)[:, :16]


class Convolutional(ToyClip):
    def __init__(self, twist: str) -> None:
        super().__init__()
        self.visual = Tower(twist)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


@pytest.mark.parametrize(
    ("twist", "left"), [("plain", 0), ("used twice", 1), ("untraceable", None), ("random", None)]
)
def test_only_what_is_surely_the_same_is_folded(twist, left):
    clip = wrap(Convolutional(twist))
    tower = fold(clip, probe())
    assert (None if tower is None else norms(tower)) == left
    assert clip.module.visual.norm.training is False


def test_a_tower_is_folded_once_a_model():
    clip = wrap(Convolutional("plain"))
    tower = folded(clip, probe())
    assert tower is not None
    assert folded(clip, probe()[:1]) is tower


def test_a_model_without_a_tower_or_batch_normalisation_is_left_alone():
    assert fold(wrap(ToyClip()), probe()) is None


def test_the_tower_comes_back_when_an_attack_fails():
    clip = wrap(Convolutional("plain"))
    own = clip.module.visual
    with pytest.raises(RuntimeError), using(clip, fold(clip, probe())):
        raise RuntimeError
    assert clip.module.visual is own

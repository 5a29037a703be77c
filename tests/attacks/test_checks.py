"""Which models are refused, which are flagged, and that honest ones are neither."""

import numpy as np
import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.attacks.fast.rows import Search
from mmtard_bench.evaluation.checks import check_chance
from mmtard_bench.records.schema import Sample
from tests.conftest import ToyClip, wrap


class Rounding(ToyClip):
    """Gradient masking by a rounding layer."""

    def encode_image(self, images):
        return super().encode_image((images * 4).round() / 4)


class Noisy(ToyClip):
    """Answers at random."""

    def encode_image(self, images):
        features = super().encode_image(images)
        return features + features.std() * torch.randn_like(features)


class Adaptive(ToyClip):
    """Takes a gradient step on its own input before it answers."""

    def encode_image(self, images):
        with torch.enable_grad():
            inputs = images.detach().requires_grad_()
            (step,) = torch.autograd.grad(super().encode_image(inputs).square().sum(), inputs)
        return super().encode_image(images + 0.01 * step.sign())


class BatchNormalised(ToyClip):
    """Uses the statistics of whatever else is in the batch."""

    def encode_image(self, images):
        features = super().encode_image(images)
        return features - features.mean(0) if len(images) > 1 else features


def scored(module, threat="pgd-2", n=24):
    return mb.evaluate(wrap(module), task="digits/digit", threat=threat, eps="1/255", n=n)


def codes(record):
    return {flag.code for flag in record.flags}


def test_an_untrained_model_is_flagged_for_nothing_but_chance():
    record = scored(ToyClip())
    assert record.status == "ok"
    assert codes(record) == {"clean-accuracy-at-chance"}


def samples_of(pairs):
    """Samples with these (label, prediction), the right ones robust."""
    return [
        Sample(
            id=str(i),
            label=label,
            prediction=prediction,
            clean_correct=label == prediction,
            robust=label == prediction,
            broken_by=None,
            unconfirmed=False,
            forward=0,
            backward=0,
        )
        for i, (label, prediction) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("pairs", "at_chance"),
    [
        ([(i % 10, (i + i // 10) % 10) for i in range(100)], True),  # each label, each prediction
        ([(i % 10, i % 10) for i in range(100)], False),
        ([(i % 10, i % 10 if i < 25 else 0) for i in range(100)], False),  # 25 + some of 100
        ([(0, 0)] * 60 + [(1, 0)] * 40, True),  # 60%, but one class is always predicted
        ([(0, 0)] * 60 + [(1, 1)] * 40, False),
        ([(0, 1), (1, 0)] * 20, True),  # worse than chance
        ([(0, 0), (1, 1)], False),  # all right: two samples cannot say more
        ([(0, 1), (1, 2)], True),
        ([(3, 3)], False),
    ],
)
def test_clean_accuracy_is_compared_with_what_chance_gives(pairs, at_chance):
    assert (check_chance(samples_of(pairs)) is not None) == at_chance


def test_an_honest_guesser_is_said_to_guess_and_a_weak_model_is_not():
    """The level of the test, and its power at twice the accuracy of chance."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, (200, 500)).tolist()
    guesses = generator.integers(0, 10, (200, 500)).tolist()
    flagged = [
        check_chance(samples_of(zip(*both, strict=True)))
        for both in zip(labels, guesses, strict=True)
    ]
    assert sum(doubt is not None for doubt in flagged) >= 180
    known = generator.random((200, 500)) < 0.12
    better = np.where(known, labels, guesses).tolist()
    flagged = [
        check_chance(samples_of(zip(*both, strict=True)))
        for both in zip(labels, better, strict=True)
    ]
    assert sum(doubt is not None for doubt in flagged) <= 2


def test_an_image_tower_under_another_text_tower_is_flagged():
    """The towers were not trained together: right on its own, at chance here."""
    clip, other = mb.load_model("tiny-clip"), mb.load_model("tiny-clip")
    with torch.no_grad():
        other.module.text_projection.copy_(other.module.text_projection.flip(1))
    settings = {"task": "digits/digit", "threat": "pgd-1", "eps": "1/255", "n": 64}
    assert codes(mb.evaluate(clip, **settings)) == set()
    assert "clean-accuracy-at-chance" in codes(mb.evaluate(other, **settings))


@pytest.mark.parametrize("name", ["tiny-clip", "teacher-robust"])
def test_the_tiny_models_are_not_flagged(name, short_attacks):
    record = mb.evaluate(name, task="digits/digit", threat="apgd-pair", eps="8/255", n=32)
    assert codes(record) == set()


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (Rounding(), "zero-gradients"),
        (ToyClip(scale=1e4), "unusual-logit-scale"),
        (ToyClip(scale=1.0), "unusual-logit-scale"),
        (Noisy(), "randomised-output"),
        (Adaptive(), "optimises-at-inference"),
        (BatchNormalised(), "batch-dependent-output"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_that_masks_is_flagged(module, code):
    assert code in codes(scored(module))


def test_logits_scaled_until_the_gradient_vanishes_are_flagged_even_inside_the_tower():
    clip = mb.load_model("tiny-clip")
    clip.module.logit_scale.data += 9.2  # times 1e4
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-2", eps="8/255", n=24)
    assert {"zero-gradients", "unusual-logit-scale"} <= codes(record)


def test_square_beating_gradients_is_flagged():
    record = scored(Rounding(seed=5), threat="autoattack-standard", n=48)
    by_square = [s for s in record.samples if s.broken_by == "square"]
    assert len(by_square) >= 2
    assert "square-beats-gradients" in codes(record)
    assert "square-beats-gradients" not in codes(scored(Rounding(seed=5), "square-300", n=48))


class Nan(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images) * float("nan")


class NanUnderAttack(ToyClip):
    """Fine on the data, NaN as soon as pixels leave the 8-bit grid."""

    def encode_image(self, images):
        levels = (images * 0.25 + 0.5) * 255
        off = ((levels - levels.round()).abs() > 0.05).flatten(1).any(1, keepdim=True)
        features = super().encode_image(images)
        return torch.where(off, features * float("nan"), features)


class Blind(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images * 0 + 1)


class Narrow(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images)[:, :5]


class Crash(ToyClip):
    """Works on the data, raises while it is attacked."""

    def encode_image(self, images):
        if images.requires_grad and not hasattr(self, "calls"):
            self.calls = 0
        if images.requires_grad:
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("the accelerator is on fire")
        return super().encode_image(images)


class NanGradient(ToyClip):
    """Finite answers, NaN gradients: the sign of NaN is zero, so that PGD would stand still."""

    def encode_image(self, images):
        features = super().encode_image(images)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient * float("nan"))
        return features


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NanGradient(), "gradients"),
        (Nan(), "NaN"),
        (NanUnderAttack(), "NaN"),
        (Blind(), "ignores its input"),
        (Narrow(), "width"),
        (Crash(), "on fire"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_failure_is_an_error_and_never_a_robust_sample(module, reason):
    record = scored(module)
    assert record.status == "error"
    assert reason in record.error
    assert record.samples == []
    assert record.results is None
    with pytest.raises(mb.InputError, match="failed"):
        record.robust_accuracy  # noqa: B018


def test_an_attack_that_cheats_is_an_error(monkeypatch):
    def outside(_, state, points):
        return (state["images"] + 0.3 + 0 * points).clamp(0, 1)

    monkeypatch.setattr(Search, "project", outside)
    record = scored(ToyClip())
    assert record.status == "error"
    assert "ball" in record.error


def test_claims_that_a_fresh_pass_does_not_confirm_count_as_broken_and_are_flagged():
    torch.manual_seed(0)
    record = scored(Noisy(), n=300)
    unconfirmed = [s for s in record.samples if s.unconfirmed]
    assert unconfirmed
    assert all(not s.robust and s.broken_by == "pgd-2" for s in unconfirmed)
    assert "unconfirmed-adversarials" in codes(record)


def test_probabilities_in_place_of_logits_are_flagged():
    from mmtard_bench.evaluation.checks import inspect_model
    from tests.conftest import Linear

    model = Linear(4)
    images, labels = model.samples(8)

    def flags(classifier):
        doubts = inspect_model(classifier, images, labels, classes=4, scale=100.0)
        return {doubt.code for doubt in doubts}

    assert flags(model) == set()
    assert "softmax-output" in flags(lambda pixels: model(pixels).softmax(1))

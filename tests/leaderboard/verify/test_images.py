"""Adversarial images that survive quantisation, written and read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import mmtard_bench as mb
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import inside
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.leaderboard.verify.images import (
    Stack,
    _rounded,
    as_images,
    quantised,
    read_adversarials,
    replay_stack,
    write_adversarials,
)
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, ThreatModel

RESOURCES = Resources(torch.device("cpu"), batch_size=16)
BALLS = [("linf", "1/255"), ("linf", "8/255"), ("l2", "128/255"), ("l2", "9/255")]


@pytest.fixture(scope="module")
def data():
    return load_task(find_task("digits/digit"), n=40, seed=0)


@pytest.fixture(scope="module")
def clip():
    return mb.load_model("student-clean-ft")


def images_of(clip, data, threat):
    return {
        outcome.id: outcome.adversarial
        for outcome in attack_again(clip, data, threat, RESOURCES, seed=0)
        if outcome.broken
    }


@pytest.mark.parametrize(("norm", "eps"), BALLS)
@pytest.mark.parametrize("surface", ["native", "model"])
def test_what_is_kept_still_breaks_and_survives_a_file(clip, data, tmp_path, norm, eps, surface):
    threat = ThreatModel("pgd-10", norm, Eps.parse(eps, norm=norm), surface)
    images = images_of(clip, data, threat)
    assert images
    stacks = [
        (
            Stack(
                suite="quick-v1",
                task="digits/digit",
                norm=norm,
                eps=eps,
                surface=surface,
                attack="pgd-10",
                ids=ids,
            ),
            pixels,
        )
        for ids, pixels in quantised(Bench(clip, data, threat.surface, RESOURCES), threat, images)
    ]
    kept = [name for stack, _ in stacks for name in stack.ids]
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(images)
    assert len(kept) >= 0.9 * len(images)
    file = write_adversarials(tmp_path / "a", clip.digest, stacks)
    again = read_adversarials(tmp_path / "a")
    assert again == file
    for place, (stack, pixels) in enumerate(stacks):
        half = range(len(pixels) // 2, len(pixels))
        assert torch.equal(file.images(place, half), as_images(pixels[half.start :]))
        seen = replay_stack(file, place, data, clip, RESOURCES)
        assert seen.broken == stack.ids
        assert not seen.outside
        assert not seen.unbroken


def test_sixteen_bits_are_for_what_eight_do_not_hold(clip, data):
    """In a ball of less than a level of 8 bits nothing but the clean image is left of 8."""
    threat = ThreatModel("pgd-10", "linf", Eps.parse("1/300"))
    images = images_of(clip, data, threat)
    kinds = [
        pixels.dtype
        for _, pixels in quantised(Bench(clip, data, threat.surface, RESOURCES), threat, images)
    ]
    assert kinds == [np.uint16]


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([np.uint8, np.uint16]), st.integers(1, 9))
def test_rounding_towards_the_clean_image_stays_in_the_ball(seed, kind, steps):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 256, (2, 3, 4, 4), generator=generator).float() / 255
    eps = steps / 255 * float(torch.rand((), generator=generator))
    shift = (torch.rand(clean.shape, generator=generator) * 2 - 1) * eps
    images = (clean + shift).clamp(0, 1)
    for norm in ("linf", "l2"):
        radius = float(
            shift.abs().max() if norm == "linf" else (images - clean).flatten(1).norm(dim=1).max()
        )
        found = as_images(_rounded(images, clean, kind, nearest=False))
        assert inside(found, clean, norm=norm, eps=radius).all()
    # The nearest is at most half a level away.
    nearest = as_images(_rounded(images, clean, kind, nearest=True))
    assert float((nearest - images).abs().max()) <= 0.5 / np.iinfo(kind).max + 1e-6


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint16]))
def test_what_was_quantised_stays_as_it_is(seed, kind):
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, (2, 3, 3, 3))
    pixels = pixels.astype(kind)
    images = as_images(pixels)
    clean = 1 - images
    for nearest in (True, False):
        assert (_rounded(images, clean, kind, nearest=nearest) == pixels).all()

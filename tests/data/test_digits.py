"""The digits world: the same bytes everywhere, and nothing leaks from test to training."""

import hashlib

import numpy as np

from mmtard_bench import registry
from mmtard_bench.data.digits import (
    COLOURS,
    DIGITS,
    DigitsSplit,
    combinations,
    digits_test,
    digits_train,
    digits_unseen,
    sources,
)
from mmtard_bench.data.manifest import draw_manifest
from mmtard_bench.tasks.samples import load_training_data

DIGESTS = {
    "digits/test": "53ca00a8cba458962a470ebc172f3bbfcb659445f4ef57806f66072f6b5a0f22",
    "digits/unseen": "de50c85caa0a0a6410417d916315d64a6ea986601e05e4288df962e844cac8dc",
    "digits/train": "5a60eec97ef2f8f4438befa4d66bddd18eefe31c4e936ecb47dd3b3b95dfc6c3",
}


def test_the_bytes_are_pinned():
    for split in (digits_test(), digits_unseen(), digits_train()):
        sha = hashlib.sha256()
        for i in range(200):
            sha.update(split.image(i).tobytes())
            sha.update(str(split.labels[i] if i == 0 else split.combination(i)).encode())
        assert sha.hexdigest() == DIGESTS[split.name], split.name


def test_images_are_small_rgb_and_differ():
    split = digits_test()
    images = [split.image(i) for i in range(50)]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == 50


def test_training_and_testing_share_no_source_digit():
    assert not set(sources(train=True)) & set(sources(train=False))
    assert len(sources(train=True)) + len(sources(train=False)) == 1797


def test_a_fifth_of_the_combinations_never_occurs_in_training():
    seen, unseen = set(combinations(seen=True)), set(combinations(seen=False))
    assert not seen & unseen
    assert len(unseen) == (len(seen) + len(unseen)) // 5 == 112
    train = digits_train()
    assert {train.combination(i) for i in range(train.size)} <= seen
    test = digits_unseen()
    assert {test.combination(i) for i in range(test.size)} <= unseen
    assert len({test.combination(i) for i in range(test.size)}) == 112


def test_every_split_is_large_enough_and_labelled():
    test, unseen = digits_test(), digits_unseen()
    assert test.size >= 2000
    assert unseen.size >= 2000
    assert test.class_names == DIGITS
    assert set(test.labels) == set(range(10))
    for i in (0, 7, 1999):
        assert test.labels[i] == test.combination(i)[1]
        ink, digit, background = unseen.combination(i)
        text = f"a photo of a {ink} {DIGITS[digit]} on a {background} background"
        assert unseen.class_names[unseen.labels[i]] == text


def test_the_colours_of_an_image_are_those_of_its_caption():
    split = digits_test()
    for i in range(100):
        ink, _, background = split.combination(i)
        pixels = split.image(i).astype(int)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.abs(np.median(corners, axis=0) - COLOURS[background]).max() <= 7
        nearest = np.abs(pixels - np.array(COLOURS[ink])).max(axis=2).min()
        assert nearest <= 60


def test_a_draw_depends_on_revision_seed_and_n_alone():
    split = digits_test()
    first = draw_manifest(split, n=50, seed=0)
    assert first == draw_manifest(digits_test(), n=50, seed=0)
    assert first.ids == draw_manifest(split, n=80, seed=0).ids[:50]
    assert first.ids != draw_manifest(split, n=50, seed=1).ids
    assert len(set(first.ids)) == 50
    assert all(split.ids[i] == sample for i, sample in zip(first.indices, first.ids, strict=True))


def test_the_order_of_the_source_does_not_change_a_draw():
    class Reversed:
        revision = digits_test().revision
        ids = digits_test().ids[::-1]

    assert (
        draw_manifest(Reversed(), n=40, seed=3).ids
        == draw_manifest(digits_test(), n=40, seed=3).ids
    )


def test_labels_are_made_up_once(monkeypatch):
    """Not once a sample: all of digits/train would take a minute of hashing."""
    made = []
    of_split = DigitsSplit.labels.fget

    def labels(split):
        made.append(split.name)
        return of_split(split)

    monkeypatch.setattr(DigitsSplit, "labels", property(labels))
    load_training_data(registry.tasks.get("digits/validation"), labelled=True)
    assert made == ["digits/validation"]

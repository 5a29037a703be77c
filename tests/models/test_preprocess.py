"""What a preprocessing may hold, and its pixels against torchvision's and transformers'."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import mmtard_bench as mb

MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)
LEVELS = 3 / 255
"""They round to 8 bits between resizing and normalising, and between both passes of a resize."""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, r"'mean\.0'.*divide those of pixels in 0 \.\. 255"),
        ({"std": (58.395, 57.12, 57.375)}, r"'std\.0'"),
        ({"mean": (-0.1, 0.5, 0.5)}, r"'mean\.0'"),
        ({"mean": (0.5, math.nan, 0.5)}, r"'mean\.1'"),
        ({"mean": (0.5, 0.5, math.inf)}, r"'mean\.2'"),
        ({"mean": ("a", 0.5, 0.5)}, r"'mean\.0'"),
        ({"mean": (True, 0.5, 0.5)}, r"'mean\.0'"),
        ({"mean": (0.5, 0.5)}, r"'mean\.2'"),
        ({"mean": 0.5}, "'mean'"),
        ({"mean": torch.tensor(MEAN)}, "'mean'"),
        ({"std": (0.2, 0.0, 0.2)}, r"'std\.1'"),
        ({"std": (0.2, -0.2, 0.2)}, r"'std\.1'"),
        ({"std": (0.2, 1e-9, 0.2)}, r"'std\.1'"),
        ({"std": (0.2, math.inf, math.nan)}, r"'std\.1'.*'std\.2'"),
        ({"size": 32}, r"'size'.*Expected size \(height, width\)"),
        ({"size": (32,)}, r"'size\.1'"),
        ({"size": (32, 32, 3)}, "'size'"),
        ({"size": (32.0, 32.5)}, r"'size\.1'"),
        ({"size": (0, 32)}, r"'size\.0'"),
        ({"size": (32, 10**9)}, r"'size\.1'"),
        ({"interpolation": "nearest"}, "'interpolation'.*'bicubic' or 'bilinear'"),
        ({"interpolation": 3}, "'interpolation'"),
        ({"resize_mode": "pad"}, "'resize_mode'.*'shortest' or 'squash'"),
        ({"resize_mode": None}, "'resize_mode'"),
        ({"crop": "centre"}, "'crop'"),
    ],
)
def test_what_cannot_be_right_is_refused(changed, words):
    with pytest.raises(mb.InputError, match=words):
        mb.Preprocess(**{"size": (32, 32), "mean": MEAN, "std": STD, **changed})


def test_what_models_have_is_accepted():
    mb.Preprocess((32, 48), (0, 0, 0), (1, 1, 1))
    mb.Preprocess((224, 224), MEAN, (1 / 255, 1 / 255, 1 / 255), "bilinear", "squash", "floor")


def picture(height, width, seed):
    """Of little contrast: where kernels overshoot, 8-bit images saturate between the passes."""
    rough = np.random.default_rng(seed).uniform(80, 170, (height // 3 + 2, width // 3 + 2, 3))
    small = Image.fromarray(rough.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def ours(preprocess, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return preprocess.normalise(preprocess.resize(pixels))[0]


def largest(preprocess, image, theirs):
    got = ours(preprocess, image)
    assert got.shape == theirs.shape
    return float(((got - theirs).abs() * torch.tensor(preprocess.std).view(3, 1, 1)).max())


SIDES = st.integers(8, 90)


@settings(max_examples=60)
@given(
    SIDES,
    SIDES,
    st.sampled_from([(24, 24), (23, 23), (24, 36), (40, 25)]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from(["shortest", "squash"]),
)
def test_pixels_are_those_of_open_clips_transform(height, width, size, filter_, mode):
    if size[0] != size[1] and mode == "shortest":
        filter_ = "bicubic"  # whatever is asked for: see openclip._preprocess
    image = picture(height, width, height * 100 + width)
    transform = image_transform_v2(
        PreprocessCfg(size, mean=MEAN, std=STD, interpolation=filter_, resize_mode=mode), False
    )
    preprocess = mb.Preprocess(size, MEAN, STD, filter_, mode)
    assert largest(preprocess, image, transform(image)) < LEVELS


@settings(max_examples=60)
@given(SIDES, SIDES, st.integers(16, 40))
def test_pixels_are_those_of_clips_image_processor(height, width, size):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    image = picture(height, width, height * 100 + width)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    preprocess = mb.Preprocess((size, size), MEAN, STD, crop="floor")
    assert largest(preprocess, image, theirs) < LEVELS


@settings(max_examples=40)
@given(SIDES, SIDES, st.integers(16, 40), st.integers(16, 40))
def test_pixels_are_those_of_siglips_image_processor(height, width, rows, columns):
    transformers = pytest.importorskip("transformers")
    size = {"height": rows, "width": columns}
    processor = transformers.SiglipImageProcessor(size=size, image_mean=MEAN, image_std=STD)
    image = picture(height, width, height * 100 + width)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    preprocess = mb.Preprocess((rows, columns), MEAN, STD, "bicubic", "squash", "floor")
    assert largest(preprocess, image, theirs) < LEVELS


@pytest.mark.parametrize("excess", range(9))
def test_both_ways_to_cut_the_centre(excess):
    """Without a resize the pixels are exact, and the two libraries differ at an excess of 3, 7."""
    from torchvision.transforms.functional import center_crop

    images = torch.rand(1, 3, 16, 16 + excess, generator=torch.Generator().manual_seed(0))
    nearest = mb.Preprocess((16, 16), MEAN, STD).resize(images)
    floor = mb.Preprocess((16, 16), MEAN, STD, crop="floor").resize(images)
    assert torch.equal(nearest, center_crop(images, [16, 16]))
    assert torch.equal(floor, images[..., excess // 2 :][..., :16])
    assert torch.equal(nearest, floor) == (excess % 4 != 3)


def test_the_record_names_the_cut_only_where_it_is_not_open_clips():
    from tests.conftest import ToyClip, wrap

    clip = wrap(ToyClip())
    assert "crop" not in clip.preprocessing()
    floor = mb.Preprocess((32, 32), MEAN, STD, crop="floor")
    other = mb.Clip(clip.module, clip.tokenizer, floor, "floor")
    assert other.preprocessing()["crop"] == "floor"


def test_lists_as_files_have_them_are_the_same_preprocessing():
    listed = mb.Preprocess([32, 32], [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    assert listed == mb.Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(mb.InputError, match="mean"):
        mb.Preprocess([32, 32], [0.5, 0.5], (0.25,) * 3)

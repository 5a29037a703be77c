"""Models in memory: wrapped, they score what the same model scores when it is loaded."""

import doctest

import open_clip
import pytest
import torch
from torchvision import transforms as steps

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from tests.models.test_transformers import clip_config, clip_tokenizer

ARCHITECTURE = "RN50-quickgelu"


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    model, train, evaluation = open_clip.create_model_and_transforms(ARCHITECTURE)
    return model, open_clip.get_tokenizer(ARCHITECTURE), evaluation, train


def test_a_model_of_open_clip_gives_the_library_s_own_answers(ours):
    model, tokenizer, transform, _ = ours
    clip = mb.Clip.from_open_clip(model, tokenizer, transform, name="mine")
    assert clip.preprocess == mb.load_model(f"{ARCHITECTURE}:random").preprocess
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        theirs = model.encode_image(clip.preprocess.normalise(images), normalize=True)
        text = model.encode_text(tokenizer(["a cat"]), normalize=True)
    assert torch.allclose(clip.image_features(images), theirs, atol=1e-6)
    assert torch.allclose(clip.text_features(["a cat"], torch.device("cpu")), text, atol=1e-6)
    assert repr(clip).startswith("Clip('mine', 102,")


def test_wrappers_and_half_precision_change_the_note_alone(ours):
    model, tokenizer, transform, _ = ours
    plain = mb.Clip.from_open_clip(model, tokenizer, transform, name="mine")
    wrapped = torch.nn.DataParallel(model)
    assert mb.Clip.from_open_clip(wrapped, tokenizer, transform, name="a").module is model
    half = torch.nn.DataParallel(open_clip.create_model(ARCHITECTURE).half())
    clip = mb.Clip.from_open_clip(half, tokenizer, transform, name="mine")
    assert "float16" in clip.notes[0]
    assert next(half.parameters()).dtype == torch.float16
    assert next(clip.module.parameters()).dtype == torch.float32
    assert plain.notes == ()


def transform_of(size, *more):
    return steps.Compose(
        [
            steps.Resize(size, interpolation=steps.InterpolationMode.BICUBIC),
            steps.CenterCrop(size),
            *more,
            steps.ToTensor(),
            steps.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda image: image, "of no Compose"),
        (steps.Compose([steps.ToTensor(), steps.Normalize(0.5, 0.25)]), "ToTensor, Normalize"),
        (transform_of(224, steps.RandomHorizontalFlip()), "RandomHorizontalFlip"),
        (transform_of(224, steps.Grayscale(3)), "other pixels"),
        (transform_of(64), "takes \\(224, 224\\)"),
    ],
)
def test_a_transform_that_is_not_the_model_s_is_refused(ours, transform, words):
    model, tokenizer, _, _ = ours
    with pytest.raises(InputError, match=words):
        mb.Clip.from_open_clip(model, tokenizer, transform, name="mine")


def test_the_transform_for_training_is_refused(ours):
    model, tokenizer, _, train = ours
    with pytest.raises(InputError, match="for evaluation"):
        mb.Clip.from_open_clip(model, tokenizer, train, name="mine")


def test_the_example_of_the_docstring():
    names = {"mb": mb, "open_clip": open_clip}
    (example,) = doctest.DocTestFinder(recurse=False).find(
        mb.Clip.from_open_clip, "from_open_clip", globs=names
    )
    assert not doctest.DocTestRunner().run(example).failed


def test_a_model_of_transformers_is_the_one_that_load_model_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.CLIPModel(clip_config()).eval()
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = transformers.CLIPProcessor(images, clip_tokenizer())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = mb.load_model(f"transformers:{tmp_path}")
    clip = mb.Clip.from_transformers(model, processor, name="mine")
    assert clip.preprocess == loaded.preprocess
    assert clip.digest == loaded.digest

"""What weights do not say is assumed, said in a warning, and kept in the notes of the model."""

import json
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import mmtard_bench as mb
from mmtard_bench.models import assumptions
from tests.models.conftest import trained
from tests.models.toys import TEXT, VIT

OPENAI = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
RULES = {"interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def tags(monkeypatch):
    """Pretrained tags for the toy architectures, whose preprocessing the test names."""

    def register(**configs):
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: [*configs])
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: configs.get(tag, {}))

    return register


def load(spec):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        clip = mb.load_model(spec)
    return clip, [str(warning.message) for warning in said]


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(trained("toy-rn:random"), tmp_path / "w.pt")
    return f"toy-rn:{tmp_path / 'w.pt'}"


def test_all_tags_agree_so_their_preprocessing_is_taken(checkpoint, tags):
    tags(one={**HALF, **RULES}, two={**HALF, **RULES, "hf_hub": "me/two"})
    clip, said = load(checkpoint)
    assert clip.preprocess == mb.Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", "squash")
    assert said == []
    (note,) = clip.notes
    assert "all pretrained tags of toy-rn: mean (0.5, 0.5, 0.5)" in note
    assert clip.config["preprocess_cfg"]["mean"] == [0.5] * 3


def test_tags_that_differ_are_named_and_the_default_is_taken(checkpoint, tags):
    tags(one=HALF, two=HALF, three={**HALF, **RULES})
    clip, said = load(checkpoint)
    assert [*clip.preprocess.mean] == OPENAI["mean"]
    (text,) = said
    assert "open_clip's default" in text
    assert "one, two: mean (0.5, 0.5, 0.5)" in text
    assert "three: mean (0.5, 0.5, 0.5), deviation (0.5, 0.5, 0.5), bilinear, squash" in text
    assert "open_clip_config.json" in text
    (note,) = clip.notes
    assert note in text
    assert "as the tags of toy-rn differ" in note


def test_an_architecture_without_tags(checkpoint):
    clip, said = load(checkpoint)
    assert [*clip.preprocess.mean] == OPENAI["mean"]
    assert "toy-rn has no pretrained tags" in said[0]
    assert len(said) == len(clip.notes) == 1
    # Nothing was trained with any preprocessing, so nothing needs to be said; the record has it.
    clip, said = load("toy-rn:random")
    assert said == []
    assert "assumed" in clip.notes[0]


@pytest.mark.parametrize("architecture", ["MobileCLIP-S1", "ViT-B-16-SigLIP"])
def test_real_architectures_whose_tags_agree(architecture):
    tag = open_clip.list_pretrained_tags_by_model(architecture)[0]
    rules, (note,) = assumptions.preprocessing_without_tag("x", architecture, file=True)
    config = open_clip.get_pretrained_cfg(architecture, tag)
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert rules[key] == config[key]
    assert f"all pretrained tags of {architecture}" in note


def test_a_tag_assumes_nothing(tmp_path, tags, monkeypatch):
    torch.save(trained("toy-vit:random"), tmp_path / "w.pt")
    own = {**HALF, **RULES, "quick_gelu": True, "hf_hub": "", "url": ""}
    tags(mine=own)
    fetch = lambda _: str(tmp_path / "w.pt")  # noqa: E731
    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    clip, said = load("toy-vit:mine")
    assert (clip.notes, said) == ((), [])
    assert clip.preprocess.resize_mode == "squash"
    assert type(clip.module.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("architecture", ["toy-vit", "toy-vit-quickgelu"])
def test_an_architecture_with_a_twin(tmp_path, architecture):
    torch.save(trained(f"{architecture}:random"), tmp_path / "w.pt")
    clip, said = load(f"{architecture}:{tmp_path / 'w.pt'}")
    (text,) = (text for text in said if "activation" in text)
    other = "toy-vit" if "quick" in architecture else "toy-vit-quickgelu"
    assert f"write {other}:FILE" in text
    assert sum("activation" in note for note in clip.notes) == 1
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-1", eps="1/255", n=4)
    assert [*clip.notes] == [*record.notes]


def folder(path, preprocess):
    path.mkdir()
    config = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
    body = {"model_cfg": config, **({} if preprocess is None else {"preprocess_cfg": preprocess})}
    (path / "open_clip_config.json").write_text(json.dumps(body))
    save_file(trained("toy-vit:random"), path / "open_clip_model.safetensors")
    return f"local-dir:{path}"


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        (None, ["no mean and no std", "mean (0.48"]),
        ({}, ["no mean and no std"]),
        ({"mean": [0.5] * 3}, ["has no std"]),
        ({**HALF, "std": None}, ["has no std"]),
        ({**HALF, "size": 64}, ["the size 64", "takes 32 x 32"]),
        ({**HALF, "size": [32, 64]}, ["the size [32, 64]"]),
    ],
)
def test_a_folder_that_is_silent_or_contradicts_itself(tmp_path, preprocess, words):
    clip, (text,) = load(folder(tmp_path / "m", preprocess))
    assert clip.preprocess.size == (32, 32)
    assert clip.notes[0] in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("preprocess", "mean"),
    [({**HALF, "size": 32}, 0.5), ({**HALF, "size": [32, 32], **RULES}, 0.5),
     ({"mean": 0.25, "std": 1, "size": 32}, 0.25), ({"mean": [0, 0, 0], "std": [1, 1, 1]}, 0.0)],
)  # fmt: skip
def test_a_folder_that_says_it_all(tmp_path, preprocess, mean):
    clip, said = load(folder(tmp_path / "m", preprocess))
    assert (clip.notes, said) == ((), [])
    assert clip.preprocess.mean == (mean,) * 3


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        ({**HALF, "mean": [123.675, 116.28, 103.53]}, r"'mean\.0'.*by 255"),
        ({**HALF, "mean": "a"}, r"'mean\.0'"),
        ({**HALF, "mean": [0.5, 0.5]}, r"'mean\.2'"),
        ({**HALF, "mean": [0.5, float("nan"), 0.5]}, r"'mean\.1'"),
        ({**HALF, "std": [0.5, 0, 0.5]}, r"'std\.1'"),
        ({**HALF, "std": [0.5, float("inf"), 0.5]}, r"'std\.1'"),
        ({**HALF, "std": -1}, r"'std\.0'"),
        ({**HALF, "std": {"r": 1}}, r"'std\.0'"),
        ({**HALF, "interpolation": "random"}, "'interpolation'"),
        ({**HALF, "resize_mode": "longest"}, "'resize_mode'"),
        ([1], "preprocess_cfg"),
    ],
)
def test_a_folder_that_cannot_be_right(tmp_path, preprocess, words):
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(folder(tmp_path / "m", preprocess))

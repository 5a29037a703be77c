"""The activation that a model was trained with: it has no weights, and the wrong one costs."""

import json
import shutil
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import mmtard_bench as mb
from mmtard_bench.models import openclip
from tests.models.conftest import trained, visual_of

# Weights in files are of no tag, so their preprocessing is assumed: see test_assumptions.py.
pytestmark = pytest.mark.filterwarnings("ignore:.*The preprocessing is assumed")


def in_openais_format(state):
    """As OpenAI's archives name their weights, which are half precision: three sizes beside."""
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return half | {key: torch.tensor(value) for key, value in sizes.items()}


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def quiet(spec):
    """Load, where any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*The preprocessing is assumed")
        return mb.load_model(spec)


def assumed(spec, activation, hint=""):
    """Load, where the activation is not known, and a warning and a note of the model say so."""
    with pytest.warns(
        UserWarning, match=f"assumed to be {activation}, that of toy-vit{hint}"
    ) as said:
        clip = mb.load_model(spec)
    assert any(activation in note for note in clip.notes)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == len(set(texts))
    return clip


def test_the_activation_changes_the_answers(tmp_path):
    torch.save(trained("toy-vit:random"), tmp_path / "w.pt")
    plain = assumed(f"toy-vit:{tmp_path / 'w.pt'}", "GELU")
    quick = assumed(f"toy-vit-quickgelu:{tmp_path / 'w.pt'}", "QuickGELU")
    assert plain.module.visual.proj.equal(quick.module.visual.proj)
    assert (plain.image_features(images()) - quick.image_features(images())).abs().max() > 1e-4
    assert plain.digest != quick.digest


def test_openais_own_format_gets_quick_gelu_and_says_so(tmp_path):
    state = trained("toy-vit:random")
    torch.save(in_openais_format(state), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"w\.pt is in OpenAI's own format.*QuickGELU"):
        clip = mb.load_model(f"toy-vit:{tmp_path / 'w.pt'}")
    known = quiet(f"toy-vit-quickgelu:{tmp_path / 'w.pt'}")
    assert clip.digest == known.digest
    assert torch.equal(clip.image_features(images()), known.image_features(images()))
    assert clip.config["model_cfg"]["quick_gelu"]
    for key, value in clip.module.state_dict().items():
        assert value.dtype == state[key].dtype
        assert value.equal(state[key].half().to(value.dtype)), key


def test_a_real_architecture_in_openais_format(tmp_path):
    state = mb.load_model("RN50:random").module.state_dict()
    torch.save({"state_dict": in_openais_format(state)}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="OpenAI's own format"):
        clip = mb.load_model(f"RN50:{tmp_path / 'w.pt'}")
    blocks = clip.module.transformer.resblocks
    assert type(blocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_a_file_whose_path_says_openai_is_a_warning_and_no_change(tmp_path):
    folder = tmp_path / "ViT_openai_imagenet" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(trained("toy-vit:random"), folder / "final.pt")
    clip = assumed(f"toy-vit:{folder / 'final.pt'}", "GELU", hint="; it seems to come")
    assert not clip.config["model_cfg"].get("quick_gelu")
    assert type(clip.module.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assumed(f"toy-vit-quickgelu:{folder / 'final.pt'}", "QuickGELU")


def test_a_tower_whose_path_says_openai_on_a_base_without_quick_gelu(tmp_path):
    for base, expected in (("toy-vit", True), ("toy-vit-quickgelu", False), ("toy-rn", False)):
        path = tmp_path / f"{base}-OpenAI-tecoa.pt"
        torch.save(visual_of(trained(f"{base}:random")), path)
        if expected:
            with pytest.warns(UserWarning, match="QuickGELU"):
                mb.load_model(f"{base}:random+visual:{path}")
        else:  # the towers of ResNets have no such activation
            quiet(f"{base}:random+visual:{path}")


def test_a_tower_in_openais_format_on_a_base_without_quick_gelu(tmp_path):
    base = mb.load_model("toy-vit:random").module.state_dict()
    torch.save(in_openais_format(base), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"w\.pt seems to come from OpenAI's models"):
        mb.load_model(f"toy-vit:random+visual:{tmp_path / 'w.pt'}")
    quiet(f"toy-vit-quickgelu:random+visual:{tmp_path / 'w.pt'}")


def test_a_directory_whose_name_says_openai(tmp_path):
    folder = tmp_path / "vit-openai"
    folder.mkdir()
    config = open_clip.get_model_config("toy-vit")
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    body = {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    save_file(trained("toy-vit:random"), folder / "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="set quick_gelu in open_clip_config.json"):
        plain = mb.load_model(f"local-dir:{folder}")
    body["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    quick = quiet(f"local-dir:{folder}")
    assert plain.digest != quick.digest
    shutil.move(folder, tmp_path / "other")
    assert quiet(f"local-dir:{tmp_path / 'other'}").digest == quick.digest


@pytest.mark.parametrize(
    ("tag", "expected"),
    [({"quick_gelu": True}, "QuickGELU"), ({"quick_gelu": False}, "GELU"), ({}, "GELU")],
)
def test_tags_say_it(tmp_path, monkeypatch, tag, expected):
    path = tmp_path / "openai.pt"
    torch.save(trained("toy-vit:random"), path)
    tag = {"file": str(path), "hf_hub": "", "url": "", **tag}
    for place in (open_clip, open_clip.factory):
        monkeypatch.setattr(place, "get_pretrained_cfg", lambda *_: tag)
    monkeypatch.setattr(openclip.open_clip, "list_pretrained_tags_by_model", lambda _: ["mine"])
    clip = quiet("toy-vit:mine")
    assert type(clip.module.visual.transformer.resblocks[0].mlp.gelu).__name__ == expected
    assert bool(clip.config["model_cfg"].get("quick_gelu")) == (expected == "QuickGELU")


def test_open_clip_knows_it_of_openais_weights_and_not_of_laions():
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["quick_gelu"]
    assert not open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k").get("quick_gelu")


def test_the_command_line_shows_the_warning_as_one_line(here, tmp_path):
    torch.save(visual_of(trained("toy-vit:random")), tmp_path / "openai.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = here("run", "quick-v1", "--model", "toy-vit:random+visual:openai.pt+lora:nowhere")
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[0].startswith("warning: 'toy-vit:random+visual:openai.pt+lora:nowhere': openai.pt")
    assert said[1].startswith("mmtard-bench: 'toy-vit:random+visual:openai.pt+lora:nowhere'")
    assert len(said) == 2

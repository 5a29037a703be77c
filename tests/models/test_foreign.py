"""What comes with a model runs no code, names no files elsewhere, and asks for no endless work."""

import builtins
import io
import json
import os
import sys

import pytest
import torch
from open_clip import CustomTextCLIP
from safetensors.torch import load_file, save_file

import mmtard_bench as mb
from mmtard_bench.models import weights
from mmtard_bench.train.make.text_table import sentence_encoder
from tests.hub import hub
from tests.models.conftest import trained
from tests.models.test_transformers import clip_tokenizer, make, rewrite
from tests.models.toys import TEXT, VIT

transformers = pytest.importorskip("transformers")

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
EVIL = "open('hacked', 'w').close()\nraise SystemExit\n"
BERT = {
    "vocab_size": 600,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch, tmp_path):
    """A "y" is on standard input, and reading it is a failure."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    yield
    assert asked == []
    assert not (tmp_path / "hacked").exists()


def open_clip_folder(folder, text=TEXT, vision=VIT, state=None, **more):
    folder.mkdir(parents=True)
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text, **more}
    config = {"model_cfg": model, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state or trained("toy-vit:random"), folder / "open_clip_model.safetensors")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def text_repository(folder, config="config.json", **changes):
    """A text tower of transformers' with a tokenizer, of which one file is changed."""
    transformers.BertConfig(**BERT).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL)
    if changes:
        rewrite(config, **changes)(folder)
    return files(folder)


HF_TEXT = {
    "hf_model_name": "me/text",
    "hf_tokenizer_name": "me/text",
    "hf_pooler_type": "mean_pooler",
    "hf_proj_type": "linear",
    "context_length": 20,
}


def hf_state(folder):
    torch.manual_seed(1)
    text = {**HF_TEXT, "hf_model_name": str(folder), "hf_model_pretrained": False}
    return CustomTextCLIP(embed_dim=12, vision_cfg=VIT, text_cfg=text).state_dict()


def test_a_text_tower_and_a_tokenizer_of_the_hub(tmp_path, online):
    (tmp_path / "text").mkdir()
    repository = text_repository(tmp_path / "text")
    folder = open_clip_folder(tmp_path / "m", HF_TEXT, state=hf_state(tmp_path / "text"))
    with hub({"models:me/text": repository, "models:me/m": files(folder)}) as endpoint:
        online(endpoint)
        clip = mb.load_model("hf-hub:me/m")
    tokens = clip.tokenizer(["a photo of a cat"])
    assert tokens.shape == (1, 20)
    state = load_file(folder / "open_clip_model.safetensors")
    assert all(value.equal(state[key]) for key, value in clip.module.state_dict().items())
    assert clip.config["model_cfg"]["text_cfg"]["hf_model_name"] == "me/text"


CODE = {
    "a tower": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"},
    "a known tower": {"auto_map": {"AutoModel": "them/evil--evil.M"}},
    "a kernel": {"attn_implementation": "them/kernels"},
}
TOKENIZER_CODE = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "Evil"}


@pytest.mark.parametrize("what", ["tokenizer", *CODE])
@pytest.mark.parametrize("local", [False, True])
def test_code_behind_an_open_clip_configuration(tmp_path, online, what, local):
    (tmp_path / "text").mkdir()
    text = {**TEXT, "hf_tokenizer_name": "me/text"}
    if what == "tokenizer":
        repository = text_repository(tmp_path / "text", "tokenizer_config.json", **TOKENIZER_CODE)
    else:
        text = HF_TEXT
        repository = text_repository(tmp_path / "text", **CODE[what])
    folder = open_clip_folder(tmp_path / "m", text)
    if local:  # there the tokenizer lies beside
        for name, data in repository.items():
            (folder / name).write_bytes(data)
    with hub({"models:me/text": repository, "models:me/m": files(folder)}) as endpoint:
        online(endpoint)
        spec = f"local-dir:{folder}" if local else "hf-hub:me/m"
        with pytest.raises(mb.InputError, match="asks for code that comes with the model"):
            mb.load_model(spec)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.M"}}),
        ("config.json", {"auto_map": {"AutoModel": "evil.M"}, "model_type": "evil"}),
        ("config.json", {"_attn_implementation": "them/kernel:evil"}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "evil.C"}}}),
        ("tokenizer_config.json", TOKENIZER_CODE),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}),
    ],
)
def test_code_in_a_folder_of_transformers(tmp_path, name, changes):
    make(tmp_path / "m")
    (tmp_path / "m" / "evil.py").write_text(EVIL)
    rewrite(name, **changes)(tmp_path / "m")
    with pytest.raises(mb.InputError, match=f"{name} asks for code"):
        mb.load_model(f"transformers:{tmp_path / 'm'}")


def test_code_in_a_processor(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "e.P"}}')
    with pytest.raises(mb.InputError, match=r"processor_config\.json asks for code"):
        mb.load_model(f"transformers:{tmp_path / 'm'}")


def test_code_in_a_sentence_encoder(tmp_path):
    (tmp_path / "text").mkdir()
    text_repository(tmp_path / "text", auto_map={"AutoModel": "evil.M"})
    with pytest.raises(mb.InputError, match=r"--encoder .* asks for code"):
        sentence_encoder(tmp_path / "text")


def test_an_adapter_that_names_another_model(tmp_path):
    make(tmp_path / "other")
    make(tmp_path / "m")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other")}
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(mb.InputError, match=r"holds a peft adapter.*\+lora:DIR"):
        mb.load_model(f"transformers:{tmp_path / 'm'}")


@pytest.mark.parametrize(
    ("text", "vision", "words"),
    [
        ({"hf_model_name": "../text"}, {}, "may not name files of this machine"),
        ({"hf_model_name": "a/b/c"}, {}, "expected ORG/NAME"),
        ({"hf_model_name": 3}, {}, "expected ORG/NAME"),
        ({"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, {}, "tokenizer_kwargs"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, {}, "asks for code"),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, {}, "tokenizer_kwargs"),
        ({"tokenizer_kwargs": [1]}, {}, "tokenizer_kwargs"),
        ({"context_length": 10**9}, {}, "context_length 1000000000"),
        ({"context_length": "long"}, {}, "context_length long"),
        ({}, {"timm_model_name": "hf-hub:them/evil"}, "timm's own names"),
        ({}, {"timm_model_name": "local-dir:/tmp"}, "timm's own names"),
        ({}, {"timm_model_name": "no_such_tower"}, "makes no model"),
        ({}, {"layers": 10**9}, "1000000000 layers"),
        ({}, {"layers": [1, 1, 10**9, 1]}, "1000000000 layers"),
        ({"layers": 1e12}, {}, "1000000000000.0 layers"),
        ({}, {"layers": -1}, "do not fit|makes no model"),
        ({}, {"layers": "2"}, "makes no model"),
        ({}, {"width": 10**9}, "makes no model"),
        ({"width": 10**7}, {}, "do not fit"),
        ({"vocab_size": 10**12}, {}, "do not fit"),
        ({}, {"image_size": 10**6}, "do not fit"),
        ({}, {"image_size": 10**30}, "makes no model"),
        ({}, {"patch_size": 0}, "makes no model"),
        ({}, {"colour": 1}, "makes no model"),
    ],
)
def test_configurations_that_ask_for_too_much(tmp_path, text, vision, words):
    folder = open_clip_folder(tmp_path / "m", {**TEXT, **text}, {**VIT, **vision})
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"local-dir:{folder}")


def test_a_folder_without_the_tokenizer_that_it_names(tmp_path):
    folder = open_clip_folder(tmp_path / "m", {**TEXT, "hf_tokenizer_name": "me/text"})
    with pytest.raises(mb.InputError, match=r"the tokenizer 'me/text', but .* has none of"):
        mb.load_model(f"local-dir:{folder}")


def test_a_tokenizer_elsewhere_on_this_machine(tmp_path, online):
    (tmp_path / "text").mkdir()
    text_repository(tmp_path / "text")
    text = {**TEXT, "hf_tokenizer_name": str(tmp_path / "text")}
    folder = open_clip_folder(tmp_path / "m", text)
    with hub({"models:me/m": files(folder)}) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match="may not name files of this machine"):
            mb.load_model("hf-hub:me/m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"num_hidden_layers": 10**9}}, "1000000000 layers"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "1000000000 layers"),
        ({"text_config": {"vocab_size": 10**12}}, "asks for a model of"),
        ({"vision_config": {"hidden_size": 10**6}}, "asks for a model of"),
    ],
)
def test_absurd_sizes_of_transformers(tmp_path, changes, words):
    make(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    for key, values in changes.items():
        body[key] |= values
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"transformers:{tmp_path}")


@pytest.mark.parametrize("how", ["index", "config"])
def test_weights_elsewhere(tmp_path, how):
    make(tmp_path / "m")
    make(tmp_path / "other", hidden_act="gelu")
    elsewhere = "../other/model.safetensors"
    if how == "config":
        rewrite("config.json", transformers_weights=elsewhere)(tmp_path / "m")
    else:
        names = load_file(tmp_path / "m" / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, elsewhere)}
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(mb.InputError, match=f"name other weights.*{elsewhere}"):
        mb.load_model(f"transformers:{tmp_path / 'm'}")


def test_weights_in_several_files(tmp_path):
    model = make(tmp_path / "m")
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    (tmp_path / "m" / "model.safetensors").unlink()
    for path in (tmp_path / "parts").glob("model*"):
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    clip = mb.load_model(f"transformers:{tmp_path / 'm'}")
    assert clip.module.visual.visual_projection.weight.equal(model.visual_projection.weight)


@pytest.mark.parametrize(
    "place", ["toy-vit:{}", "toy-vit:random+visual:{}", "local-dir:", "transformers:", "+lora:"]
)
def test_a_pipe_or_a_device_in_place_of_a_file(tmp_path, place):
    if place == "local-dir:":
        folder = open_clip_folder(tmp_path / "m")
        pipe, spec = folder / "open_clip_model.safetensors", f"local-dir:{folder}"
    elif place == "transformers:":
        make(tmp_path / "m")
        pipe, spec = tmp_path / "m" / "model.safetensors", f"transformers:{tmp_path / 'm'}"
    elif place == "+lora:":
        (tmp_path / "m").mkdir()
        pipe, spec = tmp_path / "m" / "adapter_config.json", f"toy-vit:random+lora:{tmp_path / 'm'}"
    else:
        pipe = tmp_path / "w.pt"
        spec = place.format(pipe)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(mb.InputError, match="is a pipe or a device"):
        mb.load_model(spec)
    pipe.unlink()
    pipe.symlink_to("/dev/zero")
    with pytest.raises(mb.InputError, match="is a pipe or a device"):
        mb.load_model(spec)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_many_tensors(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(weights, "MOST_TENSORS", 500)
    monkeypatch.setattr(weights, "LARGEST_INDEX", 40_000)
    path = tmp_path / f"w.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save({f"layer.{i}.weight": torch.zeros(16) for i in range(1000)}, path)
    with pytest.raises(mb.InputError, match="names its tensors in more than 40000 bytes, or more"):
        mb.load_model(f"toy-vit:{path}")
    # One storage for all of them: few entries in the archive, but as many names.
    one = torch.zeros(16)
    torch.save({f"layer.{i}.weight": one for i in range(2000)}, tmp_path / "shared.pt")
    with pytest.raises(mb.InputError, match="names its tensors"):
        mb.load_model(f"toy-vit:{tmp_path / 'shared.pt'}")


def test_large_configurations(tmp_path, monkeypatch):
    folder = open_clip_folder(tmp_path / "m")
    monkeypatch.setattr(weights, "LARGEST_CONFIG", 100)
    with pytest.raises(mb.InputError, match="a configuration has 100 at most"):
        mb.load_model(f"local-dir:{folder}")


def test_several_weights_and_none_of_the_usual_name(tmp_path):
    folder = open_clip_folder(tmp_path / "m")
    one = folder / "epoch1.safetensors"
    (folder / "open_clip_model.safetensors").rename(one)
    assert mb.load_model(f"local-dir:{folder}").digest
    (folder / "epoch2.pt").write_bytes(one.read_bytes())
    with pytest.raises(mb.InputError, match=r"2 weights files, epoch1\.safetensors, epoch2\.pt"):
        mb.load_model(f"local-dir:{folder}")


def test_a_revision_of_the_hub(tmp_path, online):
    from tests.hub import COMMIT

    asked = []
    repository = {"models:me/m": files(open_clip_folder(tmp_path / "m"))}
    with hub(repository, asked=asked) as endpoint:
        online(endpoint)
        spec = f"hf-hub:me/m@{COMMIT}"
        clip = mb.load_model(spec)
        assert (clip.source, clip.digest) == (spec, mb.load_model("hf-hub:me/m@v1").digest)
    assert any(line.endswith("/revision/v1") for line in asked)
    files_asked = [line for line in asked if "/resolve/" in line]
    assert files_asked
    assert all(f"/resolve/{COMMIT}/" in line for line in files_asked)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, "read at the largest token, 326, 328, 341, but the tokenizer ends texts with 1"),
        ({"pool_type": "eos", "eos_id": 7}, "read at token, 7, but"),
        ({"pool_type": "first"}, "have the same embedding"),
        ({"pool_type": "last", "vocab_size": 100}, "the text tower knows tokens below 100"),
        ({"pool_type": "eos", "eos_id": 1}, ""),
        ({"pool_type": "last"}, ""),
    ],
)
def test_where_a_text_tower_of_open_clip_is_read(tmp_path, text, words):
    text = {**TEXT, "vocab_size": 600, "hf_tokenizer_name": "me/text", "context_length": 20} | text
    torch.manual_seed(0)
    module = CustomTextCLIP(embed_dim=12, vision_cfg=VIT, text_cfg=dict(text))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    folder = open_clip_folder(tmp_path / "m", text, state=state, custom_text=True)
    clip_tokenizer().save_pretrained(folder)
    if not words:
        assert mb.load_model(f"local-dir:{folder}").tokenizer(["a cat"]).shape == (1, 20)
        return
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"local-dir:{folder}")

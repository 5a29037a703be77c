"""CLIP and SigLIP of transformers: the library's own logits are the reference."""

import json
import logging
import sys
import warnings

import numpy as np
import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.models.towers import with_visual
from tests.cli.test_bad_input import SUITE
from tests.hub import COMMIT, hub

transformers = pytest.importorskip("transformers")

LENGTH, TOKENS = 32, 520
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    **VISION,
    "vocab_size": TOKENS,
    "max_position_embeddings": LENGTH,
    "projection_size": 24,
}
TEXTS = ["a cat", "a", "a cat that is longer than what fits"]


def clip_config(**changes):
    text = {**TEXT, "eos_token_id": 1, "bos_token_id": 0, "projection_dim": 20}
    vision = {**VISION, "projection_dim": 20}
    return transformers.CLIPConfig(
        text_config={**text, **changes}, vision_config={**vision, **changes}, projection_dim=20
    )


def siglip_config():
    return transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)


def clip_tokenizer():
    """Of CLIP's kind, without merges: every byte is a token, another one at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])


def siglip_tokenizer():
    """SigLIP's own needs a SentencePiece file; what matters here is how it pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"</s>": 1, "a": 2, "cat": 3, "<u>": 4}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", eos_token="</s>", padding_side="left"
    )


def processor(kind, **changes):
    if kind == "clip":
        sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        return transformers.CLIPImageProcessor(**{**sides, **changes})
    return transformers.SiglipImageProcessor(**{"size": {"height": 32, "width": 32}, **changes})


def make(folder, kind="clip", **changes):
    """A directory with an untrained model, its tokenizer and its image processor."""
    torch.manual_seed(0)
    if kind == "clip":
        model, tokenizer = transformers.CLIPModel(clip_config(**changes)), clip_tokenizer()
    else:
        model, tokenizer = transformers.SiglipModel(siglip_config()), siglip_tokenizer()
        torch.nn.init.constant_(model.logit_scale, 2.0)
        torch.nn.init.constant_(model.logit_bias, -3.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return model.eval()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_logits_are_the_librarys_own(tmp_path, kind):
    model = make(tmp_path, kind)
    spec = f"transformers:{tmp_path}"
    clip = mb.load_model(spec)
    assert (clip.name, clip.source) == (spec, spec)
    # The library's own way from pictures and texts to logits.
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    inputs = processor(kind)(images=list(pictures), return_tensors="pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.padding_side = "right"
    texts = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        # SigLIP is called as its documentation says: without a mask.
        mask = {"attention_mask": texts["attention_mask"]} if kind == "clip" else {}
        answer = model(input_ids=texts["input_ids"], **mask, **inputs)
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
        cosine = clip.image_features(images) @ clip.text_features(TEXTS, torch.device("cpu")).T
        ours = clip.scale() * cosine
    bias = model.logit_bias.detach() if kind == "siglip" else 0
    assert answer.logits_per_image.std() > 0.1
    torch.testing.assert_close(ours + bias, answer.logits_per_image, rtol=1e-4, atol=1e-4)
    assert clip.tokenizer(TEXTS).shape == (3, LENGTH)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_are_resized_as_the_library_does(tmp_path, kind):
    make(tmp_path, kind)
    clip = mb.load_model(f"transformers:{tmp_path}")
    rough = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(rough, (48, 64), mode="bilinear")
    pixels = (pixels * 255).round()
    theirs = processor(kind)(images=pixels[0].byte(), return_tensors="pt")["pixel_values"]
    ours = clip.preprocess.normalise(clip.preprocess.resize(pixels / 255))
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    # They round to 8 bits between resizing and normalising; we do not.
    assert (ours - theirs).abs().max() < 2.5 / 255 / min(clip.preprocess.std)


def test_the_same_weights_in_open_clips_layout(tmp_path):
    """CLIP's padding needs no mask: open_clip pads with zeros, and the answer is the same."""
    from open_clip.model import CLIP

    model = make(tmp_path, hidden_act="quick_gelu")
    theirs = CLIP(
        embed_dim=20,
        quick_gelu=True,
        vision_cfg={"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8,
                    "mlp_ratio": 2.0},
        text_cfg={"context_length": LENGTH, "vocab_size": TOKENS, "width": 24, "heads": 2,
                  "layers": 2, "mlp_ratio": 2.0},
    ).eval()  # fmt: skip
    theirs.load_state_dict(open_clip_names(model.state_dict()))
    clip = mb.load_model(f"transformers:{tmp_path}")
    images, tokens = torch.rand(2, 3, 32, 32), clip.tokenizer(TEXTS)
    ends = tokens.eq(1).int().argmax(1)
    zeros = torch.where(torch.arange(LENGTH) > ends[:, None], 0, tokens)
    # open_clip reads the text's embedding at the largest token.
    zeros[torch.arange(3), ends] = TOKENS - 1
    with torch.no_grad():
        theirs.token_embedding.weight[-1] = theirs.token_embedding.weight[1]
        torch.testing.assert_close(
            clip.module.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            clip.module.encode_text(tokens), theirs.encode_text(zeros), rtol=1e-4, atol=1e-4
        )


def open_clip_names(state):
    """The state dict of a CLIPModel under open_clip's names."""
    made = {"logit_scale": state["logit_scale"]}
    made["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    made["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    made["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    made["visual.proj"] = state["visual_projection.weight"].T
    made["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    made["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    made["text_projection"] = state["text_projection.weight"].T
    for part in ("weight", "bias"):
        made[f"visual.ln_pre.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        made[f"visual.ln_post.{part}"] = state[f"vision_model.post_layernorm.{part}"]
        made[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
        for theirs, ours in (("text_model", ""), ("vision_model", "visual.")):
            for i in range(2):
                a = f"{theirs}.encoder.layers.{i}."
                b = f"{ours}transformer.resblocks.{i}."
                qkv = [state[f"{a}self_attn.{x}_proj.{part}"] for x in "qkv"]
                made[f"{b}attn.in_proj_{part}"] = torch.cat(qkv)
                made[f"{b}attn.out_proj.{part}"] = state[f"{a}self_attn.out_proj.{part}"]
                made[f"{b}ln_1.{part}"] = state[f"{a}layer_norm1.{part}"]
                made[f"{b}ln_2.{part}"] = state[f"{a}layer_norm2.{part}"]
                made[f"{b}mlp.c_fc.{part}"] = state[f"{a}mlp.fc1.{part}"]
                made[f"{b}mlp.c_proj.{part}"] = state[f"{a}mlp.fc2.{part}"]
    return made


def test_half_precision_and_pickled_weights(tmp_path):
    model = make(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    for path in (tmp_path / "safe").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "bin" / path.name).write_bytes(path.read_bytes())
    half = {key: value.half() for key, value in model.state_dict().items()}
    torch.save(half, tmp_path / "bin" / "pytorch_model.bin")
    clip = mb.load_model(f"transformers:{tmp_path / 'bin'}")
    assert all(p.dtype == torch.float32 for p in clip.module.parameters())
    state = clip.module.visual.state_dict()
    assert all(v.equal(half[k].float()) for k, v in state.items())


@pytest.mark.filterwarnings("ignore:.*w.pt is more than an image tower")
def test_the_tower_can_be_replaced_and_attacked(tmp_path):
    make(tmp_path / "a")
    other = make(tmp_path / "b", hidden_act="gelu").state_dict()
    torch.save({k: v + 0.1 for k, v in other.items()}, tmp_path / "w.pt")
    spec = f"transformers:{tmp_path / 'a'}+visual:{tmp_path / 'w.pt'}"
    clip = mb.load_model(spec)
    state = clip.module.visual.state_dict()
    assert all(v.equal(other[k] + 0.1) for k, v in state.items())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    clip.image_features(images)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0
    with pytest.raises(mb.InputError, match="does not fit the image tower"):
        torch.save({"vision_model.x": torch.zeros(1)}, tmp_path / "w.pt")
        with_visual(clip, tmp_path / "w.pt", "x")


def test_openai_weights_without_quick_gelu_are_a_warning(tmp_path):
    make(tmp_path / "openai-ft", hidden_act="gelu")
    with pytest.warns(UserWarning, match="hidden_act gelu"):
        plain = mb.load_model(f"transformers:{tmp_path / 'openai-ft'}")
    make(tmp_path / "openai-quick", hidden_act="quick_gelu")
    quick = mb.load_model(f"transformers:{tmp_path / 'openai-quick'}")
    images = torch.rand(2, 3, 32, 32)
    assert (plain.image_features(images) - quick.image_features(images)).abs().max() > 1e-3
    assert plain.digest != quick.digest


def rewrite(name, **changes):
    def change(folder):
        body = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**body, **changes}))

    return change


def rewrite_text(**changes):
    def change(folder):
        body = json.loads((folder / "config.json").read_text())
        body["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(body))

    return change


@pytest.mark.parametrize("change", [{"num_attention_heads": 1}, {"layer_norm_eps": 0.1}])
def test_what_decides_answers_beyond_weights_is_in_the_digest(tmp_path, change):
    make(tmp_path)
    before = mb.load_model(f"transformers:{tmp_path}")
    assert mb.load_model(f"transformers:{tmp_path}").digest == before.digest
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert all(text[key] != value for key, value in change.items())
    rewrite_text(**change)(tmp_path)
    assert mb.load_model(f"transformers:{tmp_path}").digest != before.digest


def drop_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights | {"extra": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "could not be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"<!DOCTYPE html>"), "web page"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "could not be loaded"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "could not be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "expected one of tokenizer.json"),
        (rewrite_text(eos_token_id=7), "read at token, 7, but the tokenizer ends"),
        (rewrite_text(vocab_size=50), "mismatched"),
        (rewrite("config.json", model_type="bert"), "of the kind 'bert'; expected clip or siglip"),
        (rewrite("config.json", projection_dim=30), "do not fit config.json: .*mismatched"),
        (drop_weight, r"1 missing \(visual_projection.weight\); 1 unexpected \(extra\)"),
        (rewrite("preprocessor_config.json", resample=0), "with filter 0"),
        (rewrite("preprocessor_config.json", size={"shortest_edge": 40}), "size of the cut"),
        (rewrite("preprocessor_config.json", rescale_factor=1), "divided by 255"),
        (rewrite("preprocessor_config.json", do_resize=False), "expected a resize"),
        (rewrite("preprocessor_config.json", image_mean=[123.7, 116.3, 103.5]), "'mean.0'.*255"),
        (rewrite("preprocessor_config.json", image_std=[0.2, 0, 0.2]), "'std.1'"),
        (rewrite("preprocessor_config.json", size=48, crop_size=48), "takes a side of 32 pixels"),
        (
            rewrite(
                "preprocessor_config.json",
                image_processor_type="ConvNextImageProcessor",
                crop_pct=0.875,
            ),
            "ConvNextImageProcessor gives other pixels",
        ),
        (rewrite("preprocessor_config.json", image_std="a"), "'std.0'"),
        (rewrite("preprocessor_config.json", do_center_crop=False), "gives other pixels"),
        (
            rewrite("preprocessor_config.json", do_pad=True, pad_size={"height": 40, "width": 40}),
            "gives other pixels",
        ),
        (rewrite("preprocessor_config.json", do_convert_rgb=False, do_normalize=False), "resize"),
    ],
)
def test_folders_that_cannot_be_loaded(tmp_path, change, words):
    make(tmp_path)
    change(tmp_path)
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"transformers:{tmp_path}")


def test_code_in_a_folder_is_not_run(tmp_path):
    make(tmp_path)
    (tmp_path / "modeling_evil.py").write_text("open('hacked', 'w'); raise SystemExit")
    rewrite("config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.EvilConfig"})(
        tmp_path
    )
    with pytest.raises(mb.InputError, match=r"config\.json asks for code .*auto_map"):
        mb.load_model(f"transformers:{tmp_path}")


def test_without_transformers_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(mb.InputError, match=r"pip install 'mmtard-bench\[transformers\]'"):
        mb.load_model("transformers:me/clip")


def test_a_folder_that_could_be_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "me" / "clip")
    assert mb.load_model("transformers:./me/clip").digest
    with pytest.raises(mb.InputError, match=r"transformers:\./me/clip for the folder"):
        mb.load_model("transformers:me/clip")


def test_a_run_from_a_hub_pinned_quietly_and_then_offline(cli, tmp_path):
    make(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    files["pytorch_model.bin"] = b"never asked for"
    fields = {"attack": "pgd-2", "norm": "linf", "eps": '"8/255"', "surface": "native", "more": ""}
    (tmp_path / "mine-v1.toml").write_text(SUITE.format(n=8, task='"digits/digit"', **fields))
    spec = f"transformers:me/clip@{COMMIT}"
    with hub({"models:me/clip": files}) as endpoint:
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = cli("run", "mine-v1.toml", "--model", spec, env=online)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    offline = cli("run", "mine-v1.toml", "--model", spec, "--out", "offline")
    assert (offline.returncode, offline.stderr) == (0, "")
    first, second = (
        mb.read_record(next((tmp_path / out).rglob("*.json"))) for out in ("runs", "offline")
    )
    assert first.model.source == spec
    assert first.model.digest == mb.load_model(f"transformers:{tmp_path / 'model'}").digest
    assert first.status == "ok", first.error
    assert first.identity == second.identity
    assert [s.robust for s in first.samples] == [s.robust for s in second.samples]


def test_the_librarys_own_settings_stay(tmp_path):
    make(tmp_path)
    log = transformers.utils.logging
    log.set_verbosity(logging.INFO)
    log.enable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mb.load_model(f"transformers:{tmp_path}")
    assert log.get_verbosity() == logging.INFO
    assert log.is_progress_bar_enabled()
    log.set_verbosity_warning()


def end_last(folder, eos, *, word="", pad=""):
    """A model whose tokenizer ends texts with the largest token, 513, but for what is added."""
    make(folder)
    vocabulary = clip_tokenizer().get_vocab()
    for token in ("<|startoftext|>", "<|endoftext|>"):
        del vocabulary[token]
    tokens = [*vocabulary, "<|startoftext|>", "<|endoftext|>"]
    made = transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    if word:
        made.add_tokens([word])
    if pad:
        made.add_special_tokens({"pad_token": pad})
    made.save_pretrained(folder)
    rewrite_text(eos_token_id=eos, bos_token_id=512)(folder)
    return f"transformers:{folder}"


@pytest.mark.parametrize("eos", [2, 513])
def test_the_end_is_the_largest_token_or_is_named(tmp_path, eos):
    clip = mb.load_model(end_last(tmp_path, eos))
    cat, dog = clip.text_features(["a cat", "a dog"], torch.device("cpu"))
    assert (cat - dog).abs().max() > 1e-3


@pytest.mark.parametrize("added", [{"word": "zorgblat"}, {"pad": "[PAD]"}])
def test_added_tokens_above_the_end(tmp_path, added):
    """With the old 2, what follows the added word does not count; padding is not the end."""
    with pytest.raises(mb.InputError, match=r"same embedding.*eos_token_id|the largest token, 514"):
        mb.load_model(end_last(tmp_path / "old", 2, **added))
    clip = mb.load_model(end_last(tmp_path / "new", 513, **added))
    cat, dog = clip.text_features(["a zorgblat cat", "a zorgblat dog"], torch.device("cpu"))
    assert (cat - dog).abs().max() > 1e-3


def test_added_tokens_that_the_text_tower_does_not_know(tmp_path):
    make(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"zorg{i}blat" for i in range(20)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(mb.InputError, match="for 'a zorg19blat cat'; the text tower knows"):
        mb.load_model(f"transformers:{tmp_path}")


def test_the_end_is_another_token_of_every_text(tmp_path):
    """The start of a text is in every text too, and says nothing of it."""
    make(tmp_path)
    rewrite_text(eos_token_id=0)(tmp_path)
    with pytest.raises(mb.InputError, match=r"read at token, 0, but .* ends texts with 1"):
        mb.load_model(f"transformers:{tmp_path}")


@pytest.mark.parametrize("says", [True, False, None])
def test_texts_are_lower_cased_where_the_tokenizers_configuration_says_so(tmp_path, says):
    make(tmp_path, "siglip")
    if says is not None:
        rewrite("tokenizer_config.json", do_lower_case=says)(tmp_path)
    clip = mb.load_model(f"transformers:{tmp_path}")
    upper, lower = clip.tokenizer(["A cat", "a cat"])
    assert torch.equal(upper, lower) == bool(says)
    assert [note for note in clip.notes if "lower" in note] == [
        "Texts are lower-cased, as do_lower_case in tokenizer_config.json says."
    ] * bool(says)


def test_a_tokenizer_that_lower_cases_by_itself_needs_no_note(tmp_path):
    make(tmp_path)
    rewrite("tokenizer_config.json", do_lower_case=True)(tmp_path)
    assert mb.load_model(f"transformers:{tmp_path}").notes == ()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*vision.*q_proj", r".*text.*fc1"])
def test_a_peft_adapter_of_both_towers(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = make(tmp_path / "m")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight.add_(0.2 * torch.randn(weight.shape))
    adapted.save_pretrained(tmp_path / "a")
    clip = mb.load_model(f"transformers:{tmp_path / 'm'}+lora:{tmp_path / 'a'}")
    expected = adapted.merge_and_unload().state_dict()
    for key, value in clip.module.state_dict().items():
        own = key.removeprefix("visual.").removeprefix("text.")
        torch.testing.assert_close(value, expected[own], msg=key)


def test_a_whole_model_as_a_tower_names_what_is_not_used(tmp_path):
    state = make(tmp_path).state_dict()
    ids = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    spec = f"transformers:{tmp_path}+visual:{tmp_path / 'w.pt'}"
    torch.save(state | ids, tmp_path / "w.pt")
    assert mb.load_model(spec).notes == ()
    torch.save({**state, "text_projection.weight": torch.zeros(20, 24)}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"is not used, differs .*\('text_projection.weight'\)"):
        assert "text_projection" in mb.load_model(spec).notes[0]

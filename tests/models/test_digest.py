"""Which model is this: what its digest covers, and what is noticed when it changes."""

import copy
import json
import types
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mmtard_bench as mb
from mmtard_bench import registry
from mmtard_bench.models.digest import answers, checksum
from mmtard_bench.models.tiny import WEIGHTS
from tests.conftest import ToyClip, tokenize, wrap

QUICK = {"task": "digits/digit", "threat": "pgd-1", "eps": "1/255", "n": 16}


class Plain:
    """A model that is no torch module, whose answers depend on an attribute."""

    logit_scale = torch.tensor(3.0)

    def __init__(self, shift=0.0):
        self.shift = shift

    def encode_image(self, images):
        return images.flatten(1)[:, :16] + self.shift

    def encode_text(self, tokens):
        return torch.randn(1741, 16, generator=torch.Generator().manual_seed(0))[tokens]


def tiny_with(folder, change):
    """tiny-clip-small as a folder, its configuration changed, its weights the same."""
    base = mb.load_model("tiny-clip-small")
    config = copy.deepcopy(base.config)
    change(config["model_cfg"])
    folder.mkdir(exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in base.module.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return mb.load_model(f"local-dir:{folder}")


CHANGES = {
    "heads": lambda c: c["text_cfg"].update(heads=1),
    "mask": lambda c: c["text_cfg"].update(no_causal_mask=True),
    "pool": lambda c: c["text_cfg"].update(pool_type="last"),
    "epsilon": lambda c: c["text_cfg"].update(norm_kwargs={"eps": 1e-3}),
    "activation": lambda c: c.update(quick_gelu=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_configuration_that_leaves_no_trace_in_weights_is_another_model(change, tmp_path):
    plain = tiny_with(tmp_path / "m", lambda _: None)
    other = tiny_with(tmp_path / "m", change)
    assert plain.digest == mb.load_model("tiny-clip-small").digest
    assert other.digest != plain.digest


def test_a_default_that_is_written_out_is_the_same_model(tmp_path):
    spelt = tiny_with(tmp_path / "m", lambda c: c["text_cfg"].update(no_causal_mask=False))
    assert spelt.digest == mb.load_model("tiny-clip-small").digest


class Wrapped(nn.Module):
    """A model around another, as users write them; ``times`` leaves no trace in the weights."""

    def __init__(self, clip, times):
        super().__init__()
        self.inner, self.logit_scale = clip.module, clip.module.logit_scale
        self.encode_image = lambda images: self.inner.encode_image(times * images)
        self.encode_text = self.inner.encode_text


def test_code_that_answers_otherwise_is_another_model():
    def wrapped(times, tokenizer=None):
        clip = mb.load_model("tiny-clip-small")
        return mb.Clip(Wrapped(clip, times), tokenizer or clip.tokenizer, clip.preprocess, "x")

    tokenizer = mb.load_model("tiny-clip-small").tokenizer

    def lower(texts):
        return tokenizer([text.lower()[:6] for text in texts])

    assert wrapped(1.0).digest == wrapped(1.0).digest
    assert len({c.digest for c in (wrapped(1.0), wrapped(1.01), wrapped(1.0, lower))}) == 3


def test_answers_do_not_depend_on_precision_threads_or_the_random_state():
    clip = mb.load_model("tiny-clip-small")
    found = answers(clip)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert answers(clip) == found
    assert torch.equal(torch.get_rng_state(), before)
    # Weights that float32 rounds otherwise, by far less than the answers are rounded.
    with torch.no_grad():
        for weight in clip.module.parameters():
            weight.mul_(1 + 1e-7)
    nudged = answers(clip)
    values = [(a, b) for tower in found for a, b in zip(found[tower], nudged[tower], strict=True)]
    assert sum(a != b for a, b in values) <= 1
    assert all(abs(a - b) <= 1 for a, b in values)


def test_towers_that_cannot_answer_are_described_by_that():
    class Broken(ToyClip):
        def encode_image(self, images):
            raise RuntimeError("only at noon")

        def encode_text(self, tokens):
            return torch.randn(len(tokens), 16, generator=self.generator)

    module = Broken()
    module.generator = torch.Generator()
    assert answers(wrap(module)) == {"images": "fails", "texts": "does not repeat"}
    assert wrap(module).digest != wrap(ToyClip()).digest
    record = mb.evaluate(wrap(module), **QUICK)
    assert record.status == "error"
    assert "only at noon" in record.error


def test_a_model_that_is_no_module_is_told_by_its_answers_too():
    def clip(shift):
        return mb.Clip(
            Plain(shift), tokenize, mb.Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3), "x", "y", "v1"
        )

    assert clip(0.0).digest == clip(0.0).digest != clip(0.5).digest


CHANGED = {
    "weights": lambda m: m.image.data.mul_(-1),
    "a setting": lambda m: setattr(m, "times", 3),
    "a tensor that is no parameter": lambda m: m.table.add_(1),
    "a setting of a configuration": lambda m: setattr(m.configuration, "beta", 1),
    "a setting among others": lambda m: m.options.update(beta=1),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a method": lambda m: setattr(m, "encode_image", types.MethodType(lambda *_: None, m)),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_change_of_a_module_is_noticed(change):
    module = ToyClip()
    module.table = torch.zeros(2)
    module.configuration = types.SimpleNamespace(beta=0, layers=[1, [2]])
    module.options = {"beta": 0, "layers": [1, [2]]}
    before = checksum(module)
    assert checksum(module) == before
    change(module)
    assert checksum(module) != before


def test_a_model_that_learned_since_is_computed_again():
    """The same Clip, each epoch: the text embeddings, the folded tower and the digest follow."""
    clip, other = mb.load_model("tiny-clip"), mb.load_model("teacher-clean")
    first = mb.evaluate(clip, **QUICK)
    clip.module.load_state_dict(other.module.state_dict())
    clip.module.train()
    again, fresh = mb.evaluate(clip, **QUICK), mb.evaluate(other, **QUICK)
    assert again.identity == fresh.identity != first.identity
    assert again.samples == fresh.samples
    with torch.no_grad():
        for weight in clip.module.transformer.parameters():
            weight.mul_(1.5)
    assert mb.evaluate(clip, **QUICK).model.digest != again.model.digest


def test_caches_are_never_copied():
    clip = mb.load_model("tiny-clip")
    mb.evaluate(clip, **QUICK)
    assert clip.cache.heads
    assert clip.cache.towers
    assert not replace(clip, name="x").cache.heads
    assert replace(clip, name="x").cache is not clip.cache


def test_what_a_function_returns_twice_is_two_models(monkeypatch):
    """A cached object that is scored, changed or trained must not be another's."""
    kept = mb.load_model("teacher-robust")
    monkeypatch.setitem(registry.models._items, "kept", lambda: kept)
    first, second = mb.load_model("kept"), mb.load_model("kept")
    theirs = {id(parameter) for parameter in first.module.parameters()}
    assert not theirs & {id(parameter) for parameter in second.module.parameters()}
    assert mb.evaluate(first, **QUICK).samples == mb.evaluate(kept, **QUICK).samples
    tower = WEIGHTS / "teacher-clean.safetensors"
    changed = mb.load_model(f"kept+visual:{tower}")
    assert changed.digest == mb.load_model(f"teacher-robust+visual:{tower}").digest
    assert mb.load_model("kept").digest == mb.load_model("teacher-robust").digest
    assert (
        mb.evaluate(changed, **QUICK).samples
        == mb.evaluate(f"teacher-robust+visual:{tower}", **QUICK).samples
    )


def test_a_function_that_returns_what_cannot_be_copied_is_refused(monkeypatch):
    module = ToyClip()
    module.lock = __import__("threading").Lock()
    monkeypatch.setitem(registry.models._items, "locked", lambda: wrap(module))
    with pytest.raises(mb.InputError, match="deepcopy"):
        mb.load_model("locked")


def test_open_clip_still_has_the_defaults_that_the_digest_leaves_out():
    """A default that changed would change digests of folders that write it out."""
    assert open_clip.CLIPTextCfg().heads == 8
    assert open_clip.CLIPVisionCfg().head_width == 64
    assert open_clip.CLIPTextCfg().context_length == 77

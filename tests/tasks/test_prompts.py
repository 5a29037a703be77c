"""Prompts in a model's tokens: what is told apart, what is cut, and what decides the identity."""

import warnings
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import mmtard_bench as mb
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.tasks.catalogue import imagenet_classes
from mmtard_bench.tasks.classifier import class_embeddings
from mmtard_bench.tasks.prompts import prompts_of, understood
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, Task, ThreatModel
from tests.conftest import ToyClip, wrap
from tests.tasks.test_retrieval import captioned

CPU = torch.device("cpu")
THREAT = ThreatModel("pgd-1", "linf", Eps.parse("1/255"))
FILLER = (
    "a photo, taken on a sunny day by somebody who knows what he does, of something that is a {}"
)


def padded(texts, *, length=12, fold=False):
    """A token a character behind a start, then an end, cut and padded as CLIP's tokenizer does."""
    rows = []
    for text in texts:
        letters = [ord(c) % 500 + 10 for c in (text.lower() if fold else text)][: length - 2]
        rows.append([1, *letters, 2, *[0] * (length - 2 - len(letters))])
    return torch.tensor(rows)


class Reader(ToyClip):
    """Embeds a row of tokens by the sum of their embeddings, weighted by place."""

    def encode_text(self, tokens):
        weights = torch.arange(1, tokens.shape[1] + 1).sin()[None, :, None]
        return (self.text[tokens] * weights).sum(1)


def clip_with(tokenizer, module=None):
    return replace(wrap(module or Reader()), tokenizer=tokenizer)


def task(classes, templates=("{}",)):
    names = (*classes, *(f"n{i}" for i in range(10 - len(classes))))
    return replace(find_task("digits/digit"), classes=names, templates=templates)


def scored(clip, chosen, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        options = {"threat": "pgd-1", "eps": "1/255", "n": 8, **changes}
        return mb.evaluate(clip, task=chosen, **options)


@pytest.mark.parametrize(
    ("tokenizer", "classes", "templates", "words"),
    [
        (padded, ("cat", "dog"), ("a long photo of {}",), "cut at the context of 12"),
        (lambda t: padded(t, fold=True), ("Polish", "polish"), ("{}",), "letter case"),
        # An alphabet without accents: what it does not know is one token.
        (
            lambda t: padded([x.encode("ascii", "replace").decode() for x in t]),
            ("é", "ü"),
            ("{}",),
            "does not know what differs",
        ),
        (lambda t: padded([x.strip(".") for x in t]), ("St", "St."), ("{}",), "does not know"),
        (lambda t: torch.zeros(len(t), 5, dtype=torch.long), ("cat", "dog"), ("{}",), "equal"),
    ],
    ids=["cut", "case", "accents", "punctuation", "constant"],
)
def test_different_classes_of_equal_tokens_are_refused(tokenizer, classes, templates, words):
    record = scored(clip_with(tokenizer), task(classes, templates))
    assert record.status == "error"
    assert words in record.error
    assert repr(classes[0]) in record.error


def test_what_one_template_blurs_another_may_tell_apart():
    record = scored(clip_with(padded), task((), ("{}", "a long photo of {}")))
    assert record.status == "ok", record.error
    assert "in 1 of 2 templates different class names have equal tokens" in record.notes
    assert (
        "10 of 20 prompts fill the model's context of 12 tokens: whatever follows there is "
        "cut" in record.notes
    )


def test_the_prompts_of_the_shipped_models_are_whole():
    assert (
        mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-1", eps="1/255", n=4).notes == []
    )


def test_a_long_prompt_of_a_shipped_model_is_refused_where_it_loses_the_name():
    chosen = replace(find_task("digits/digit"), templates=(FILLER,))
    record = scored("tiny-clip", chosen)
    assert record.status == "error"
    assert "'zero' and 'one'" in record.error
    assert "cut at the context of 16 tokens" in record.error


def test_classes_of_one_name_are_noted_and_work():
    record = scored(clip_with(padded), task(("missile", "missile", "sun", "sun")))
    assert record.status == "ok", record.error
    assert any("2 class names occur more than once (missile, sun)" in note for note in record.notes)
    names = imagenet_classes()
    found = prompts_of(clip_with(lambda t: padded(t, length=77)), names, ("{}",))
    assert sorted(names[group[0]] for group in found.alike) == ["missile", "sunglasses"]
    assert found.clashes == []


class Brightness(torch.nn.Module):
    """Class "a" for bright images, "b" for dark ones: broken by changes above 0.1."""

    logit_scale = torch.tensor(4.6)

    def encode_image(self, images):
        mean = images.mean((1, 2, 3)) - 0.5
        return torch.stack([1 + mean, 1 - mean], 1)

    def encode_text(self, tokens):
        return torch.eye(2)[tokens]


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    ("threat", "norm"),
    [("cw-linf-10", "linf"), ("pgd-10", "linf"), ("apgd-pair", "linf"), ("cw-l2", "l2")],
)
def test_classes_of_one_name_are_attacked_as_one(tmp_path, threat, norm, engine):
    """Two equal columns would make the margin zero whatever the image."""
    pixels = [np.full((8, 8, 3), 153 + i, np.uint8) for i in range(4)]
    columns = {"image": [*map(Image.fromarray, pixels)], "label": [0, 0, 2, 2]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "t.parquet")
    chosen = Task("t", f"parquet:{tmp_path / 't.parquet'}", ("{}",), classes=("a", "b", "a"))
    clip = mb.Clip(
        Brightness(),
        lambda texts: torch.tensor(["ab".index(text) for text in texts]),
        mb.Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3),
        "brightness",
    )
    # An L2 change of all 192 pixels by 0.1 is 1.4 long.
    for eps, robust in ((0.09, True), (0.12, False)) if norm == "linf" else ((1.6, False),):
        record = scored(
            clip, chosen, threat=threat, eps=f"{round(100 * eps)}/100", engine=engine, n=4
        )
        assert [sample.prediction for sample in record.samples] == [0] * 4
        assert all(sample.clean_correct == (sample.label == 0) for sample in record.samples)
        assert [s.robust for s in record.samples if s.label == 0] == [robust, robust]
        assert "zero-gradients" not in {flag.code for flag in record.flags}


def test_a_task_of_one_name_is_refused():
    chosen = replace(find_task("digits/digit"), classes=("missile",) * 10)
    with pytest.raises(mb.InputError, match="at least two classes"):
        scored(clip_with(padded), chosen)


def test_a_tower_that_does_not_read_what_differs_is_flagged():
    """Tokens differ behind the place that the tower looks at, as with a wrong end of text."""

    class Short(Reader):
        def encode_text(self, tokens):
            return super().encode_text(tokens[:, :3])

    record = scored(clip_with(padded, Short()), task(("cat", "car", "can", "dog")))
    (flag,) = [flag for flag in record.flags if flag.code == "equal-class-embeddings"]
    assert "3 pairs" in flag.detail
    assert "cat and car for one" in flag.detail
    whole = scored(clip_with(padded), task(("cat", "car", "can", "dog")))
    assert "equal-class-embeddings" not in {flag.code for flag in whole.flags}


def brute_force(rows):
    return {frozenset(j for j, other in enumerate(rows) if other == row) for row in rows} - {
        frozenset([i]) for i in range(len(rows))
    }


@given(st.lists(st.text("aAbB", min_size=1, max_size=3), min_size=1, max_size=8), st.integers(3, 6))
def test_groups_of_equal_tokens_agree_with_a_comparison_of_all_pairs(names, length):
    clip = clip_with(lambda texts: padded(texts, length=length, fold=True))
    templates = ("{}", "b{}")
    found = prompts_of(clip, tuple(names), templates)
    rows = [
        padded([t.format(n) for t in templates], length=length, fold=True).tolist() for n in names
    ]
    assert set(map(frozenset, found.alike)) == brute_force(rows)
    full = {
        i
        for i, text in enumerate(t.format(n) for n in names for t in templates)
        if len(text) >= length - 2
    }
    assert found.full == full


def test_tokenizers_that_pad_to_the_longest_or_know_a_list_are_never_full():
    def longest(texts):
        return padded(texts, length=2 + max(map(len, texts)))

    def listed(texts):
        return torch.tensor([{"cat": 0, "dog": 1}[text] for text in texts])

    for tokenizer in (longest, listed):
        assert prompts_of(clip_with(tokenizer), ("cat", "dog"), ("{}",)).full == frozenset()


def test_prompts_are_tokenised_once_and_rows_are_those_of_each_prompt():
    calls = []

    def counting(texts):
        calls.append(list(texts))
        return padded(texts)

    clip = clip_with(counting)
    names, templates = ("cat", "dog", "elk"), ("{}", "a {}")
    for _ in range(2):
        head = class_embeddings(clip, names, templates, CPU)
    assert calls == [["cat", "a cat", "dog", "a dog", "elk", "a elk"]]
    for row, name in zip(head, names, strict=True):
        each = clip.text_features([name, f"a {name}"], CPU).mean(0)
        torch.testing.assert_close(row, each / each.norm())


def test_the_digest_sees_every_template():
    """Two tokenizers that differ in the second template alone."""
    data = load_task(replace(find_task("digits/digit"), templates=("{}", "a {}")), n=8, seed=0)

    def other(texts):
        return padded([text.replace("a ", "b ") for text in texts])

    one, two = (clip_with(tokenizer) for tokenizer in (padded, other))
    digests = [prompts_of(clip, data.classes, data.templates).digest for clip in (one, two)]
    assert digests[0] != digests[1]
    assert prepare(one, data, THREAT, seed=0).facts[1].prompts_digest == digests[0]


def test_prompts_are_of_the_tokenizer_that_a_clip_has_now():
    buffer = torch.zeros(2, 12, dtype=torch.long)

    def again(texts):
        """Hands out one tensor."""
        return buffer.copy_(padded(texts))

    clip = clip_with(again)
    found = prompts_of(clip, ("cat", "dog"), ("{}",))
    prompts_of(clip, ("elk", "fox"), ("{}",))
    assert torch.equal(found.tokens, padded(["cat", "dog"]))
    other = replace(clip, tokenizer=lambda texts: padded(texts) + 1)
    assert prompts_of(other, ("cat", "dog"), ("{}",)).digest != found.digest


@pytest.mark.parametrize("case", ["lower", "cut"])
def test_captions_of_equal_tokens_match_each_others_images(tmp_path, case):
    captions = [["A cat"], ["a cat", "a dog"], ["a bird"], ["a fish"]]
    if case == "cut":
        captions = [["a black cat 1"], ["a black cat 2", "a dog"], ["a bird"], ["a fish"]]
    data = load_task(captioned(tmp_path / "a.parquet", captions), n=None, seed=0)
    clip = clip_with(lambda texts: padded(texts, length=13, fold=True))
    found = understood(clip, data)
    places = {text: place for place, text in enumerate(data.classes)}
    one, other = (places[own[0]] for own in captions[:2])
    for own, index in zip(found.matches, data.manifest.indices, strict=True):
        expected = {places[text] for text in captions[index]}
        if expected & {one, other}:
            expected |= {one, other}
        assert set(own) == expected
    assert found.labels == data.labels
    assert "1 of 5 captions have the tokens of an earlier caption" in " ".join(found.notes)
    record = mb.evaluate(clip, task=data.task, threat="pgd-1", eps="1/255")
    assert record.status == "ok", record.error
    assert found.notes[-1] in record.notes


def test_captions_of_equal_tokens_are_no_rivals(tmp_path):
    """Before, an image whose caption differs from another's in case lost every tie."""

    class Same(Reader):
        """One embedding for every image: only ties decide."""

        def encode_text(self, tokens):
            return torch.nn.functional.one_hot(tokens[:, 3] % 16, 16).float()

        def encode_image(self, images):
            chosen = torch.nn.functional.one_hot(torch.tensor(ord("c") % 500 + 10) % 16, 16)
            return (
                chosen.float() + 0 * images.flatten(1)[:, :1] + 1e-3 * super().encode_image(images)
            )

    task = captioned(tmp_path / "a.parquet", ["a cat", "A cat", "a dog"])
    clip = clip_with(lambda texts: padded(texts, fold=True), Same())
    record = mb.evaluate(clip, task=task, threat="pgd-1", eps="1/255")
    assert record.status == "ok", record.error
    assert sorted(s.ranks.image[0] for s in record.samples)[:2] == [1, 1]


def test_templates_that_data_bring_are_checked_too():
    with pytest.raises(mb.InputError, match=r"exactly one \{\}"):
        prompts_of(clip_with(padded), ("cat", "dog"), ("{}", "a photo"))


@pytest.mark.parametrize(
    "templates",
    [
        "a photo of {}",
        ("a photo of {c}",),
        ("a photo of {label}",),
        ("a photo",),
        ("{} and {}",),
        ("{0}",),
        ("",),
        {"a {}", "the {}"},
        (str.title,),
        None,
        (b"a {}",),
    ],
)
def test_a_task_is_checked_in_python_as_from_a_file(templates):
    base = find_task("digits/digit")
    for make in (lambda: replace(base, templates=templates), lambda: Task("t", "d", templates)):
        with pytest.raises(mb.InputError, match=r"tuple of strings|exactly one|not empty"):
            make()


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "abc"},
        {"classes": {"cat", "dog"}},
        {"classes": ("cat", "")},
        {"classes": (1, 2)},
        {"metric": "accuracy"},
        {"name": ""},
        {"data": None},
        {"n_classes": 10.0},
        {"n_classes": 1},
        {"samples": True},
        {"convert_rgb": "yes"},
        {"surface": "deep"},
        {"metric": "retrieval", "templates": ()},
    ],
)
def test_fields_of_a_task_are_checked(change):
    with pytest.raises(mb.InputError):
        replace(find_task("digits/digit"), **change)


def test_lists_become_tuples_and_an_unknown_placeholder_is_named():
    made = Task("t", "digits/test", ["a {}"], classes=["cat", "dog"])
    assert (made.templates, made.classes) == (("a {}",), ("cat", "dog"))
    with pytest.raises(mb.InputError, match=r"Write \{\} in place of \{c\}"):
        Task("t", "digits/test", ("a {c}",))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda texts: {"input_ids": padded(texts)}, "returned a dict"),
        (lambda texts: padded(texts)[0], "shape"),
        (lambda texts: [[1], [2, 3]], "failed on"),
        (lambda texts: texts["no"], "TypeError"),
        (lambda texts: None, "NoneType"),
    ],
    ids=["dict", "one row", "ragged", "raises", "nothing"],
)
def test_tokenizers_that_do_not_fit_are_sentences(tokenizer, words):
    with pytest.raises(mb.InputError, match=words):
        scored(clip_with(tokenizer), task(()))


def test_a_tokenizer_may_return_a_list():
    listed, whole = (
        scored(clip_with(tokenizer), task(()))
        for tokenizer in (lambda t: padded(t).tolist(), padded)
    )
    assert listed.status == "ok", listed.error
    assert listed.samples == whole.samples
    assert listed.identity == whole.identity


def test_no_two_prompts_of_the_digits_share_a_token_of_the_toys():
    """Or the toys of these tests would be refused."""
    for name in ("digits/digit", "digits/unseen", "digits/validation"):
        data = load_task(find_task(name), n=4, seed=0)
        assert prompts_of(wrap(ToyClip()), data.classes, data.templates).alike == ()

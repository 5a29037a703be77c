"""Edits of class names: against brute force, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

import mmtard_bench as mb
from mmtard_bench.attacks import charmer
from mmtard_bench.attacks.base import Engine, Work
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.charmer import edits_at, places, worst_names
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.records.edits import levenshtein, names_another_class
from mmtard_bench.records.files import from_text
from mmtard_bench.records.worst import worst_cases
from mmtard_bench.registry import attack_family
from mmtard_bench.tasks import classifier as zero_shot
from mmtard_bench.tasks.classifier import ZeroShotClassifier, embed_names
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.watched import WatchedPrompts
from mmtard_bench.types import Eps, Task, ThreatModel
from tests.conftest import ToyClip, assert_sentence, wrap

CPU = torch.device("cpu")
SMALL = "ab "
SHORT = st.text("ab ", max_size=4)


@given(one=SHORT, other=SHORT)
def test_the_distance_is_the_shortest_way_by_single_edits(one, other):
    """Breadth-first over single edits: an account of the distance by its definition."""
    front, seen, steps = {one}, {one}, 0
    while other not in front:
        front = {new for name in front for p in places(name) for new in edits_at(name, p, SMALL)}
        front -= seen
        seen |= front
        steps += 1
    assert levenshtein(one, other) == levenshtein(other, one) == steps


@given(name=st.text("ab ", max_size=5))
def test_single_edits_are_exactly_the_names_at_distance_one(name):
    """Against every string over the alphabet that is long enough to be one."""
    made = {new for place in places(name) for new in edits_at(name, place, SMALL)}
    lengths = range(max(len(name) - 1, 0), len(name) + 2)
    every = {"".join(c) for n in lengths for c in itertools.product(SMALL, repeat=n)}
    assert made == {other for other in every if levenshtein(name, other) == 1}


def toy(classes=("ab", "ba", "bb a"), templates=("{}", "a {}"), seed=0):
    clip = wrap(ToyClip(seed=seed))
    model = ZeroShotClassifier(clip, classes, templates, CPU)
    images = torch.rand((12, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = model.features(images)
    return model, features, (features @ model.head.T).argmax(1)


def at_most(name, edits):
    names = {name}
    for _ in range(edits):
        names |= {new for old in names for p in places(old) for new in edits_at(old, p, SMALL)}
    return names


@pytest.mark.parametrize("seed", range(5))
def test_one_edit_is_the_exact_worst_case(seed):
    model, features, labels = toy(seed=seed)
    found = worst_names(model, features, labels, edits=1, alphabet=SMALL)
    for i, label in enumerate(labels.tolist()):
        allowed = [
            name
            for name in at_most(model.names[label], 1)
            if not names_another_class(model.names, label, name)
        ]
        rows = embed_names(model.clip, allowed, model.templates, CPU)
        worst = (rows @ features[i]).min()
        assert found.logits[i, label] == pytest.approx(worst.item(), abs=1e-5)
        name = found.names[i] or model.names[label]
        row = embed_names(model.clip, [name], model.templates, CPU)[0]
        assert row @ features[i] == pytest.approx(worst.item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_more_edits_are_never_weaker_and_stay_within_the_budget(seed):
    model, features, labels = toy(seed=seed)
    before = features @ model.head.T
    broken = torch.zeros(len(labels), dtype=torch.bool)
    for edits in range(4):
        found = worst_names(model, features, labels, edits=edits, alphabet=SMALL)
        now = found.logits.argmax(1) != labels
        assert (now | ~broken).all()
        assert (found.logits <= before + 1e-6).all()
        before, broken = found.logits, now
        for label, name in zip(labels.tolist(), found.names, strict=True):
            assert name is None or levenshtein(model.names[label], name) <= edits
            # The names of other classes are never an answer.
            assert name is None or not names_another_class(model.names, label, name)
    assert broken.any()


def test_two_edits_reach_what_brute_force_finds_where_the_search_is_wide_enough(monkeypatch):
    """Greedy keeps a few names: with all of them kept it is exhaustive."""
    monkeypatch.setattr(charmer, "PARENTS", 10_000)
    monkeypatch.setattr(charmer, "PLACES", 10_000)
    model, features, labels = toy(classes=("ab", "bbb"), templates=("{}",))
    found = worst_names(model, features, labels, edits=2, alphabet=SMALL)
    for i, label in enumerate(labels.tolist()):
        every = sorted(at_most(model.names[label], 2) - {model.names[1 - label]})
        rows = embed_names(model.clip, every, model.templates, CPU)
        other = features[i] @ model.head[1 - label]
        # Of equal logits the lower label wins.
        least = (rows @ features[i]).min()
        can_break = bool(least <= other if label == 1 else least < other)
        assert bool(found.logits[i].argmax() != label) == can_break


def test_prompts_are_counted():
    model, features, labels = toy(classes=("ab", "bbbbb"), templates=("{}", "a {}"))
    counts = worst_names(model, features, labels, edits=1, alphabet=SMALL).prompts
    for label, count in zip(labels.tolist(), counts, strict=True):
        name = model.names[label]
        scored = sum(len(edits_at(name, place, SMALL)) for place in places(name))
        assert count == 2 * scored
    assert worst_names(model, features, labels, edits=0).prompts == [0] * len(labels)


def test_the_first_edits_of_a_class_are_encoded_once(monkeypatch):
    """However small the cache for further edits is, and however many the batches."""
    monkeypatch.setattr(zero_shot, "_KNOWN", 2)
    encoded = []
    real = zero_shot.embed_names

    def counting(clip, names, templates, device):
        encoded.append(tuple(names))
        return real(clip, names, templates, device)

    model, features, labels = toy()
    monkeypatch.setattr(zero_shot, "embed_names", counting)
    for _ in range(3):
        worst_names(model, features, labels, edits=1, alphabet=SMALL)
    assert len(encoded) == len(set(encoded)) > 2


def test_what_does_not_fit_is_encoded_again(monkeypatch):
    monkeypatch.setattr(zero_shot, "KEPT", 100)
    model, features, labels = toy()
    bounded = worst_names(model, features, labels, edits=1, alphabet=SMALL)
    assert sum(rows.nbytes for rows in model._kept.values()) <= 100
    monkeypatch.undo()
    whole, _, _ = toy()
    found = worst_names(whole, features, labels, edits=1, alphabet=SMALL)
    assert sum(rows.nbytes for rows in whole._kept.values()) > 100
    assert (bounded.names, bounded.prompts) == (found.names, found.prompts)


class Counting(ToyClip):
    """Counts the images that pass, independently of an attack's own account."""

    images = 0

    def encode_image(self, images):
        self.images += len(images)
        return super().encode_image(images)


@pytest.mark.parametrize("eps", ["1/100000", "40/255"])
def test_passes_of_images_are_counted(eps):
    module = Counting()
    model = ZeroShotClassifier(wrap(module), ("ab", "ba", "bb a"), ("{}",), CPU)
    images = torch.rand((6, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    for name, radius, norm, standing in (
        ("joint-charmer-k0-pgd-3", eps, "linf", (1 + (3 + 1) + (3 + 2), 2 * 3)),
        ("text-charmer-k0", "0/1", "levenshtein", (1, 0)),
    ):
        attack = build_attack(
            ThreatModel(name, norm, Eps.parse(radius, norm=norm)), n_classes=3, engine=Engine()
        )
        module.images = 0
        result = attack.run(
            Work(
                model=WatchedPrompts(model, CPU),
                images=images,
                labels=labels,
                ids=[str(i) for i in range(6)],
                seed=0,
                batch_size=64,
            )
        )
        assert module.images == sum(result.forward)
        for claim, passes in zip(
            result.broken_by, zip(result.forward, result.backward, strict=True), strict=True
        ):
            assert passes == standing or claim is not None


@pytest.fixture(scope="module")
def records():
    """digits/digit, n = 24, by (model, edits)."""
    return {
        (model, edits): mb.evaluate(
            model,
            task="digits/digit",
            threat=f"text-charmer-k{edits}",
            eps=f"{edits}/1",
            n=24,
        )
        for model in ("tiny-clip", "tiny-tecoa")
        for edits in (0, 1, 2)
    }


@pytest.mark.parametrize("model", ["tiny-clip", "tiny-tecoa"])
def test_no_edit_is_the_clean_accuracy_and_more_never_help(records, model):
    none, one, two = (records[model, edits] for edits in (0, 1, 2))
    assert none.robust_accuracy == none.clean_accuracy > 0.9
    assert two.robust_accuracy <= one.robust_accuracy < none.robust_accuracy
    for weaker, stronger in ((none, one), (one, two)):
        for a, b in zip(weaker.samples, stronger.samples, strict=True):
            assert a.robust or not b.robust
    assert sum(s.unconfirmed for record in (none, one, two) for s in record.samples) == 0


def test_the_record_has_the_edited_names_and_anybody_can_check_them(records):
    record = records["tiny-clip", 2]
    clip = mb.load_model("tiny-clip")
    data = load_task(find_task("digits/digit"), n=24, seed=0)
    assert from_text(record.to_text(), "here") == record
    classes = list(data.classes)
    for row, sample in enumerate(record.samples):
        assert (sample.edit is not None) == (sample.broken_by is not None)
        if sample.edit is None:
            continue
        assert sample.edit.original == classes[sample.label]
        assert 1 <= sample.edit.distance <= 2
        changed = [*classes]
        changed[sample.label] = sample.edit.adversarial
        head = embed_names(clip, changed, record.task.templates, CPU)
        images = data.images([row], surface="native", preprocess=clip.preprocess)
        assert (clip.image_features(images) @ head.T).argmax(1).item() != sample.label


def test_verdicts_do_not_depend_on_the_batch(records):
    data = load_task(find_task("digits/digit"), n=24, seed=0)
    threat = ThreatModel("text-charmer-k2", "levenshtein", Eps.parse("2/1", norm="levenshtein"))
    job = prepare(mb.load_model("tiny-clip"), data, threat, seed=0)
    other = execute(job, Resources(CPU, 7))
    truth = [(s.robust, s.broken_by) for s in records["tiny-clip", 2].samples]
    assert [(s.robust, s.broken_by) for s in other.samples] == truth


@pytest.mark.parametrize("model", ["tiny-clip", "tiny-tecoa"])
def test_both_attacks_together_break_what_each_breaks(records, model):
    data = {"task": "digits/digit", "n": 24, "eps": "4/255"}
    pixels = mb.evaluate(model, threat="pgd-5", **data)
    joint = mb.evaluate(model, threat="joint-charmer-k1-pgd-5", **data)
    assert joint.status == "ok", joint.error
    for text, image, both in zip(
        records[model, 1].samples, pixels.samples, joint.samples, strict=True
    ):
        assert (text.robust and image.robust) or not both.robust
    stages = {"charmer", "charmer+pgd", "pgd+charmer", None}
    assert {s.broken_by for s in joint.samples} <= stages
    assert joint.threat.ball == "linf 4/255 + 1 edit"
    # Balls of text, of pixels and of both are never put together.
    assert {w.ball for w in worst_cases([records[model, 1], pixels, joint])} == {
        "levenshtein 1/1",
        "linf 4/255",
        "linf 4/255 + 1 edit",
    }


def test_with_no_edits_the_joint_attack_is_the_one_on_pixels():
    data = {"task": "digits/digit", "n": 24, "eps": "8/255"}
    pixels = mb.evaluate("tiny-tecoa", threat="pgd-5", **data)
    joint = mb.evaluate("tiny-tecoa", threat="joint-charmer-k0-pgd-5", **data)
    assert 0 < pixels.robust_accuracy < pixels.clean_accuracy
    assert [s.robust for s in joint.samples] == [s.robust for s in pixels.samples]
    assert all(s.edit is None for s in joint.samples)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name: name + "zzz", "3 edits, where 2 are allowed"),
        # Within two edits of "cat", but the answer to another question.
        (lambda name: {"cat": " Car"}.get(name, name + "x"), "never another class"),
    ],
    ids=["too many edits", "another class"],
)
def test_an_attack_that_cheats_is_an_error(monkeypatch, change, reason):
    real = charmer.worst_names

    def cheating(model, features, labels, **options):
        found = real(model, features, labels, **options)
        logits = found.logits - 1000 * torch.nn.functional.one_hot(labels, found.logits.shape[1])
        names = [change(model.names[label]) for label in labels.tolist()]
        return charmer.Found(names, found.rows, logits, found.prompts)

    monkeypatch.setattr(charmer, "worst_names", cheating)
    others = [f"animal {i}" for i in range(8)]
    task = Task(name="t", data="digits/test", templates=("{}",), classes=("cat", "car", *others))
    record = mb.evaluate(
        wrap(ToyClip(seed=1)), task=task, threat="text-charmer-k2", eps="2/1", n=200
    )
    assert record.status == "error"
    assert reason in record.error


def test_a_claim_that_a_fresh_pass_does_not_confirm_is_marked(monkeypatch):
    real = charmer.worst_names

    def wrong(model, features, labels, **options):
        found = real(model, features, labels, edits=0)
        logits = found.logits - 1000 * torch.nn.functional.one_hot(labels, found.logits.shape[1])
        names = [model.names[label] for label in labels.tolist()]
        return charmer.Found(names, found.rows, logits, found.prompts)

    monkeypatch.setattr(charmer, "worst_names", wrong)
    record = mb.evaluate("tiny-clip", task="digits/digit", threat="text-charmer-k1", eps="1/1", n=8)
    assert record.robust_accuracy == 0
    assert all(s.unconfirmed for s in record.samples if s.clean_correct)
    assert "unconfirmed-adversarials" in {flag.code for flag in record.flags}


class Noisy(ToyClip):
    """Answers at random."""

    def encode_image(self, images):
        features = super().encode_image(images)
        return features + features.std() * torch.randn_like(features)


@pytest.mark.parametrize("edits", [0, 1])
def test_a_model_that_answers_at_random_gets_a_record_with_flags(edits):
    torch.manual_seed(0)
    threat = f"text-charmer-k{edits}"
    toy = wrap(Noisy(seed=3))
    # A second pass is right about one broken sample in ten: few samples could show none.
    n = 100 if edits else 1000
    record = mb.evaluate(
        toy, task="digits/digit", threat=threat, eps=f"{edits}/1", n=n, batch_size=64
    )
    assert record.status == "ok", record.error
    codes = {flag.code for flag in record.flags}
    assert "randomised-output" in codes
    assert "unconfirmed-adversarials" in codes or edits
    assert edits or sum(s.unconfirmed or False for s in record.samples) > 2
    assert from_text(record.to_text(), "here") == record
    # What the attack's own pass has wrong is broken, with an edit or without.
    assert record.robust_accuracy < record.clean_accuracy
    broken = [s for s in record.samples if s.broken_by]
    assert all(0 <= s.edit.distance <= edits for s in broken)
    assert any(s.edit.distance == 0 for s in broken) or edits


@pytest.mark.parametrize("edits", [0, 1, 2])
def test_what_is_wrong_in_a_pass_is_broken_though_no_edit_lowers_the_true_logit(edits):
    class Deaf:
        """Every other name has the highest logit."""

        names, prompts_a_name, head = ("ab", "ba", "bb a"), 1, torch.eye(3)

        def features(self, images):
            return torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.5]])

        def embed_names(self, names, *, keep=False):
            return torch.ones(len(names), 3)

    threat = ThreatModel(
        f"text-charmer-k{edits}", "levenshtein", Eps.parse(f"{edits}/1", norm="levenshtein")
    )
    result = build_attack(threat, n_classes=3, engine=Engine()).run(
        Work(
            model=Deaf(),
            images=torch.zeros(2, 3, 4, 4),
            labels=torch.tensor([0, 0]),
            ids=["a", "b"],
            seed=0,
            batch_size=64,
        )
    )
    assert result.broken_by == [threat.attack, None]
    assert result.names == ["ab", None]


def test_two_classes_of_one_name_do_not_make_no_edit_an_error():
    names = tuple(f"missile {i // 2}" for i in range(10))
    task = Task(name="t", data="digits/test", templates=("{}",), classes=names)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="missile"):
        record = mb.evaluate(wrap(Noisy()), task=task, threat="text-charmer-k0", eps="0/1", n=200)
    assert record.status == "ok", record.error
    edited = [s for s in record.samples if s.edit]
    assert edited
    assert all(s.edit.adversarial == names[s.label] for s in edited)


@pytest.mark.parametrize("threat", ["pgd-5", "joint-charmer-k0-pgd-5"])
def test_what_is_wrong_in_one_pass_of_pgd_is_broken_alone_and_with_edits(threat):
    class Once:
        """Wrong in its third pass, which is inside PGD, and right in all others."""

        names, prompts_a_name, head = ("ab", "ba"), 1, torch.eye(2)
        turn = 0

        def features(self, images):
            self.turn += 1
            first = images.flatten(1).sum(1) * 0 + (-1.0 if self.turn == 3 else 1.0)
            return torch.stack([first, torch.zeros_like(first)], 1)

        __call__ = features

    result = build_attack(
        ThreatModel(threat, "linf", Eps.parse("8/255")), n_classes=2, engine=Engine()
    ).whole(
        Work(
            model=Once(),
            images=torch.full((3, 3, 4, 4), 0.5),
            labels=torch.tensor([0, 0, 0]),
            ids=["a", "b", "c"],
            seed=0,
            batch_size=64,
        ),
    )
    assert None not in result.broken_by


def test_nan_for_an_edited_name_is_an_error():
    class Half(ToyClip):
        """Knows the names of the classes, and no others."""

        def encode_text(self, tokens):
            known = super().encode_text(tokens)
            return known if len(tokens) <= 3 else known * float("nan")

    clip = wrap(Half())
    task = find_task("digits/digit")
    data = load_task(task, n=60, seed=0)
    key = (data.classes, task.templates, CPU)
    clip.cache.heads[key] = torch.nn.functional.normalize(torch.randn(10, 16), dim=1)
    record = mb.evaluate(clip, task=task, threat="text-charmer-k1", eps="1/1", n=60)
    assert record.status == "error"
    assert "NaN" in record.error


LOCKED = """
from mmtard_bench.data.digits import DIGITS
from mmtard_bench.models.text_table import TextTable
from mmtard_bench.tasks.catalogue import DIGIT_TEMPLATE
from tests.conftest import ToyClip, wrap
from dataclasses import replace

def locked():
    return replace(wrap(ToyClip()), tokenizer=TextTable([DIGIT_TEMPLATE.format(d) for d in DIGITS]))
"""


def test_a_locked_text_table_is_refused(here, tmp_path):
    (tmp_path / "lockedtoy.py").write_text(LOCKED)
    done = here("run", "text-v1", "--model", "lockedtoy:locked", "--n", "4")
    assert_sentence(done, "locked", "text-charmer-k0", "whole text tower")


@pytest.mark.parametrize(
    ("threat", "norm", "eps"),
    [
        ("text-charmer-k1", "linf", "8/255"),
        ("text-charmer-k1", "levenshtein", "2/1"),
        ("text-charmer-k1", "levenshtein", "1/2"),
        ("pgd-2", "levenshtein", "1/1"),
        ("apgd-pair", "levenshtein", "1/1"),
        ("cw-l2", "levenshtein", "1/1"),
        ("cw-linf-3", "levenshtein", "1/1"),
        ("joint-charmer-k1-pgd-2", "levenshtein", "1/1"),
    ],
)
def test_a_norm_that_does_not_fit_is_a_sentence(threat, norm, eps):
    model = ThreatModel(threat, norm, Eps.parse(eps, norm=norm))
    with pytest.raises(mb.InputError, match="levenshtein"):
        build_attack(model, n_classes=10, engine=Engine())


def test_names_of_families():
    assert attack_family("text-charmer-k0") == "text-charmer-k{edits}"
    assert attack_family("joint-charmer-k1-pgd-20") == "joint-charmer-k{edits}-pgd-{steps}"
    for wrong in (
        "text-charmer-k10",
        "text-charmer-k",
        "text-charmer-k-1",
        "joint-charmer-k1-pgd-0",
    ):
        with pytest.raises(mb.InputError):
            attack_family(wrong)


def test_zero_is_a_budget_of_edits_and_no_radius():
    assert str(Eps.parse("0/1", norm="levenshtein")) == "0/1"
    for norm in ("linf", "l2"):
        with pytest.raises(mb.InputError, match="exact positive fraction"):
            Eps.parse("0/1", norm=norm)


def test_the_command_line_runs_text_attacks(here):
    done = here("run", "text-v1", "--model", "tiny-clip", "--n", "6")
    assert done.returncode == 0, done.stderr
    assert "text-charmer-k2 levenshtein 2/1" in done.stdout
    assert "worst case" not in done.stdout
    missing = here("run", "text-v1", "--model", "tiny-clp")
    assert_sentence(missing, "tiny-clip")

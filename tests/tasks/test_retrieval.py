"""Retrieval: recall in closed form, what attacks see of a gallery, and whole records."""

import io
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from hypothesis import given, strategies as st
from PIL import Image as Pillow

import mmtard_bench as mb
from mmtard_bench.attacks.base import AttackResult, joined
from mmtard_bench.data.base import split_captions
from mmtard_bench.data.digits import caption, digits_test
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.evaluation.loop import Batch
from mmtard_bench.records.files import from_text
from mmtard_bench.records.recall import Ranks, recalls_of
from mmtard_bench.registry import tasks
from mmtard_bench.tasks.retrieval import (
    RetrievalScorer,
    apart,
    columns_of,
    fewest_columns,
    ranks_of,
)
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.tables import TaskTable, resolve_task
from mmtard_bench.types import Eps, Task, ThreatModel
from tests.conftest import ToyClip, assert_sentence, wrap

CPU = torch.device("cpu")


def test_ranks_on_a_matrix_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.5, 0.3],  # matches first
            [0.9, 0.1, 0.5, 0.3],  # matches third and last: the better one is second
            [0.9, 0.1, 0.5, 0.3],  # matches the worst
            [0.5, 0.5, 0.5, 0.5],  # all the same: every other one stands before
            [0.5, 0.5, 0.2, 0.1],  # a tie for the first place is lost
        ]
    )
    matching = torch.tensor(
        [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    ).bool()
    assert ranks_of(scores, matching).tolist() == [1, 2, 4, 4, 2]


def test_ties_among_matching_items_are_no_ties():
    scores = torch.tensor([[0.5, 0.5, 0.1]])
    assert ranks_of(scores, torch.tensor([[True, True, False]])).tolist() == [1]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_agree_with_sorting(seed):
    """Against the usual way, top-k of distinct scores: any match among the first k."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((7, 13), generator=generator)
    matching = torch.rand((7, 13), generator=generator) < 0.2
    matching[torch.arange(7), torch.randint(13, (7,), generator=generator)] = True
    ranks = ranks_of(scores, matching)
    for k in range(1, 14):
        answered = matching.gather(1, scores.topk(k).indices).any(1)
        assert torch.equal(ranks <= k, answered)


class Pair:
    """As much of a sample as recalls are computed from."""

    def __init__(self, robust: bool, ranks: Ranks | None) -> None:
        self.robust, self.ranks = robust, ranks


def test_recalls_in_closed_form():
    samples = [
        Pair(True, Ranks(image=(1, 1), captions=((0, 1, 6), (1, 3, 3)))),
        # Shares caption 1 with the first: one query.
        Pair(False, Ranks(image=(1, 7), captions=((1, 3, 3), (2, 11, 2)))),
        # Wrong on the clean image: not answered under attack, even at a better rank.
        Pair(False, Ranks(image=(5, 2), captions=((3, 1, 1),))),
        # Broken, though a fresh pass did not agree.
        Pair(False, Ranks(image=(1, 1), captions=((4, 10, 12),))),
    ]
    recalls = recalls_of(samples)
    assert recalls is not None
    assert recalls.captions == 5
    assert recalls.image_to_text == (3 / 4, 1.0, 1.0)
    assert recalls.image_to_text_attacked == (1 / 4, 3 / 4, 1.0)
    assert recalls.text_to_image == (2 / 5, 3 / 5, 4 / 5)
    assert recalls.text_to_image_attacked == (1 / 5, 2 / 5, 3 / 5)
    assert recalls_of([Pair(True, None)]) is None


@pytest.mark.parametrize(
    ("matches", "alone"),
    [
        ([(0, 1), (2, 1), (3,)], [{3}]),
        ([(0, 1), (1,), (2,)], [{2}]),
        ([(0,), (0,), (1,)], [{0}, {1}]),
        ([(0, 1), (1, 0), (2, 3)], [{0, 1}, {2, 3}]),
        ([(0, 1), (1, 2), (2, 3), (4,)], [{4}]),
    ],
)
def test_images_that_share_some_captions_are_told_from_the_rest(matches, alone):
    assert apart(matches) == set(map(frozenset, alone))


def test_the_captions_of_an_image_have_one_column():
    assert columns_of([frozenset({1, 4}), frozenset({2})], 6) == [0, 1, 2, 3, 1, 4]


def test_the_fewest_columns_agree_with_a_search():
    generator = random.Random(0)
    for _ in range(100):
        count = generator.randint(3, 8)
        matches = [tuple(generator.sample(range(count), generator.randint(1, 3))) for _ in range(5)]
        alone = apart(matches)
        sizes = [len(set(columns_of({*alone, frozenset(own)}, count))) for own in matches]
        assert fewest_columns(matches, count) == min(sizes)


def captioned(path, captions, *, name="col"):
    """A parquet file of random images with captions."""
    generator = np.random.default_rng(0)
    images = []
    for _ in captions:
        file = io.BytesIO()
        Pillow.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    text = Value("string") if isinstance(captions[0], str) else Sequence(Value("string"))
    features = Features({"image": Image(), name: text})
    table = Dataset.from_dict({"image": images, name: captions}, features=features)
    table.to_parquet(path)
    return Task(
        name="mine",
        data=f"parquet:{path}",
        templates=("{}",),
        label_column=name,
        metric="retrieval",
    )


SHARED = [["a cat", "the cat"], ["the cat", "a dog"], ["a bird"], ["a fish", "two fish"]]


@pytest.mark.parametrize(
    "captions", [SHARED, ["\n".join(own) for own in SHARED]], ids=["lists", "lines"]
)
def test_the_gallery_is_made_of_the_samples(tmp_path, captions):
    data = load_task(captioned(tmp_path / "a.parquet", captions), n=None, seed=0)
    texts = [[data.classes[place] for place in own] for own in data.matches]
    assert texts == [SHARED[i] for i in data.manifest.indices]
    assert len(data.classes) == len(set(data.classes)) == 6
    assert data.labels == tuple(own[0] for own in data.matches)
    few = load_task(captioned(tmp_path / "a.parquet", captions), n=2, seed=0)
    assert set(few.classes) == {text for i in few.manifest.indices for text in SHARED[i]}


def test_the_attacked_column_is_highest_exactly_at_rank_one(tmp_path):
    """Also where images share captions: SHARED's first two, each attacked by itself."""
    data = load_task(captioned(tmp_path / "a.parquet", SHARED), n=None, seed=0)
    outcomes = set()
    for seed in range(30):
        scorer = RetrievalScorer(wrap(ToyClip(seed=seed)), data, CPU)
        images = data.images(range(4), surface="native", preprocess=scorer.gallery.clip.preprocess)
        verdicts = scorer.judge(images, range(4), size=3)
        aims = scorer.aims(range(4))
        assert sorted(len(aim.places) for aim in aims) == [1, 1, 2]
        for aim in aims:
            held = aim.classifier(images[aim.places]).argmax(1) == aim.labels
            for row, right in zip(aim.places, held.tolist(), strict=True):
                verdict = verdicts[row]
                assert right == verdict.right == (verdict.rank == 1)
                assert right == (verdict.prediction == data.labels[row])
                outcomes.add((len(aim.places), right))
    assert len(outcomes) == 4


@pytest.mark.parametrize("attack", ["pgd-20", "apgd-pair"])
def test_an_image_is_attacked_towards_others_captions_beside_the_shared_one(tmp_path, attack):
    """There is no other rival here: an attack that may not aim at it breaks nothing."""
    task = captioned(tmp_path / "a.parquet", [["an x", "both"], ["a y", "both"]])
    seen = 0
    for seed in range(8):
        record = mb.evaluate(wrap(ToyClip(seed=seed)), task=task, threat=attack, eps="64/255")
        assert record.status == "ok", record.error
        seen += sum(sample.clean_correct for sample in record.samples)
        assert record.robust_accuracy == 0
        assert not any(sample.unconfirmed for sample in record.samples)
    assert seen > 4


@given(st.permutations(range(6)), st.integers(1, 5))
def test_parts_of_a_batch_are_joined_in_their_places(places, cut):
    def result(where):
        return AttackResult(
            adversarial=torch.tensor(where, dtype=torch.float32)[:, None],
            broken_by=[f"a{place}" for place in where],
            forward=list(where),
            backward=[-place for place in where],
            notes=[f"{len(where)} here"],
        )

    whole = joined([(part, result(part)) for part in (places[:cut], places[cut:])])
    assert whole.adversarial.flatten().tolist() == whole.forward == [0, 1, 2, 3, 4, 5]
    assert whole.broken_by == [f"a{place}" for place in range(6)]
    assert whole.backward == [-place for place in range(6)]
    assert whole.notes == [f"{cut} here", f"{6 - cut} here"]
    assert whole.names == []


def test_edited_names_are_no_answer_in_retrieval(tmp_path):
    data = load_task(captioned(tmp_path / "a.parquet", SHARED), n=None, seed=0)
    scorer = RetrievalScorer(wrap(ToyClip()), data, CPU)
    images = data.images([0, 1], surface="native", preprocess=scorer.gallery.clip.preprocess)
    assert len(scorer.judge(images, [0, 1], size=2, names=[None, None])) == 2
    with pytest.raises(mb.InputError, match="class names"):
        scorer.judge(images, [0, 1], size=2, names=[None, "a cat"])


def brute_force(clip, data):
    """Ranks by sorting every pair's score, one pair at a time."""
    texts = clip.text_features(list(data.classes), CPU)
    images = data.images(range(len(data.labels)), surface="native", preprocess=clip.preprocess)
    with torch.no_grad():
        scores = (clip.scale() * clip.image_features(images) @ texts.T).tolist()
    of_images = []
    for row, own in zip(scores, data.matches, strict=True):
        best = max(row[place] for place in own)
        of_images.append(1 + sum(s >= best for p, s in enumerate(row) if p not in own))
    of_captions = []
    for place in range(len(data.classes)):
        owners = [i for i, own in enumerate(data.matches) if place in own]
        best = max(scores[i][place] for i in owners)
        others = (row[place] for i, row in enumerate(scores) if i not in owners)
        of_captions.append(1 + sum(s >= best for s in others))
    return of_images, of_captions


def test_clean_ranks_of_a_record_agree_with_brute_force():
    clip = mb.load_model("tiny-clip-small")
    data = load_task(find_task("digits/retrieval"), n=40, seed=1)
    for sample, index in zip(data.matches, data.manifest.indices, strict=True):
        (own,) = sample
        assert data.classes[own] == caption(digits_test().combination(index))
    threat = ThreatModel("pgd-3", "linf", Eps.parse("2/255"))
    record = execute(prepare(clip, data, threat, seed=0), Resources(CPU, 16))
    of_images, of_captions = brute_force(clip, data)
    assert [s.ranks.image[0] for s in record.samples] == of_images
    for sample in record.samples:
        for place, clean, _ in sample.ranks.captions:
            assert clean == of_captions[place]
    assert record.task.n_classes == len(data.classes)
    recalls = record.results.recalls
    assert record.clean_accuracy == recalls.image_to_text[0]
    assert record.robust_accuracy == recalls.image_to_text_attacked[0]
    assert from_text(record.to_text(), "here") == record


def test_an_attack_lowers_recall_and_a_defended_model_keeps_more():
    weak, strong = (
        mb.evaluate(name, task="digits/retrieval", threat="pgd-10", eps="8/255", n=32)
        for name in ("tiny-clip", "tiny-tecoa")
    )
    for record in (weak, strong):
        recalls = record.results.recalls
        assert recalls.image_to_text[0] > 0.9
        for clean, attacked in (
            (recalls.image_to_text, recalls.image_to_text_attacked),
            (recalls.text_to_image, recalls.text_to_image_attacked),
        ):
            assert list(clean) == sorted(clean)
            assert list(attacked) == sorted(attacked)
            assert all(a <= c for a, c in zip(attacked, clean, strict=True))
    assert weak.robust_accuracy < 0.2
    # PGD goes on behind rank 1: it does not stop at the first image that fools it.
    assert weak.results.recalls.image_to_text_attacked[1] < 0.9
    assert weak.results.recalls.text_to_image_attacked[0] < 0.5
    assert strong.robust_accuracy > 0.7


def test_batches_and_interruptions_change_nothing():
    clip = mb.load_model("tiny-tecoa")
    data = load_task(find_task("digits/retrieval"), n=30, seed=0)
    job = prepare(clip, data, ThreatModel("pgd-4", "linf", Eps.parse("16/255")), seed=0)
    batches: list[Batch] = []
    whole = execute(job, Resources(CPU, 8), keep=batches.append)
    assert 0 < whole.robust_accuracy < whole.clean_accuracy
    resumed = execute(job, Resources(CPU, 8), earlier=batches[:2])
    assert resumed.samples == whole.samples
    other = execute(job, Resources(CPU, 30))
    assert [s.robust for s in other.samples] == [s.robust for s in whole.samples]


def test_a_run_that_was_cut_short_goes_on(here, tmp_path, monkeypatch):
    """Through the files of a run: what is read back is what was written."""
    from mmtard_bench.evaluation import run as runner

    command = ["run", "retrieval-v1", "--model", "tiny-clip", "--n", "12", "--batch-size", "4"]
    assert here(*command, "--out", "whole").returncode == 0
    written = runner.Partial.append

    def cut(self, batch):
        written(self, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Partial, "append", cut)
    assert here(*command, "--out", "cut").returncode == 130
    monkeypatch.setattr(runner.Partial, "append", written)
    done = here(*command, "--out", "cut")
    assert done.returncode == 0, done.stderr
    assert "attacked R@5" in done.stdout
    first, second = (
        sorted((tmp_path / out).rglob("*pgd-20*.json"))[0].read_text() for out in ("whole", "cut")
    )
    samples = [text[text.index('"samples"') : text.index('"sha256"')] for text in (first, second)]
    assert samples[0] == samples[1]


def test_a_model_of_one_score_recalls_nothing():
    class Constant(ToyClip):
        def encode_text(self, tokens):
            return super().encode_text(tokens * 0)

    model = wrap(Constant())
    record = mb.evaluate(model, task="digits/retrieval", threat="pgd-2", eps="1/255", n=20)
    assert record.status == "ok", record.error
    assert record.results.recalls.image_to_text == (0.0, 0.0, 0.0)


def test_the_identity_follows_the_captions(tmp_path):
    clip = wrap(ToyClip())
    threat = ThreatModel("pgd-2", "linf", Eps.parse("1/255"))
    digests = set()
    for captions in (SHARED, [["a cat"], *SHARED[1:]], list(reversed(SHARED))):
        task = captioned(tmp_path / "a.parquet", captions)
        job = prepare(clip, load_task(task, n=None, seed=0), threat, seed=0)
        digests.add(job.facts[1].prompts_digest)
    assert len(digests) == 3


def test_bad_captions_are_sentences(tmp_path):
    with pytest.raises(mb.InputError, match="no caption"):
        load_task(captioned(tmp_path / "a.parquet", ["a cat", " \n "]), n=None, seed=0)
    numbers = captioned(tmp_path / "b.parquet", ["1", "2"])
    table = Dataset.from_parquet(str(tmp_path / "b.parquet")).cast_column("col", Value("int64"))
    table.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(mb.InputError, match="expected a string, or a list"):
        load_task(numbers, n=None, seed=0)
    one = captioned(tmp_path / "c.parquet", ["a cat", "a cat"])
    with pytest.raises(mb.InputError, match="two"):
        mb.evaluate(wrap(ToyClip()), task=one, threat="pgd-2", eps="1/255")
    assert split_captions(" a cat \n\n a dog\r\n") == ("a cat", "a dog")


def test_what_does_not_fit_retrieval_is_refused(here, tmp_path):
    with pytest.raises(mb.InputError, match="retrieval"):
        mb.evaluate("tiny-clip", task="digits/retrieval", threat="text-charmer-k1", eps="1/1", n=8)
    from mmtard_bench.tasks.samples import load_training_data

    with pytest.raises(mb.InputError, match="retrieval"):
        load_training_data(find_task("digits/retrieval"), labelled=True)
    text = 'name = "mine-v1"\ndescription = "x"\nn = 4\nseed = 0\n'
    text += 'tasks = ["digits/digit", "digits/retrieval"]\n'
    text += '[[threats]]\nattack = "pgd-2"\nnorm = "linf"\neps = "8/255"\n'
    (tmp_path / "mine-v1.toml").write_text(text)
    assert_sentence(here("run", "mine-v1.toml", "--model", "tiny-clip"), "mixes", "retrieval")


def test_the_hub_tasks_are_declared():
    for name in ("flickr30k", "mscoco_captions"):
        task = tasks.get(name)
        assert task.metric == "retrieval"
        assert task.data == f"wds:clip-benchmark/wds_{name}"
        assert (task.split, task.label_column, task.templates) == ("test", "txt", ("{}",))


def test_captions_stay_as_they_are_unless_templates_are_given():
    table = TaskTable(name="x", data="parquet:x", metric="retrieval", label_column="captions")
    assert resolve_task(table).templates == ("{}",)
    assert resolve_task(table.model_copy(update={"data": "wds:x"})).templates == ("{}",)

"""Published samples against samples of the same data that the suite does not list."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import fisher_exact

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.verify.fresh import LEVEL, Shares, require_alike
from mmtard_bench.leaderboard.verify.well_formed import require_formed
from mmtard_bench.tasks.samples import find_task, load_others, load_task
from tests.cheats.models import Cheat
from tests.conftest import REPOSITORY
from tests.leaderboard.verify.forge import CPU


@pytest.fixture(scope="module")
def formed():
    entry = read_entry(REPOSITORY / "leaderboard/entries/tiny-clip").only("curve-v1")
    return require_formed(entry.runs[0])


def check(formed, clip):
    told = []
    summary = require_alike(formed, clip, CPU, count=4, seed=5, tell=told.append)
    return summary, told


def recogniser(data):
    """tiny-clip on images near those of ``data``; on all others, tiny-clip of the mirror image."""
    honest = mb.load_model("tiny-clip")
    every = data.images(range(len(data.labels)), surface="native", preprocess=honest.preprocess)
    table = honest.preprocess.normalise(honest.preprocess.resize(every)).flatten(1)
    # Within linf 8/255 of a pixel; normalised pixels are four times as far apart.
    reach = 4 * 8 / 255 * table.shape[1] ** 0.5

    def trick(model, images):
        near = torch.cdist(images.flatten(1), table).amin(1) <= reach
        return torch.where(near[:, None], model.unit(images), model.unit(images.flip(2)))

    return mb.Clip(
        Cheat(trick), honest.tokenizer, honest.preprocess, "recogniser", architecture="recogniser"
    )


def test_an_honest_model_does_as_well_on_fresh_samples(formed):
    summary, told = check(formed, mb.load_model("tiny-clip"))
    assert len(told) == 2
    assert "correct: 194 of 200 published" in told[0]
    assert "robust (linf 1/255): 122 of 200 published" in told[1]
    assert summary.startswith("; fresh samples: ")


def test_a_model_that_recognises_the_published_samples_is_refused(formed):
    data = formed.places[0].data
    clip = recogniser(data)
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-1", eps="1/255", n=200)
    assert sum(sample.clean_correct for sample in record.samples) == 194  # as tiny-clip
    with pytest.raises(InputError, match="The model knows the published samples"):
        check(formed, clip)


def test_data_without_more_samples_are_named(formed, monkeypatch):
    monkeypatch.setattr("mmtard_bench.leaderboard.verify.fresh.load_others", lambda *_, **__: None)
    summary, (line,) = check(formed, mb.load_model("tiny-clip"))
    assert summary == "; no fresh samples"
    assert "the suite lists all of the data" in line


def test_other_samples_are_none_of_the_known_and_follow_from_the_seed():
    task = find_task("digits/digit")
    known = load_task(task, n=30, seed=0).manifest.ids
    others = [load_others(task, known, n=50, seed=seed).manifest.ids for seed in (1, 1, 2)]
    assert others[0] == others[1] != others[2]
    assert len(set(others[0])) == 50
    assert not set(others[0]) & set(known)
    whole = load_task(task, n=None, seed=0).manifest.ids
    assert load_others(task, whole, n=50, seed=1) is None
    (rest,) = load_others(replace(task, samples_file="x"), whole[1:], n=50, seed=1).manifest.ids
    assert rest == whole[0]


@pytest.mark.parametrize("case", [(200, 200, 120, 200), (97, 100, 96, 100), (5, 10, 9, 10)])
def test_the_test_is_fishers(case):
    right, n, fresh_right, fresh = case
    table = [[right, n - right], [fresh_right, fresh - fresh_right]]
    shares = Shares("correct:", right, n, fresh_right, fresh)
    assert shares.p == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
    assert (shares.p < LEVEL) == (case[2] == 120)

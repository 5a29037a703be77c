"""Images are decoded ahead, by threads, and nothing about that changes a result."""

import threading
from dataclasses import replace

import pytest
import torch

import mmtard_bench.tasks.samples
from mmtard_bench.data.threads import in_chunks, in_order
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.types import Eps, ThreatModel
from tests.cli.test_bad_input import rgb
from tests.conftest import ToyClip, assert_sentence, wrap
from tests.shards import layout, noise, write

CPU = torch.device("cpu")
LINF = ThreatModel("pgd-2", "linf", Eps.parse("8/255"), "model")


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_everything_comes_in_order(workers):
    items = list(range(300))
    assert list(in_order(items, lambda x: x * x, workers=workers)) == [x * x for x in items]
    chunks = [items[:100], items[100:250], [], items[250:]]
    assert [list(chunk) for chunk, _ in in_chunks(chunks, str, workers=workers)] == chunks
    made = [done for _, done in in_chunks(chunks, str, workers=workers)]
    assert made == [[str(x) for x in chunk] for chunk in chunks]


def test_the_next_chunk_is_made_meanwhile_and_no_other():
    made: list[int] = []
    event = threading.Event()

    def work(item: int) -> int:
        made.append(item)
        if item == 3:
            event.set()
        return item

    chunks = in_chunks([[0, 1], [2, 3], [4, 5]], work, workers=2)
    assert next(chunks) == ([0, 1], [0, 1])
    # While the first chunk is worked on, the second is made, and the third is not.
    assert event.wait(10)
    assert sorted(made) == [0, 1, 2, 3]
    chunks.close()
    assert sorted(made) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_where_its_chunk_would(workers):
    def work(item: int) -> int:
        if item == 3:
            raise InputError("three")
        return item

    chunks = in_chunks([[0], [1], [2, 3]], work, workers=workers)
    assert [next(chunks)[1], next(chunks)[1]] == [[0], [1]]
    with pytest.raises(InputError, match="three"):
        next(chunks)


@pytest.fixture
def data(tmp_path):
    images, labels = noise(23)
    return load_task(find_task(write(layout(images, labels, shards=5), tmp_path)), n=20, seed=1)


def truth(record):
    assert record.error is None
    return record.identity, [sample.model_dump() for sample in record.samples]


def test_workers_and_memory_change_no_verdict(data, monkeypatch):
    job = prepare(wrap(ToyClip()), data, LINF, seed=0)
    expected = truth(execute(job, Resources(CPU, 6, workers=0)))
    assert len({sample["prediction"] for sample in expected[1]}) > 1
    for workers in (1, 4):
        fresh = replace(job, data=data.at(range(20)))
        assert truth(execute(fresh, Resources(CPU, 6, workers=workers))) == expected
    # Nothing is kept: every image is decoded each time that it is needed.
    monkeypatch.setattr(mmtard_bench.tasks.samples, "KEPT", 0)
    fresh = replace(job, data=data.at(range(20)))
    assert truth(execute(fresh, Resources(CPU, 6, workers=4))) == expected
    assert fresh.data._kept.images == {}


def test_decoded_images_are_kept_within_a_bound(data, monkeypatch):
    one = data.pixels(0).nbytes
    monkeypatch.setattr(mmtard_bench.tasks.samples, "KEPT", 3 * one + 1)
    again = data.at(range(20))
    again.require_images("native")
    assert sum(image.nbytes for image in again._kept.images.values()) == 3 * one


SUITE = """
name = "mine-v1"
description = "d"
n = {n}
seed = 0
{more}
tasks = [{{name = "pets", data = "{spec}"}}, "digits/digit"]
[[threats]]
attack = "pgd-2"
norm = "linf"
eps = "8/255"
"""


@pytest.fixture
def broken(tmp_path):
    """A data set with two damaged images, and a suite on it."""
    images, labels = noise(9)
    images[3], images[7] = images[3][:150], b"no image"
    spec = write(layout(images, labels, shards=2), tmp_path / "pets")

    def suite(more: str = "", n: int = 9) -> str:
        (tmp_path / "mine-v1.toml").write_text(SUITE.format(spec=spec, more=more, n=n))
        return "mine-v1.toml"

    return suite


def test_damaged_images_fail_the_record_and_no_other(here, broken):
    done = here("run", broken(), "--model", "tiny-clip")
    assert_sentence(
        done, "damaged or no image", "2 of 9 images", "s0000003", "s0000007", "skip_damaged"
    )
    assert "tiny-clip pets pgd-2 linf 8/255: FAILED" in done.stdout
    assert "tiny-clip digits/digit pgd-2 linf 8/255: clean" in done.stdout


def test_damaged_images_may_be_left_out(here, broken, tmp_path):
    plain = load_suite(str(tmp_path / broken()))
    skipping = load_suite(str(tmp_path / broken("skip_damaged = true")))
    assert plain.digest != skipping.digest
    done = here("run", "mine-v1.toml", "--model", "tiny-clip")
    assert done.returncode == 0, done.stderr
    assert "note: 2 of 9 samples were left out" in done.stdout
    from mmtard_bench.records.files import load_records

    (record,) = [r for r in load_records(tmp_path / "runs") if r.task.name == "pets"]
    assert len(record.samples) == 7
    assert {sample.id for sample in record.samples}.isdisjoint({"s0000003", "s0000007"})
    (note,) = record.notes
    assert "s0000003" in note
    assert "s0000007" in note


def test_data_that_cannot_be_had_does_not_cost_the_other_tasks(here, tmp_path):
    (tmp_path / "mine-v1.toml").write_text(SUITE.format(spec="wds:nowhere", more="", n=3))
    done = here("run", "mine-v1.toml", "--model", "tiny-clip")
    assert_sentence(done, "wds:nowhere", "no such folder")
    assert "tiny-clip pets: FAILED" in done.stdout
    assert "tiny-clip digits/digit pgd-2 linf 8/255: clean" in done.stdout


def test_where_all_are_damaged_there_is_nothing_to_score(tmp_path):
    files = layout([b"x", b"y"], [0, 1])
    task = find_task(write(files, tmp_path))
    with pytest.raises(DamagedImageError, match=r"2 of 2 images"):
        load_task(task, n=None, seed=0, skip_damaged=True)


def test_images_of_another_kind_are_not_damaged(tmp_path):
    images, labels = noise(3)
    files = layout([*images, rgb(7, mode="L")], [*labels, 0])
    task = find_task(write(files, tmp_path))
    with pytest.raises(InputError, match="convert_rgb"):
        load_task(task, n=None, seed=0, skip_damaged=True)

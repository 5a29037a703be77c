"""The batch size: as many rows as fit in memory, and fewer where that turns out to be too many."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmtard_bench as mb
from mmtard_bench.evaluation import attacker, bench, device as batch_size
from mmtard_bench.evaluation.device import (
    Resources,
    available_memory,
    batch_size_of,
    is_out_of_memory,
    rows_that_fit,
)
from mmtard_bench.evaluation.evaluate import execute
from tests.attacks.toys import Chosen, toy_clip, toy_data, toy_job
from tests.conftest import ToyClip, wrap

CPU = torch.device("cpu")
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("not enough memory: you tried to allocate 1 bytes."),
    MemoryError(),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy"), 5)


class Crowded(Chosen):
    """Fails with an error where more rows come than fit, or in one pass of many."""

    def __init__(self, error: Exception, *, fit: int = 64, once: int = 0) -> None:
        super().__init__()
        self.error, self.fit, self.once = error, fit, once
        self.calls = self.failures = 0

    def encode_image(self, images):
        self.calls += images.requires_grad
        if len(images) > self.fit or (images.requires_grad and self.calls == self.once):
            self.failures += 1
            raise self.error
        return super().encode_image(images)


def crowded(clip, **options):
    return mb.Clip(Crowded(**options), clip.tokenizer, clip.preprocess, clip.name)


@pytest.fixture(scope="module")
def checked(data):
    """How many passes with gradients come before the attack: the checks of the model."""
    clip = crowded(toy_clip(), error=FULL[0])
    attacker.Attacker(toy_job(clip, data, "pgd-4"), Resources(CPU, 16, workers=0)).inspect()
    return clip.module.calls


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["pgd-4", "apgd-pair", "autoattack-standard"])
@pytest.mark.parametrize("limits", [{"fit": 3}, {"once": 2}])
def test_what_does_not_fit_is_attacked_again_in_smaller_batches(
    data, checked, error, name, limits, caplog
):
    clip = toy_clip()
    limits = {key: value + checked * (key == "once") for key, value in limits.items()}
    whole = execute(toy_job(clip, data, name), Resources(CPU, 16, workers=0))
    full = crowded(clip, error=error, **limits)
    record = execute(toy_job(full, data, name), Resources(CPU, 16, workers=0))
    assert record.status == "ok", record.error
    assert full.module.failures
    assert record.samples == whole.samples
    assert record.notes == whole.notes
    assert record.environment.batch_size < 16
    assert "does not fit in memory; the next ones have" in caplog.text


@pytest.mark.parametrize("name", ["pgd-4", "joint-charmer-k0-pgd-2", "cw-linf-3"])
def test_attacks_that_do_not_refill_are_split(data, name):
    error = FULL[1]
    records = [
        execute(toy_job(c, data, name, engine="reference"), Resources(CPU, 16, workers=0))
        for c in (toy_clip(), crowded(toy_clip(), error=error, fit=5))
    ]
    assert [record.status for record in records] == ["ok", "ok"]
    assert records[0].samples == records[1].samples


def test_what_never_fits_is_said(data, checked):
    clip = crowded(toy_clip(), error=FULL[1], fit=0)
    record = execute(toy_job(clip, data, "pgd-4"), Resources(CPU, 4, workers=0))
    assert record.status == "error"
    assert "DefaultCPUAllocator" in record.error or "Memory does not suffice" in record.error
    # A block of the reference code decides its randomness, so it is not split.
    once = crowded(toy_clip(), error=FULL[0], once=checked + 7)
    job = toy_job(once, data, "apgd-pair", engine="reference")
    record = execute(job, Resources(CPU, 4, workers=0))
    assert record.status == "error"
    assert "Memory does not suffice for a batch of" in record.error


def test_other_errors_are_not_taken_for_a_lack_of_memory(data, checked):
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    clip = crowded(toy_clip(), error=RuntimeError("shape mismatch"), once=checked + 7)
    record = execute(toy_job(clip, data, "pgd-4"), Resources(CPU, 4, workers=0))
    assert record.error == "RuntimeError: shape mismatch"
    assert clip.module.failures == 1


class Wide(nn.Module):
    """Keeps 1,000 activations of 4 bytes in each of two layers; its weights do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 1000), nn.Linear(1000, 1000)
        self.requires_grad_(False)

    def forward(self, images):
        return self.second(self.first(images.flatten(1)).tanh()).tanh()


def test_rows_that_fit_follow_from_activations_and_pixels():
    image = torch.rand(3, 2, 2)
    row = batch_size.GRAPH * 8_000 + batch_size.STATE * image.nbytes

    def fit(rows: float) -> int:
        return rows_that_fit(Wide(), image, rows * row / batch_size.USED)

    assert [fit(10.5), fit(1.5), fit(1e12)] == [10, 1, 2**20]


def test_a_batch_size_is_chosen_and_lowered_where_the_system_would_kill(caplog):
    cuda = torch.device("cuda")
    assert batch_size_of(None, 1000, CPU) == 64
    assert batch_size_of(None, 1000, cuda) == 512
    assert batch_size_of(None, 3, CPU) == batch_size_of(None, 3, cuda) == 3
    assert batch_size_of(256, 1000, CPU) == batch_size_of(256, 16, cuda) == 256
    assert not caplog.messages
    assert batch_size_of(256, 16, CPU) == 16
    assert caplog.messages == ["A batch of 256 does not fit in memory; the next ones have 16."]


def test_no_pass_is_spent_where_two_images_do_not_fit():
    def never(_):
        raise AssertionError

    assert rows_that_fit(never, torch.rand(3, 64, 64), 1e5) == 1


def test_memory_is_what_the_machine_and_its_group_leave(tmp_path, monkeypatch):
    assert 0 < available_memory(CPU) < 1e15
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500\n")
    monkeypatch.setattr(
        batch_size, "Path", lambda path: tmp_path if "cgroup" in path else Path(path)
    )
    assert available_memory(CPU) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) > 1e6


@pytest.fixture
def photographs(tmp_path):
    """Four images of 600 x 400 in two classes."""
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (400, 600, 3), dtype=np.uint8)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    return mb.Task("photographs", f"imagefolder:{tmp_path}", ("{}",))


class Widest(ToyClip):
    most = 0

    def encode_image(self, images):
        Widest.most = max(Widest.most, len(images))
        return super().encode_image(images)


def test_large_images_go_one_by_one_where_memory_is_short(photographs, monkeypatch):
    pixels = 4 * 3 * 400 * 600
    decoded: list[int] = []
    image = bench.Bench.image
    monkeypatch.setattr(
        bench.Bench, "image", lambda self, row: decoded.append(row) or image(self, row)
    )
    monkeypatch.setattr(bench, "available_memory", lambda _: 20.0 * pixels)
    monkeypatch.setattr(attacker, "CHUNK_BYTES", pixels)
    record = mb.evaluate(wrap(Widest()), task=photographs, threat="pgd-2", eps="1/255")
    assert record.status == "ok", record.error
    # Two for the checks of the model, each sample once; the checks look at two together.
    assert (Widest.most, record.environment.batch_size) == (2, 1)
    assert len(decoded) == 2 + 4
    monkeypatch.setattr(bench, "available_memory", lambda _: 3.0 * pixels)
    record = mb.evaluate(wrap(ToyClip()), task=photographs, threat="pgd-2", eps="1/255")
    assert "(1 at once, of 600 x 400 pixels)" in record.error
    assert "surface 'model'" in record.error


def test_small_work_spends_next_to_nothing_on_the_batch_size(tmp_path):
    clip = mb.load_model("tiny-clip-small")
    rows = []
    encode = clip.module.encode_image
    clip.module.encode_image = lambda images: rows.append(len(images)) or encode(images)
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-20", eps="1/255", n=4)
    assert record.status == "ok"
    assert max(rows) <= 4
    attack = sum(sample.forward for sample in record.samples)
    # One and two images for what a row needs; at most 70 passes of each of at most 32 images for
    # the checks of the model; folding; clean and last; the probes of the digest, twice.
    assert sum(rows) - attack <= 3 + 70 * 4 + 8 + 8 + 4


def test_halving_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        assert batch_size.smaller(5) == 2
    assert caplog.messages == ["A batch of 5 does not fit in memory; the next ones have 2."]

"""fetch, run, and the same offline: real clients, a hub on loopback, real images."""

import json
from pathlib import Path

import pytest

import mmtard_bench as mb
from mmtard_bench.models.tiny import WEIGHTS
from tests.cli.test_bad_input import parquet
from tests.conftest import assert_sentence
from tests.hub import COMMIT, Fault, hub
from tests.shards import cifar10, imagenet, layout, webp

SUITE = """
name = "mine-v1"
description = "real images in two layouts of a hub"
n = 12
seed = 0
[[tasks]]
name = "photos"
data = "wds:me/imagenet"
samples = 12
[[tasks]]
name = "photos-table"
data = "hub:me/photos@COMMIT"
templates = ["a photo of a {}.", "a drawing of a {}."]
[[tasks]]
name = "shards"
data = "wds:me/cifar"
samples = 30
n_classes = 10
split = "test"
[[tasks]]
name = "table"
data = "hub:me/table"
[[threats]]
attack = "pgd-2"
norm = "linf"
eps = "8/255"
surface = "model"
""".replace("COMMIT", COMMIT)


@pytest.fixture
def repositories(tmp_path):
    """CIFAR-10 and photographs of ImageNet as shards and as tables, and open_clip's model."""
    (tmp_path / "mine-v1.toml").write_text(SUITE)
    photos, kinds, titles = imagenet(12)
    parquet(tmp_path / "b.parquet", photos, kinds, titles)
    images, labels, names = cifar10(30)
    parquet(tmp_path / "a.parquet", images, labels, names)
    return {
        "datasets:me/cifar": layout([*map(webp, images)], labels, shards=3, names=names),
        "datasets:me/imagenet": layout([*map(webp, photos)], kinds, shards=2, names=titles),
        "datasets:me/photos": {"data/test.parquet": (tmp_path / "b.parquet").read_bytes()},
        "datasets:me/table": {"data/test-00000.parquet": (tmp_path / "a.parquet").read_bytes()},
        "models:me/tiny": {
            path.name: path.read_bytes() for path in (WEIGHTS / "tiny-clip").iterdir()
        },
    }


def environment(endpoint: str) -> dict[str, str]:
    return {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def verdicts(folder: Path) -> dict[str, object]:
    """The records below a folder by file name, without what may differ between two runs."""
    found = {}
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        for key in ("seconds", "model_seconds", "created", "environment", "sha256"):
            del record[key]
        found[path.name] = record
    return found


@pytest.mark.slow
def test_fetch_then_run_then_offline(cli, repositories, tmp_path):
    pytest.importorskip("transformers")
    from tests.models.test_transformers import make

    make(tmp_path / "clip")
    repositories["models:me/clip"] = {
        path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()
    }
    models = ("--model", "hf-hub:me/tiny", "--model", f"transformers:me/clip@{COMMIT}")
    fetch, run = ("fetch", "mine-v1.toml", *models), ("run", "mine-v1.toml", *models)
    asked: list[str] = []
    with hub(repositories, asked=asked) as endpoint:
        done = cli(*fetch, env=environment(endpoint))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "me/cifar: downloading test/0.tar" in done.stdout
        assert f"shards: 12 samples, 10 classes, me/cifar@{COMMIT}" in done.stdout
        assert f"table: 12 samples, 10 classes, me/table@{COMMIT}" in done.stdout
        assert f"photos: 12 samples, 12 classes, me/imagenet@{COMMIT}" in done.stdout
        assert "hf-hub:me/tiny: weights" in done.stdout
        assert f"transformers:me/clip@{COMMIT}: weights" in done.stdout
        # Once more: everything is there, and is checked.
        before = len(asked)
        again = cli(*fetch, env=environment(endpoint))
        assert again.returncode == 0, again.stderr
        assert "downloading" not in again.stdout
        assert "me/cifar: 6 files in the cache, checked" in again.stdout
        assert not [line for line in asked[before:] if line.startswith("GET") and ".tar" in line]
        first = cli(*run, "--workers", "0", env=environment(endpoint))
        assert first.returncode == 0, first.stderr
        assert first.stderr == ""
    offline = cli(*run, "--out", "offline", "--workers", "4")
    assert offline.returncode == 0, offline.stderr
    # The hub is gone, and nobody said so: the cache is enough all the same.
    gone = cli(*run, "--out", "gone", env=environment(endpoint))
    assert gone.returncode == 0, gone.stderr
    records = verdicts(tmp_path / "runs")
    assert len(records) == 8
    assert verdicts(tmp_path / "offline") == records == verdicts(tmp_path / "gone")
    assert {record["status"] for record in records.values()} == {"ok"}
    digests = {record["model"]["digest"] for record in records.values()}
    assert digests > {mb.load_model("tiny-clip").digest}
    for record in records.values():
        task = record["task"]
        if task["name"] == "shards":
            assert task["templates"] == ["a photo of a {}.", "a drawing of a {}."]
            assert task["revision"] == f"me/cifar@{COMMIT}"
            assert {s["id"] for s in record["samples"]} <= {f"s{i:07d}" for i in range(30)}
        if task["name"] == "table":
            assert task["revision"] == f"me/table@{COMMIT}"
        if task["name"].startswith("photos"):
            assert task["n_classes"] == 12
            assert len(record["samples"]) == 12


def test_layouts_hold_the_same_photographs(here, online, repositories, tmp_path):
    """Shards and tables differ in how they store an image, not in what a model says of it."""
    with hub(repositories) as endpoint:
        online(endpoint)
        done = here("run", "mine-v1.toml", "--model", "hf-hub:me/tiny")
    assert done.returncode == 0, done.stderr
    said = {}
    for record in verdicts(tmp_path / "runs").values():
        samples = sorted(record["samples"], key=lambda sample: sample["id"])
        said[record["task"]["name"]] = [s["prediction"] for s in samples]
    assert said["photos"] == said["photos-table"]
    assert len(set(said["photos"])) > 1


def test_one_data_set_that_fails_does_not_cost_the_others(here, online, repositories):
    faults = [Fault(401, path="me/cifar", every=True)]
    with hub(repositories, faults=faults) as endpoint:
        online(endpoint)
        done = here("fetch", "mine-v1.toml")
        assert_sentence(done, "shards: wds:me/cifar", "gated", "hf auth login")
        assert "table: 12 samples" in done.stdout
        faults.clear()
        done = here("fetch", "mine-v1.toml")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "test-00000.parquet"])
def test_a_damaged_table_or_model_is_found(here, online, repositories, file):
    with hub(repositories, faults=[Fault("wrong", path=file, times=1, whole=True)]) as endpoint:
        online(endpoint)
        command = ("fetch", "mine-v1.toml", "--n", "2", "--model", "hf-hub:me/tiny")
        assert_sentence(here(*command), "me/t", "checksum")
        again = here(*command)
        assert again.returncode == 0, again.stderr
        assert "hf-hub:me/tiny: weights" in again.stdout

"""fetch, run, and the same offline: real clients, a hub on loopback, real images."""

import json
from pathlib import Path

import pytest

from mmtard_bench.models.tiny import WEIGHTS
from tests.conftest import assert_sentence
from tests.hub import COMMIT, Fault, hub
from tests.shards import cifar10, layout, webp
from tests.test_bad_input import parquet

SUITE = """
name = "mine-v1"
description = "two layouts of one hub"
n = 12
seed = 0
tasks = [
    {name = "shards", data = "wds:me/cifar", samples = 30, n_classes = 10, split = "test"},
    {name = "table", data = "hub:me/table"},
]
[[threats]]
attack = "pgd-2"
norm = "linf"
eps = "8/255"
"""


@pytest.fixture
def repositories(tmp_path):
    """CIFAR-10 as shards and as a table, and a model."""
    (tmp_path / "mine-v1.toml").write_text(SUITE)
    images, labels, names = cifar10(30)
    parquet(tmp_path / "a.parquet", images, labels, names)
    return {
        "datasets:me/cifar": layout([*map(webp, images)], labels, shards=3, names=names),
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
        for key in ("seconds", "created", "environment", "sha256"):
            del record[key]
        found[path.name] = record
    return found


def test_fetch_then_run_then_offline(cli, repositories, tmp_path):
    fetch = ("fetch", "mine-v1.toml", "--model", "hf-hub:me/tiny")
    run = ("run", "mine-v1.toml", "--model", "hf-hub:me/tiny")
    asked: list[str] = []
    with hub(repositories, asked=asked) as endpoint:
        done = cli(*fetch, env=environment(endpoint))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "me/cifar: downloading test/0.tar" in done.stdout
        assert f"shards: 12 samples, 10 classes, me/cifar@{COMMIT}" in done.stdout
        assert f"table: 12 samples, 10 classes, me/table@{COMMIT}" in done.stdout
        assert "hf-hub:me/tiny: weights" in done.stdout
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
    assert len(records) == 2
    assert verdicts(tmp_path / "offline") == records == verdicts(tmp_path / "gone")
    shards, table = sorted(records.values(), key=lambda record: record["task"]["name"])
    assert shards["task"]["templates"] == ["a photo of a {}.", "a drawing of a {}."]
    assert shards["task"]["revision"] == f"me/cifar@{COMMIT}"
    assert {s["id"] for s in shards["samples"]} <= {f"s{i:07d}" for i in range(30)}
    assert table["task"]["revision"] == f"me/table@{COMMIT}"


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
        command = ("fetch", "mine-v1.toml", "--limit", "2", "--model", "hf-hub:me/tiny")
        assert_sentence(here(*command), "me/t", "checksum")
        again = here(*command)
        assert again.returncode == 0, again.stderr
        assert "hf-hub:me/tiny: weights" in again.stdout

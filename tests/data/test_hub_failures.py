"""A hub that misbehaves: each failure is a sentence, and the next try completes from the cache."""

import errno
import resource
from pathlib import Path

import huggingface_hub.file_download
import numpy as np
import pytest

import mmtard_bench as mb
from mmtard_bench import hub as client
from mmtard_bench.data.decode import decode
from mmtard_bench.tasks.samples import find_task, load_task
from tests.conftest import assert_sentence
from tests.hub import COMMIT, Fault, hub
from tests.shards import layout, noise

IMAGES, LABELS = noise(6)
REPOSITORIES = {"datasets:me/pets": layout(IMAGES, LABELS, shards=2)}
ENTRY = {"X-Error-Code": "EntryNotFound"}
GATED = {"X-Error-Code": "GatedRepo"}


def load(spec: str = "wds:me/pets"):
    return load_task(find_task(spec), n=None, seed=0)


def assert_completes(tmp_path: Path) -> None:
    """What was asked for arrives, and nothing else is left in the cache."""
    data = load()
    assert len(data.labels) == 6
    for row, i in enumerate(data.manifest.indices):
        assert np.array_equal(data.pixels(row), decode(IMAGES[i], "x", convert_rgb=False))
    assert client.check_cache("me/pets") == (5, [])
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(500, every=True), ["could not be reached", "500", "run the same command again"]),
        (Fault(503, path=".tar"), ["could not be reached", "503"]),
        (Fault("close", path=".tar"), ["could not be reached", "RemoteProtocolError"]),
        (Fault("close", every=True), ["could not be reached", "network"]),
        (Fault("slow", path=".tar"), ["could not be reached", "ReadTimeout"]),
        (Fault(404, path="1.tar", headers=ENTRY, every=True), ["missing", "1.tar"]),
        (Fault(401, every=True), ["gated", "hf auth login", "HF_TOKEN"]),
        (Fault(403, headers=GATED, every=True), ["gated", "Accept its terms", "hf auth login"]),
        (Fault(401, path="1.tar", every=True), ["gated", "hf auth login"]),
        (Fault(429, headers={"Retry-After": "3600"}), ["limits the rate", "3600 s"]),
        (Fault(429, every=True), ["limits the rate", "10 s"]),
        (Fault("short", path="1.tar"), ["could not be reached"]),
        (Fault("wrong", path="1.tar"), ["test/1.tar", "checksum", "taken out of the cache"]),
        (Fault("wrong", path="classnames"), ["classnames.txt", "checksum"]),
        (Fault("html", path="1.tar"), ["cut short", "Consistency check"]),
    ],
    ids=lambda value: f"{value.how} {value.path}" if isinstance(value, Fault) else "",
)
def test_failures(online, naps, tmp_path, fault, words):
    faults = [fault]
    with hub(REPOSITORIES, faults=faults) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError) as caught:
            load()
        said = str(caught.value)
        assert said.startswith("wds:me/pets: ")
        assert "\n" not in said
        for word in words:
            assert word in said, said
        # Somebody repaired the hub.
        faults.clear()
        assert_completes(tmp_path)
    # Now it is gone; the commit and the files are in the cache.
    assert load().revision == f"me/pets@{COMMIT}"


def test_a_hub_that_is_not_there(online, naps, tmp_path):
    with hub(REPOSITORIES) as endpoint:
        pass
    online(endpoint)
    with pytest.raises(mb.InputError, match=r"could not be reached.*Check the network"):
        load()
    with hub(REPOSITORIES) as endpoint:
        online(endpoint)
        assert_completes(tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("wds:me/absent", "no such repository"),
        ("wds:me/absent@v1", "no such repository"),
        ("wds:me/pets@nope", "no such revision"),
        ("wds:me/pets/cats", "no such folder"),
        ("hub:me/absent", "no such repository"),
    ],
)
def test_names_that_do_not_exist(online, naps, spec, words):
    missing = {"X-Error-Code": "RevisionNotFound"}
    faults = [Fault(404, path="/revision/nope", headers=missing, every=True)]
    with hub(REPOSITORIES, faults=faults) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match=words):
            load(spec)


@pytest.mark.parametrize("every", [True, False])
def test_a_rate_limit_is_waited_for(online, naps, tmp_path, every):
    said: list[str] = []
    headers = {"Retry-After": "7"}
    faults = [Fault(429, times=1, headers={"RateLimit": '"api";r=0;t=40'}, every=every)]
    faults += [Fault(429, times=2, headers=headers, every=every)]
    with hub(REPOSITORIES, faults=faults) as endpoint, client.told(said.append):
        online(endpoint)
        assert_completes(tmp_path)
    assert naps == [40, 7, 7]
    assert sum("asks to wait for 7 s" in line for line in said) == 2


def test_a_full_disk_in_the_middle_of_a_download(online, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with hub(REPOSITORIES) as endpoint:
        online(endpoint)
        with monkeypatch.context() as patched:
            patched.setattr(huggingface_hub.file_download, "_chmod_and_move", full)
            with pytest.raises(mb.InputError, match=r"No space left.*HF_HOME"):
                load()
        assert_completes(tmp_path)


def test_a_full_disk_on_the_command_line(cli, tmp_path):
    def nearly_full() -> None:
        # No file may grow beyond 8 kB: writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    (tmp_path / "mine-v1.toml").write_text(
        'name = "mine-v1"\ndescription = "d"\nn = 4\nseed = 0\n'
        'tasks = [{name = "pets", data = "wds:me/pets"}]\n'
        '[[threats]]\nattack = "pgd-2"\nnorm = "linf"\neps = "8/255"\n'
    )
    with hub(REPOSITORIES) as endpoint:
        env = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = cli("fetch", "mine-v1.toml", env=env, preexec_fn=nearly_full)
        assert_sentence(done, "pets: wds:me/pets", "could not be written", "free space")
        again = cli("fetch", "mine-v1.toml", env=env)
    assert again.returncode == 0, again.stderr
    assert "pets: 4 samples, 5 classes" in again.stdout


def test_offline_what_is_not_in_the_cache_is_a_sentence(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(mb.InputError, match=r"not in the cache.*HF_HUB_OFFLINE.*fetch"):
        load(f"wds:me/pets@{COMMIT}")
    with pytest.raises(mb.InputError, match=r"not in the cache.*HF_HUB_OFFLINE.*fetch"):
        load("wds:me/pets")


def test_what_was_damaged_in_the_cache_is_fetched_again(online, tmp_path):
    with hub(REPOSITORIES) as endpoint:
        online(endpoint)
        load()
        (link,) = (tmp_path / "hub").rglob("0.tar")
        blob = link.resolve()
        blob.write_bytes(blob.read_bytes()[:1500])
        with pytest.raises(mb.InputError, match=r"0\.tar is damaged.*fetch"):
            load()
        assert client.check_cache("me/pets") == (4, ["test/0.tar"])
        assert_completes(tmp_path)

"""Bad input through the command line: one clear sentence, exit status 2, nothing lost.

In this process where that is the same, which saves a subprocess's imports.
"""

import ctypes
import io
import json
import os
import pickle
import resource
import shutil
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import mmtard_bench as mb
from mmtard_bench.models.loading import load_model
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.tasks.suites import load_suite
from tests.conftest import assert_sentence

SUITE = """
name = "mine-v1"
description = "a suite for tests"
n = {n}
seed = 0
tasks = [{task}]

[[threats]]
attack = "{attack}"
norm = "{norm}"
eps = {eps}
surface = "{surface}"
{more}
"""

TOYS = """
import torch
from tests.conftest import ToyClip, wrap

class Nan(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images) * float("nan")

class Narrow(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images)[:, :5]

class Blind(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images * 0 + 1)

def good(): return wrap(ToyClip(), "good")
def nan(): return wrap(Nan(), "nan")
def narrow(): return wrap(Narrow(), "narrow")
def blind(): return wrap(Blind(), "blind")
def raises(): raise RuntimeError("no luck")
def no_clip(): return ToyClip()
def headless():
    return wrap(torch.nn.Identity(), "headless")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a suite of one's own, and toy models beside it."""
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.delitem(sys.modules, "toys", raising=False)

    def write(**changes: object) -> str:
        fields = {
            "n": 4,
            "task": '"digits/digit"',
            "attack": "pgd-2",
            "norm": "linf",
            "eps": '"8/255"',
            "surface": "native",
            "more": "",
            **changes,
        }
        (tmp_path / "mine-v1.toml").write_text(SUITE.format(**fields))
        return "mine-v1.toml"

    return write


def table(name: str, data: str, **keys: object) -> str:
    """An inline task."""
    pairs = {"name": name, "data": data, **keys}
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in pairs.items()) + "}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["run", "quick-v1", "--model", "teacher-robsut"],
            ["no model 'teacher-robsut'", "teacher-robust"],
        ),
        (["run", "quick-v1", "--model", "w.pt"], ["'w.pt' is a file", "ViT-B-32:w.pt"]),
        (["run", "quick-v1", "--model", "my-clip"], ["@register_model", "module:function"]),
        (["run", "quik-v1", "--model", "tiny-clip"], ["no suite 'quik-v1'", "quick-v1"]),
        (["run", "quick-v1", "--model", "RN50"], ["without weights", "RN50:random"]),
        (["run", "quick-v1", "--model", "RN50:opnai"], ["opnai", "openai"]),
        (["run", "quick-v1", "--model", "nowhere.at_all:f"], ["no module 'nowhere.at_all'"]),
        (["run", "quick-v1", "--model", "../w.pt:f"], ["no architecture '../w.pt'"]),
        (["run", "quick-v1", "--model", "local-dir:nowhere"], ["open_clip_config.json"]),
        (["run", "quick-v1", "--model", "tiny-clip", "--device", "abacus"], ["device 'abacus'"]),
        (["run", "quick-v1", "--model", "tiny-clip", "--n", "0"], ["'0'", "at least 1"]),
        (["run", "quick-v1", "--model", "tiny-clip", "--n", "9999"], ["9999", "2000"]),
        (["run", "gone.toml", "--model", "tiny-clip"], ["gone.toml", "cannot be read"]),
        (["show", "nowhere"], ["no directory nowhere"]),
        (["leaderboard", "--records", "nowhere"], ["no directory nowhere"]),
        (["leaderboard", "--records", ".", "--output", "x.md"], ["no records below ."]),
        (["list", "cats"], ["cats", "models"]),
    ],
)
def test_unknown_names(here, arguments, words):
    assert_sentence(here(*arguments), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": '"digits/digits"'}, ["no task 'digits/digits'", "digits/digit"]),
        ({"attack": "pdg-2"}, ["no attack 'pdg-2'", "pgd-{steps}"]),
        ({"eps": 0.031}, ["0.031", "exact positive fraction", "8/255"]),
        ({"eps": '"0.031"'}, ["0.031", "exact positive fraction"]),
        ({"eps": '"8/1"'}, ["8/1", 'write "8/255"']),
        ({"more": 'epsilon = "8/255"'}, ["epsilon", "unknown"]),
        ({"task": '{name = "x", data = "y", templates = ["a {c}"]}'}, ["Write {} in place of {c}"]),
        ({"task": '{name = "x", data = "y", classes = ["cat", " "]}'}, ["not empty"]),
        ({"norm": "l7"}, ["norm", "linf"]),
        ({"attack": "cw-l2"}, ["cw-l2", "norm l2"]),
        ({"n": 0}, ["'n'", "greater than or equal to 1"]),
        ({"n": 2001}, ["2001", "2000"]),
        ({"task": '{name = "x", data = "y", templates = ["a cat"]}'}, ["a cat", "exactly one {}"]),
        ({"task": '{name = "x", dat = "y"}'}, ["dat", "unknown"]),
        ({"more": "["}, ["cannot be read"]),
        ({"task": '"digits/digit", "digits/digit"'}, ["twice"]),
        ({"more": 'tasks = ["digits/digits"]'}, ["restricts pgd", "Did you mean digits/digit?"]),
        (
            {"task": '"digits/digit", "digits/unseen"', "more": 'tasks = ["digits/digit"]'},
            ["no threat model for 'digits/unseen'"],
        ),
    ],
)
def test_suites(here, mine, changes, words):
    assert_sentence(here("run", mine(**changes), "--model", "tiny-clip"), *words)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("toys:nan", ["NaN", "4 images"]),
        ("toys:narrow", ["width 5", "width 16"]),
        ("toys:blind", ["ignores its input"]),
        ("toys:no_clip", ["ToyModule", "mmtard_bench.Clip"]),
        ("toys:headless", ["encode_image"]),
        ("toys:missing", ["no function 'missing'"]),
        ("toys:raises", ["could not be loaded", "no luck"]),
    ],
)
def test_models_that_cannot_be_scored(here, mine, tmp_path, model, words):
    done = here("run", mine(), "--model", model, "--model", "toys:good")
    assert_sentence(done, *words)
    # The good model had its turn all the same.
    assert "good digits/digit pgd-2 linf 8/255: clean" in done.stdout
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("*.json")]
    assert [r["status"] for r in records if r["model"]["name"] == "good"] == ["ok"]
    assert all(r["samples"] == [] for r in records if r["status"] == "error")


class Malice:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_truncated_checkpoint(here, mine, tmp_path):
    whole = Path(load_model("tiny-clip").module.__module__)  # the loader works at all
    assert whole
    folder = tmp_path / "cut"
    _copy_tiny(folder)
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = here("run", mine(), "--model", f"local-dir:{folder}")
    assert_sentence(done, "could not be loaded", "truncated or damaged")


def test_a_truncated_torch_checkpoint(here, mine, tmp_path):
    torch.save({"weight": torch.rand(1000)}, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    assert_sentence(here("run", mine(), "--model", "RN50:w.pt"), "truncated or damaged")


def test_a_pickle_with_code_is_not_run(here, mine, tmp_path):
    torch.save({"state_dict": Malice()}, tmp_path / "evil.pt")
    assert_sentence(here("run", mine(), "--model", "RN50:evil.pt"), "could not be loaded", "code")
    (tmp_path / "worse.pt").write_bytes(pickle.dumps(Malice()))
    assert_sentence(here("run", mine(), "--model", "RN50:worse.pt"), "could not be loaded", "code")
    assert not (tmp_path / "hacked").exists()


def test_weights_that_do_not_fit(here, mine, tmp_path):
    torch.save({"visual.conv1.weight": torch.rand(3, 3)}, tmp_path / "other.pt")
    done = here("run", mine(), "--model", "RN50:other.pt")
    assert_sentence(done, "do not fit the architecture")


def test_a_directory_without_weights_is_not_scored_untrained(here, mine, tmp_path):
    _copy_tiny(tmp_path / "bare")
    (tmp_path / "bare" / "open_clip_model.safetensors").unlink()
    done = here("run", mine(), "--model", f"local-dir:{tmp_path / 'bare'}")
    assert_sentence(done, "could not be loaded")


def test_remote_code_is_refused(here, mine, tmp_path):
    _copy_tiny(tmp_path / "remote")
    config = tmp_path / "remote" / "open_clip_config.json"
    body = json.loads(config.read_text())
    body["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    # Written so that a search of the text would not see it.
    config.write_text(json.dumps(body).replace("remote_code", "remote\\u005fcode"))
    done = here("run", mine(), "--model", f"local-dir:{tmp_path / 'remote'}")
    assert_sentence(done, "trust_remote_code", "never run")


def _copy_tiny(folder: Path) -> None:
    shutil.copytree(WEIGHTS / "tiny-clip", folder)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parquet(
    path: Path, images: list[bytes], labels: list[int], names: list[str] | None = None
) -> str:
    """A parquet file of image bytes and labels, as people have them."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    features["label"] = datasets.Value("int64") if names is None else label
    rows = {"image": [{"bytes": b, "path": None} for b in images], "label": labels}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.cast_column("image", datasets.Image(decode=False)).to_parquet(str(path))
    return f"parquet:{path}"


def rgb(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    generator = np.random.default_rng(seed)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = generator.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return encode(Image.fromarray(pixels))


def deep() -> bytes:
    return encode(Image.fromarray((np.arange(1024).reshape(32, 32) * 60).astype(np.uint16)))


GOOD = [rgb(i) for i in range(4)]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([*GOOD[:3], GOOD[3][:200]], ["damaged"]),
        ([*GOOD[:3], b"no image"], ["damaged or no image"]),
        ([*GOOD[:3], rgb(9, mode="L")], ["grey", "convert_rgb"]),
        ([*GOOD[:3], rgb(9, mode="RGBA")], ["RGBA", "convert_rgb"]),
        ([*GOOD[:3], deep()], ["16-bit", "Scale it to 8 bits"]),
        ([*GOOD[:3], rgb(9, (40, 32))], ["mixes image sizes", "40x32", "'model'"]),
    ],
    ids=["truncated", "text", "grey", "rgba", "16-bit", "mixed sizes"],
)
def test_images(here, mine, tmp_path, images, words):
    data = parquet(tmp_path / "d.parquet", images, [0, 1, 0, 1], ["cat", "dog"])
    done = here("run", mine(task=table("pets", data)), "--model", "tiny-clip")
    assert_sentence(done, *words)
    if words[0] != "mixes image sizes":
        assert "sample '00000003'" in done.stderr


def test_images_of_other_kinds_are_converted_on_request(here, mine, tmp_path):
    images = [rgb(1), rgb(2, mode="L"), rgb(3, mode="RGBA"), rgb(4, (40, 36))]
    data = parquet(tmp_path / "d.parquet", images, [0, 1, 0, 1], ["cat", "dog"])
    task = table("pets", data).replace("}", ", convert_rgb = true}")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = here("run", mine(task=task, surface="model"), "--model", "tiny-clip")
    assert done.returncode == 0, done.stderr
    assert "warning: Some images have transparent areas" in done.stderr


def test_a_missing_image(here, mine, tmp_path):
    rows = {"image": [None, GOOD[0]], "label": [0, 0]}
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "d.parquet"))
    task = table("pets", f"parquet:{tmp_path / 'd.parquet'}")
    done = here("run", mine(task=task, n=2), "--model", "tiny-clip")
    assert_sentence(done, "sample '00000000'", "missing")


def test_a_local_folder_does_not_stand_in_for_the_hub(here, mine, tmp_path):
    (tmp_path / "me" / "pets").mkdir(parents=True)
    data = "hub:me/pets@" + "0" * 40
    done = here("run", mine(task=table("pets", data)), "--model", "tiny-clip")
    assert_sentence(done, "local 'me/pets'")


@pytest.mark.parametrize("label", [2, -1])
def test_labels_out_of_range(here, mine, tmp_path, label):
    data = parquet(tmp_path / "d.parquet", GOOD, [0, 1, label, 1])
    done = here(
        "run", mine(task=table("pets", data, classes=["cat", "dog"])), "--model", "tiny-clip"
    )
    assert_sentence(done, f"label {label}", "2 classes")


def test_missing_class_names(here, mine, tmp_path):
    data = parquet(tmp_path / "d.parquet", GOOD, [0, 1, 0, 1])
    done = here("run", mine(task=table("pets", data)), "--model", "tiny-clip")
    assert_sentence(done, "does not name its classes", "classes_file")


def test_files_of_class_names_are_lines(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "names.txt"

    def names(text: str) -> tuple[str, ...]:
        file.write_text(text, "utf-8", newline="")
        own = table("pets", "parquet:x", classes_file="names.txt", templates=["{}"])
        return load_suite(mine(task=own)).plan[0][0].classes

    assert names("\ufeffcat\r\nsea\x85 lion\r\nd\u2028og\r\n\r\n") == (
        "cat", "sea\x85 lion", "d\u2028og"
    )  # fmt: skip
    with pytest.raises(mb.InputError, match=r"Line 2 of names\.txt.* is empty"):
        names("cat\n\ndog\n")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(mb.InputError, match="not a regular file"):
        load_suite(mine(task=table("pets", "parquet:x", classes_file="names.txt")))


def test_suites_that_an_editor_marked_and_pipes(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / mine()
    suite.write_text("\ufeff" + suite.read_text())
    assert load_suite(suite.name).n == 4
    suite.unlink()
    os.mkfifo(suite)
    with pytest.raises(mb.InputError, match="not a regular file"):
        load_suite(suite.name)


def test_an_empty_data_set(here, mine, tmp_path):
    data = parquet(tmp_path / "d.parquet", [], [], ["cat", "dog"])
    done = here("run", mine(task=table("pets", data)), "--model", "tiny-clip")
    assert_sentence(done, "empty")
    (tmp_path / "folder").mkdir()
    done = here("run", mine(task=table("pets", "imagefolder:folder")), "--model", "tiny-clip")
    assert_sentence(done, "folder", "empty")


def test_files_and_columns_that_are_not_there(here, mine, tmp_path):
    done = here("run", mine(task=table("pets", "parquet:gone.parquet")), "--model", "tiny-clip")
    assert_sentence(done, "no file gone.parquet")
    data = parquet(tmp_path / "d.parquet", GOOD, [0, 1, 0, 1], ["cat", "dog"])
    task = table("pets", data, label_column="class")
    assert_sentence(here("run", mine(task=task), "--model", "tiny-clip"), "no column 'class'")
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    done = here("run", mine(task=table("pets", data)), "--model", "tiny-clip")
    assert_sentence(done, "could not be read")


def test_more_samples_than_there_are(here, mine, tmp_path):
    data = parquet(tmp_path / "d.parquet", GOOD, [0, 1, 0, 1], ["cat", "dog"])
    done = here("run", mine(task=table("pets", data), n=5), "--model", "tiny-clip")
    assert_sentence(done, "n = 5", "holds 4")


def test_class_names_that_occur_twice_are_a_warning(forked, mine, tmp_path):
    data = parquet(tmp_path / "d.parquet", GOOD, [0, 1, 2, 1])
    task = table("pets", data, classes=["cat", "dog", "cat"])
    done = forked("run", mine(task=task), "--model", "tiny-clip")
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stderr
    assert "more than once (cat)" in done.stderr


def test_no_network(cli, forked, mine):
    done = forked("run", mine(), "--model", "hf-hub:nobody/nothing")
    assert_sentence(done, "hf-hub:nobody/nothing", "network")
    done = forked("run", mine(), "--model", "ViT-B-32:openai")
    assert_sentence(done, "ViT-B-32:openai", "not in the cache", "HF_HUB_OFFLINE")
    done = forked("run", mine(task=table("x", "hub:nobody/nothing")), "--model", "tiny-clip")
    assert_sentence(done, "hub:nobody/nothing", "network")
    # A closed port, as where there is no network at all.
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = cli("run", mine(), "--model", "hf-hub:nobody/nothing", env=closed)
    assert_sentence(done, "hf-hub:nobody/nothing", "network")


def as_anybody() -> None:
    """Root may write anywhere: drop CAP_DAC_OVERRIDE, of which a new program gets none back."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    for word in range(3):  # effective, permitted, inheritable of the first 32
        held[word] &= ~(1 << 1)
    assert libc.capset(header, held) == 0


def test_a_read_only_output_directory(forked, mine, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    command = ("run", mine(), "--model", "tiny-clip", "--out", "locked/runs")
    done = forked(*command, before=as_anybody)
    assert_sentence(done, "locked/runs", "cannot be written", "--out")


def nearly_full() -> None:
    """No file may grow beyond a kilobyte: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_a_full_disk_loses_nothing(forked, here, mine, tmp_path):
    first = here("run", mine(), "--model", "tiny-clip")
    assert first.returncode == 0, first.stderr
    kept = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*.json")}
    assert kept
    command = ("run", mine(attack="pgd-3", n=40), "--model", "tiny-clip")
    done = forked(*command, before=nearly_full)
    assert_sentence(done, "could not be written")
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*.json")} == kept
    again = here(*command)
    assert again.returncode == 0, again.stderr


def test_a_record_that_was_edited_or_cut_short(here, mine, tmp_path):
    assert here("run", mine(), "--model", "tiny-clip").returncode == 0
    (path,) = (tmp_path / "runs").rglob("*.json")
    text = path.read_text()
    for damaged in (text.replace('"robust": false', '"robust": true', 1), text[:-40]):
        assert damaged != text
        path.write_text(damaged)
        assert_sentence(
            here("run", mine(), "--model", "tiny-clip"), "edited or cut short", path.name
        )
        assert_sentence(here("show", "runs"), "edited or cut short")
        assert_sentence(here("leaderboard", "--records", "runs"), "edited or cut short")
        assert path.read_text() == damaged
    path.write_text(text)
    assert here("show", "runs").returncode == 0

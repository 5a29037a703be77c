"""A hub that is down, refuses or sends something else: sentences that say what to do."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mmtard_bench as mb
from mmtard_bench.models.tiny import WEIGHTS
from tests.hub import COMMIT, Fault, hub
from tests.models.test_text_table import make

HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"
SCRIPT = """
import sys, time, mmtard_bench as mb
time.sleep = lambda seconds: None  # the client waits between its attempts
for spec in sys.argv[1:]:
    try:
        print(spec, "=", mb.load_model(spec).digest)
    except mb.InputError as error:
        print(spec, "!", type(error).__name__, str(error).replace("\\n", " "))
"""


def tiny() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (WEIGHTS / "tiny-clip").iterdir()}


def load(
    tmp_path: Path, *specs: str, before: Callable[[], None] | None = None, **env: str
) -> dict[str, str]:
    """What loading each spec in a fresh process gave: a digest, or the error's kind and text."""
    quick = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *specs],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), **quick, **env},
        timeout=200,
        preexec_fn=before,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr == "", done.stderr
    said = {}
    for line in done.stdout.splitlines():
        spec, _, rest = line.partition(" ")
        said[spec] = rest
    assert list(said) == list(specs), done.stdout
    return said


def refused(path: str, status: int, code: str = "", **headers: str) -> Fault:
    known = {"X-Error-Code": code} if code else {}
    return Fault(status, path, headers=known | headers, every=True)


CUT = {"X-Repo-Commit": COMMIT, "ETag": '"' + "7" * 40 + '"', "X-Linked-Size": "99999"}
FAULTS = [
    refused("me/good/revision/v9", 404, "RevisionNotFound"),
    refused("me/gated/", 403, "GatedRepo"),
    refused("me/private/", 401, "RepoNotFound"),
    refused("me/token/", 401),
    refused(f"me/forbidden/resolve/{COMMIT}/open_clip_model.safetensors", 403),
    refused("me/busy/", 429),
    refused("me/broken/", 503),
    refused(f"me/cut/resolve/{COMMIT}/open_clip_model.safetensors", 200, **CUT),
    Fault("html", "me/log-in/", every=True),
]
SAID = {
    "hf-hub:me/gated": ["gated", "Accept its terms", "hf auth login", "HF_TOKEN"],
    "hf-hub:me/private": ["private", "check the name", "hf auth login"],
    "hf-hub:me/absent": ["no such repository"],
    "hf-hub:me/token": ["hf auth login"],
    "hf-hub:me/log-in": ["login page"],
    "hf-hub:me/bare": ["a file is missing", "open_clip_model"],
    "hf-hub:me/html": ["holds a web page instead of weights", "download the file itself"],
    "hf-hub:me/lfs": ["git lfs pull"],
    "hf-hub:me/short": ["truncated or damaged"],
    "hf-hub:me/cut": ["cut short", "same command again"],
    "hf-hub:me/other": ["do not fit the architecture"],
    "hf-hub:me/forbidden": ["hf auth login"],
    "hf-hub:me/busy": ["limits the rate"],
    "hf-hub:me/broken": ["could not be reached", "503"],
    "hf-hub:a/b/c": ["ORG/NAME"],
    "transformers:me/gated": ["gated", "Accept its terms"],
    "transformers:me/absent": ["no such repository"],
    "transformers:me/good@v9": ["no such revision"],
    "transformers:me/good": ["save_pretrained"],
    "ViT-B-32:openai": ["holds a web page instead of weights"],
    "RN50:openai": ["no such repository"],
}


def test_each_refusal_says_what_to_do(tmp_path):
    weights = tiny()["open_clip_model.safetensors"]
    repositories = {
        "models:me/good": tiny(),
        "models:me/bare": {"open_clip_config.json": tiny()["open_clip_config.json"]},
        "models:me/html": {**tiny(), "open_clip_model.safetensors": HTML},
        "models:me/lfs": {
            **tiny(),
            "open_clip_model.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        },
        "models:me/short": {**tiny(), "open_clip_model.safetensors": weights[:100_000]},
        "models:me/other": {
            **tiny(),
            "open_clip_model.safetensors": (
                WEIGHTS / "tiny-clip-small" / "open_clip_model.safetensors"
            ).read_bytes(),
        },
        "models:me/cut": tiny(),
        "models:me/forbidden": tiny(),
        "models:me/log-in": tiny(),
        "models:timm/vit_base_patch32_clip_224.openai": {"open_clip_model.safetensors": HTML},
    }
    with hub(repositories, faults=FAULTS) as endpoint:
        said = load(tmp_path, *SAID, "hf-hub:me/good", HF_ENDPOINT=endpoint)
    good = said.pop("hf-hub:me/good")
    assert good == f"= {mb.load_model('tiny-clip').digest}"
    for spec, words in SAID.items():
        assert said[spec].startswith("! InputError"), (spec, said[spec])
        assert spec in said[spec].replace("InputError", "", 1)
        for word in words:
            assert word in said[spec], (spec, said[spec])


def test_a_full_disk_and_then_space(tmp_path):
    def nearly_full() -> None:
        # No file may grow beyond this: writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with hub({"models:me/good": tiny()}) as endpoint:
        said = load(tmp_path, "hf-hub:me/good", before=nearly_full, HF_ENDPOINT=endpoint)
        assert said["hf-hub:me/good"].startswith("! StorageError"), said
        assert "could not be written" in said["hf-hub:me/good"]
        assert "HF_HOME" in said["hf-hub:me/good"]
        again = load(tmp_path, "hf-hub:me/good", HF_ENDPOINT=endpoint)
    assert again["hf-hub:me/good"].startswith("= ")
    # What is in the cache now is enough.
    said = load(tmp_path, "hf-hub:me/good", "transformers:me/absent", HF_HUB_OFFLINE="1")
    assert said["hf-hub:me/good"] == again["hf-hub:me/good"]
    assert "HF_HUB_OFFLINE is set" in said["transformers:me/absent"]


def test_configuration_and_weights_are_of_one_commit(tmp_path):
    """Whoever pushes while a model is loaded does not change what is loaded."""
    asked: list[str] = []
    with hub({"models:me/good": tiny()}, asked=asked) as endpoint:
        said = load(tmp_path, "hf-hub:me/good", HF_ENDPOINT=endpoint)
    assert said["hf-hub:me/good"].startswith("= "), said
    files = [line for line in asked if "/resolve/" in line]
    assert len([line for line in files if line.startswith("GET")]) == 2
    assert all(f"/resolve/{COMMIT}/" in line for line in files), files
    assert len([line for line in asked if line.endswith("/revision/main")]) == 1, asked


def test_a_model_with_a_text_table(tmp_path):
    (tmp_path / "local").mkdir()
    make(tmp_path / "local")
    files = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    with hub({"models:me/table": files}) as endpoint:
        said = load(tmp_path, "hf-hub:me/table", HF_ENDPOINT=endpoint)
    local = f"local-dir:{tmp_path / 'local'}"
    assert said["hf-hub:me/table"] == load(tmp_path, local)[local]


def test_a_tag_with_a_wrong_checksum_is_not_kept(tmp_path):
    spec, repository = "ViT-B-32:openai", "models:timm/vit_base_patch32_clip_224.openai"
    files = {"open_clip_model.safetensors": tiny()["open_clip_model.safetensors"]}
    with hub({repository: files}, faults=[Fault("wrong", "open_clip", times=1)]) as endpoint:
        first = load(tmp_path, spec, HF_ENDPOINT=endpoint)[spec]
        assert "open_clip_model.safetensors does not have the checksum" in first
        # The right file, though of another model.
        assert "do not fit" in load(tmp_path, spec, HF_ENDPOINT=endpoint)[spec]

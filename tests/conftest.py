"""Small models with known answers, and the command line as a subprocess."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from mmtard_bench import registry
from mmtard_bench.attacks.base import (
    AttackResult,
    CountPasses,
    Engine,
    EngineName,
    Work,
)
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.fast.apgd import Apgd
from mmtard_bench.attacks.fast.fab import Fab
from mmtard_bench.attacks.fast.square import Square
from mmtard_bench.cli import main
from mmtard_bench.testing import (
    TOKENS,
    LinearClassifier as Linear,
    ToyModule as ToyClip,
    tokenize,
    toy_clip as wrap,
)
from mmtard_bench.types import Eps, Norm, ThreatModel

torch.set_num_threads(1)
# A shell has background jobs ignore Ctrl-C, which processes started here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A slow machine is no mistake of the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

__all__ = ["TOKENS", "Linear", "ToyClip", "tokenize", "wrap"]
REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def attack(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: str,
    norm: Norm = "linf",
    seed: int = 0,
    classes: int | None = None,
    engine: EngineName = "reference",
    batch_size: int = 64,
) -> AttackResult:
    """Run an attack on a bare classifier."""
    threat = ThreatModel(name, norm, Eps.parse(eps, norm=norm))
    with torch.no_grad():
        width = classes or model(images[:1]).shape[1]
    return build_attack(threat, n_classes=width, engine=Engine(engine)).whole(
        Work(
            model=model,
            images=images,
            labels=labels,
            ids=[f"sample-{i}" for i in range(len(images))],
            seed=seed,
            batch_size=batch_size,
        ),
    )


def passes(model: nn.Module) -> CountPasses:
    """A model that counts the rows through it, independently of the attack's own count."""
    return CountPasses(model)


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``mmtard-bench`` as a subprocess in an empty directory."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, **options: object
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        return subprocess.run(
            [sys.executable, "-m", "mmtard_bench", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=300,
            **options,
        )

    return run


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that forget what a test adds."""
    for kind in (
        registry.models,
        registry.datasets,
        registry.attacks,
        registry.fast_attacks,
        registry.tasks,
    ):
        list(kind)
        monkeypatch.setattr(kind, "_items", dict(kind._items))


@pytest.fixture
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of the fast engine make ten steps: for tests that are not about their strength."""
    for search in (Apgd, Fab, Square):
        monkeypatch.setitem(search.__init__.__kwdefaults__, "steps", 10)


@pytest.fixture
def forked(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Run ``mmtard-bench`` in a new process that has everything imported, as ``cli`` otherwise."""
    from tests.forked import Forked

    def run(
        *arguments: object, before: Callable[[], None] = int
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        said = tmp_path_factory.mktemp("said") / "by"
        process = Forked(words, tmp_path, {}, said, before)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode or 0, out, err)

    return run


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Run ``mmtard-bench`` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(sys, "path", [*sys.path])
    # main() replaces it, for the life of a command line.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = list(map(str, arguments))
        capsys.readouterr()
        try:
            status = main(command)
        except SystemExit as exit_:  # from argparse
            status = int(exit_.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(command, status, said.out, said.err)

    return run


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the hub's client in this process talk to an endpoint, with a cache of its own."""
    from huggingface_hub import HfFileSystem, constants

    def connect(endpoint: str) -> None:
        # An earlier server may have had the same port.
        HfFileSystem.clear_instance_cache()
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_ASSETS_CACHE": str(tmp_path / "assets"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_ETAG_TIMEOUT": 1,
            "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    return connect


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps while waiting for a hub; returns how long they would have."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http

    from mmtard_bench import hub

    slept: list[float] = []
    shim = SimpleNamespace(sleep=slept.append, monotonic=lambda: 0.0, time=lambda: 0.0)
    for module in (hub, huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", shim)
    return slept


def assert_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Bad input: exit status 2 and a sentence that holds these words, without a traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    said = done.stderr.replace("\n", " ")
    for word in words:
        assert word in said, said


def wait_for(
    pattern: str, folder: Path, process: subprocess.Popen[str], *, seconds: float = 60
) -> Path:
    """The first file of this name below a folder that a process has written something into."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = list(folder.rglob(pattern))
        if found and found[0].stat().st_size:
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} appeared")

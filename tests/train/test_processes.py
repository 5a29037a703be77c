"""Several processes: what one computes, and how they stop together."""

import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from safetensors.torch import load_file

from mmtard_bench.errors import InputError
from mmtard_bench.train import session
from mmtard_bench.train.checkpoint import read_card
from mmtard_bench.train.session import Place, train
from tests.conftest import REPOSITORY, wait_for


def curve(folder):
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line["loss/kl_robust"] for line in lines if "loss/kl_robust" in line]


def launch(*words):
    """Start two processes on the CPU. Without --multi_gpu accelerate would launch one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    return subprocess.Popen(
        [*command, "--dynamo_backend", "no", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_two_processes_draw_the_same_curve(recipe, tmp_path, run_small):
    # An attack by l2 and small updates: along the sign of a gradient, rounding becomes whole steps,
    # and after two large updates a student that is sure of itself takes other ones.
    options = ["steps=6", "batch=16", "learning_rate=1e-4"]
    options += ["attack.norm=l2", "attack.eps=128/255", "attack.step_size=64/255"]
    sets = [word for option in options for word in ("--set", option)]
    finish(launch("-m", "mmtard_bench", "train", recipe, "--out", tmp_path / "two", *sets))
    assert read_card(tmp_path / "two").origin.processes == 2
    one = run_small("one", *options)
    assert curve(tmp_path / "two") == pytest.approx(curve(one), rel=1e-4)


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one(recipe, tmp_path, run_small):
    # Everything that is of the whole batch: its statistics, mean weights, ranking by text. Steps
    # are tiny: where the student is sure of itself, rounding decides which way they go.
    options = ["method=mmt-ard", "steps=1", "batch=16"]
    options += ["attack.norm=l2", "attack.eps=255/255", "attack.step_size=1/25500"]
    script = REPOSITORY / "tests" / "train" / "first_gradient.py"
    finish(launch(script, recipe, tmp_path / "two", *options))
    subprocess.run(
        [sys.executable, script, recipe, tmp_path / "one", *options], check=True, cwd=REPOSITORY
    )
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    gap = sum((one[key] - two[key]).square().sum() for key in one)
    assert gap.sqrt() <= 1e-4 * sum(value.square().sum() for value in one.values()).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_processes_save_together_and_go_on(how, recipe, tmp_path):
    """By Ctrl-C, or because their launcher is killed."""
    folder = tmp_path / "two"
    words = ["-m", "mmtard_bench", "train", recipe, "--out", folder]
    for override in ("steps=24", "save_every=1000", "validation.every=1000"):
        words += ["--set", override]
    process = launch(*words)
    wait_for("history.jsonl", folder, process, seconds=120)
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (state,) = (folder / "states").glob("step-*")
    saved = int(state.name.removeprefix("step-"))
    assert 1 <= saved < 24
    assert len(curve(folder)) == saved
    finish(launch(*words, "--resume"))
    assert len(curve(folder)) == 24


def test_a_batch_that_does_not_split_is_refused(small, tmp_path, monkeypatch):
    class Three(session.Accelerator):
        num_processes = 3

    monkeypatch.setattr(session, "Accelerator", Three)
    with pytest.raises(InputError, match="batch = 16 cannot be divided among 3"):
        train(small(), Place(tmp_path / "x", cpu=True), Console(quiet=True))

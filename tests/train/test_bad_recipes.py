"""Bad input to training through the command line: a sentence, exit status 2, nothing lost."""

import os
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
from PIL import Image

from mmtard_bench.models.loading import load_model
from tests.conftest import assert_sentence

LONG = "a photo that somebody took on a sunny day, and of which he says that it is of a digit {}"
RECIPES = {
    "prompts that are cut before the name": (
        [f'train={{name="x", data="digits/validation", templates=["{LONG}"]}}'],
        ["'zero' and 'one' of the task 'x'", "cut at the context"],
    ),
    "an unknown key": (["stepz=3"], ["'stepz' is unknown"]),
    "an unknown key in a table": (["attack.epz=3"], ["'attack.epz' is unknown"]),
    "no steps": (["steps=0"], ["'steps'", "greater than or equal to 1"]),
    "a rate below zero": (["learning_rate=-1.0"], ["'learning_rate'", "greater than 0"]),
    "a word for a number": (["batch=many"], ["'batch'", "valid integer"]),
    "a decimal radius": (["attack.eps=0.03"], ["attack.eps"]),
    "a decimal radius as text": (['attack.eps="0.03"'], ["exact positive fraction"]),
    "a radius beyond all pixels": (['attack.eps="8/1"'], ["at most 1/1"]),
    "a step beyond all pixels": (['attack.step_size="2/1"'], ["at most 1/1"]),
    "an unknown norm": (["attack.norm=l1"], ["attack.norm"]),
    "an unknown method": (["method=mmt-adr"], ["no method 'mmt-adr'", "mmt-ard"]),
    "an option of no method": (["options.gate=true"], ["options of ard", "'gate' is unknown"]),
    "a set that sets nothing": (["steps"], ["not KEY=VALUE"]),
    "a set into a value": (["steps.more=1"], ["'steps' is no table"]),
    "an unknown task": (["train=digits/trian"], ["no task 'digits/trian'", "digits/train"]),
    "an unknown teacher role": (["teachers.wise=tiny-clip"], ["teachers.wise"]),
    "no such teacher": (
        ["teachers.robust=teacher-robsut"],
        ["no model 'teacher-robsut'", "teacher-robust"],
    ),
    "a teacher missing on disk": (
        ["teachers.robust=local-dir:nowhere"],
        ["there is no nowhere/open_clip_config.json"],
    ),
    "a teacher missing on the hub": (
        ["teachers.robust=hf-hub:nobody/nothing"],
        ["hf-hub:nobody/nothing", "not in the cache"],
    ),
    "a student without weights": (["student=RN50"], ["architecture without weights"]),
    "LoRA on a convolutional tower": (
        ["lora.rank=4", "lora.alpha=4.0", "lora.dropout=0.0"],
        ["LoRA needs a ViT image tower"],
    ),
}


def train(run, recipe, *overrides):
    sets = [word for override in overrides for word in ("--set", override)]
    return run("train", recipe, "--out", "out", "--device", "cpu", *sets)


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_a_sentence(name, here, recipe):
    overrides, words = RECIPES[name]
    assert_sentence(train(here, recipe, *overrides), *words)


def test_the_command_line_says_the_same(cli, recipe):
    done = train(cli, recipe, "method=mmt-adr")
    assert_sentence(done, "no method 'mmt-adr'", "mmt-ard")


def test_an_unknown_recipe_suggests_another(here):
    done = here("train", "digits/mmt-adr", "--out", "out")
    assert_sentence(done, "no recipe 'digits/mmt-adr'", "digits/mmt-ard", ".toml")


def test_a_method_says_which_teacher_it_misses(here, recipe):
    recipe.write_text(recipe.read_text().replace('robust = "teacher-robust"\n', ""))
    assert_sentence(train(here, recipe), "needs a robust teacher", "--set teachers.robust=MODEL")


@pytest.fixture
def unlabelled(tmp_path: Path) -> list[str]:
    """Overrides that train on images without labels or class names."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(8)
    ]
    table = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))
    table.to_parquet(tmp_path / "images.parquet")
    task = 'train={name="mine", data="parquet:images.parquet", label_column=""}'
    return [task, "steps=1", "batch=4", "student=tiny-clip-small"]


def test_a_method_that_needs_labels_says_so(here, recipe, unlabelled):
    done = train(here, recipe, "method=tecoa", *unlabelled)
    assert_sentence(done, "'mine' has no labels", "name the column")


def test_a_label_free_method_trains_without_labels(here, recipe, unlabelled):
    done = train(here, recipe, "method=fare", *unlabelled)
    assert done.returncode == 0, done.stderr


def test_a_method_that_compares_classes_needs_names(here, recipe, unlabelled):
    assert_sentence(train(here, recipe, "method=ard", *unlabelled), "no class names", "classes")


def test_teachers_of_other_widths_teach(here, recipe):
    # tiny-clip has 64 numbers an embedding, tiny-clip-small 48: each has its own text tower.
    done = train(here, recipe, "method=mmt-ard", "steps=1")
    assert done.returncode == 0, done.stderr
    assert "mmtard-bench run SUITE --model local-dir:out" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_a_sentence(here, recipe, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert_sentence(train(here, recipe), "out", "Choose another --out")


def test_an_out_that_is_a_file_is_a_sentence(here, recipe, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert_sentence(train(here, recipe), "out", "choose another --out")


def test_a_study_needs_its_baseline_and_a_known_name(here):
    assert_sentence(here("reproduce", "digit"), "no study 'digit'", "digits")
    assert_sentence(here("reproduce", "digits", "--method", "tecoa"), "--method ard")
    assert_sentence(here("reproduce", "digits", "--method", "tecao"), "no method 'tecao'", "tecoa")


def test_code_that_a_recipe_has_run_is_said(here, recipe, monkeypatch):
    made = ModuleType("mine")
    made.student = lambda: load_model("tiny-clip-small")
    monkeypatch.setitem(sys.modules, "mine", made)
    text = recipe.read_text().replace('student = "tiny-clip-small"', 'student = "mine:student"')
    recipe.write_text(text.replace("steps = 6", "steps = 1"))
    done = here("train", recipe, "--out", "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "The recipe has code run: its student is made by mine:student." in done.stdout
    assert "teacher is made by" not in done.stdout

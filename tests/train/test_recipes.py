"""The recipes that ship: valid, with the numbers they should have, and runnable."""

import subprocess
import sys

import datasets
import open_clip
import pytest
from rich.console import Console

from mmtard_bench.train.checkpoint import read_card
from mmtard_bench.train.loop import Trainer, learning_rate
from mmtard_bench.train.methods import METHODS, find_method
from mmtard_bench.train.recipe import list_recipes, load_recipe
from mmtard_bench.train.session import Place, train
from tests.conftest import SHARED_DATA

IMAGENET = SHARED_DATA / "imagenet-nips2017-100.parquet"


def test_every_recipe_names_a_method_and_its_teachers():
    for name in list_recipes():
        recipe = load_recipe(name).recipe
        method, options = find_method(recipe.method, recipe.options)
        roles = {role for role, _ in method.outputs(options)} - {"original"}
        assert roles <= set(recipe.teachers), name


def test_there_is_a_recipe_of_every_method_on_the_embedded_data():
    assert {f"digits/{method}" for method in METHODS} <= set(list_recipes())


def test_students_of_the_digits_world_differ_in_nothing_but_the_method_and_its_rate():
    own = {"description", "method", "options", "teachers", "learning_rate"}
    # A residual tower of this size has a single patch, too few for maps of attention.
    others = {"tga-zsr": {"student"}}
    recipes = [load_recipe(f"digits/{m}").recipe for m in METHODS]
    for recipe in recipes:
        left_out = own | others.get(recipe.method, set())
        assert recipe.model_dump(exclude=left_out) == recipes[0].model_dump(exclude=left_out)


@pytest.mark.parametrize("name", ["rn50", "rn101", "vit-b-32", "vit-b-32-lora"])
def test_the_paper_scale_has_the_papers_numbers(name):
    recipe = load_recipe(f"imagenet/{name}").recipe
    assert (recipe.batch, recipe.steps, recipe.learning_rate) == (512, 5000, 2e-5)
    assert (recipe.weight_decay, recipe.warmup) == (1e-4, 0.07)
    assert recipe.attack.model_dump() == {
        "norm": "linf",
        "eps": "2/255",
        "steps": 10,
        "step_size": "1/255",
    }
    assert recipe.train.templates == ["This is a photo of a {}"]
    assert recipe.teachers == {
        role: f"local-dir:checkpoints/imagenet-teacher-{role}" for role in ("clean", "robust")
    }
    lora = recipe.lora.model_dump() if recipe.lora else None
    assert lora == ({"rank": 16, "alpha": 16.0, "dropout": 0.1} if "lora" in name else None)


@pytest.mark.parametrize(("role", "method"), [("clean", "clean-ft"), ("robust", "pmg-aft")])
def test_the_teachers_of_the_paper_have_the_authors_schedule(role, method):
    recipe = load_recipe(f"imagenet/teacher-{role}").recipe
    assert (recipe.student, recipe.method) == ("ViT-L-14:openai", method)
    assert (recipe.batch, recipe.steps, recipe.learning_rate) == (32, 20_000, 1e-5)
    assert (recipe.weight_decay, recipe.warmup * recipe.steps) == (1e-4, pytest.approx(1400))
    assert recipe.train == load_recipe("imagenet/vit-b-32").recipe.train


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = load_recipe("imagenet/vit-b-32").recipe
    plan = {"steps": recipe.steps, "peak": recipe.learning_rate, "warmup": recipe.warmup}
    rates = [learning_rate(step, **plan) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(2e-5 / 350)
    assert rates[349] == pytest.approx(2e-5)
    assert max(rates) == pytest.approx(2e-5)
    assert rates.index(max(rates)) in (349, 350)
    assert rates[350 + 4650 // 2] == pytest.approx(1e-5)
    assert 0 < rates[-1] < 1e-11


def test_list_recipes_shows_them_all():
    done = subprocess.run(
        [sys.executable, "-m", "mmtard_bench", "list", "recipes"], capture_output=True, text=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == list_recipes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve of the ImageNet photos with four class names, as parquet."""
    if not IMAGENET.exists():
        pytest.skip(f"{IMAGENET.name} is not here")
    table = datasets.load_dataset("parquet", data_files=str(IMAGENET), split="train").select(
        range(12)
    )
    names = [open_clip.IMAGENET_CLASSNAMES[label] for label in sorted(set(table["label"]))[:4]]
    table = table.remove_columns("label").add_column("label", [i % 4 for i in range(12)])
    path = tmp_path_factory.mktemp("photos") / "photos.parquet"
    table.to_parquet(path)
    return path, names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rn50", "rn101", "vit-b-32", "vit-b-32-lora", "teacher-robust"])
def test_the_paper_scale_runs_with_the_real_architectures(name, photos, tmp_path, monkeypatch):
    path, names = photos
    student = load_recipe(f"imagenet/{name}").recipe.student.replace(":openai", ":random")
    overrides = ["steps=2", "batch=2", "validation.samples=2", "workers=0", f"student={student}"]
    overrides += ["teachers.clean=ViT-L-14:random", "teachers.robust=ViT-L-14:random"]
    for table in ("train", "validation.task"):
        overrides += [f"{table}.data=parquet:{path}", f"{table}.split=train"]
        overrides.append(f"{table}.classes={names!r}")
    steps = []
    original = Trainer.step

    def watched(self, *arguments):
        learned = original(self, *arguments)
        steps.append({key: value.item() for key, value in learned.loss.terms.items()})
        return learned

    monkeypatch.setattr(Trainer, "step", watched)
    named = load_recipe(f"imagenet/{name}", overrides)
    card = train(
        named, Place(tmp_path / "out", cpu=True, adapter="lora" in name), Console(quiet=True)
    )
    assert len(steps) == 2
    assert all(value > 0 for value in steps[0].values())
    assert read_card(tmp_path / "out") == card
    if "lora" in name:
        assert card.trainable_parameters == 884_736
        assert (tmp_path / "out" / "adapter").exists()
    else:
        assert not (tmp_path / "out" / "adapter").exists()

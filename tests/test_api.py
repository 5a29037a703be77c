"""The Python interface: the examples of its docstrings, and what they do not show."""

import doctest

import pytest
import torch

import mmtard_bench as mb
from mmtard_bench import testing
from mmtard_bench.errors import InputError, StorageError

EXAMPLES = ("run", "evaluate", "attack", "frame", "task_of")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring(folder, name, capsys):
    if name == "frame":
        mb.run("quick-v1", "tiny-clip", out=folder, n=8)
    names = {"mb": mb, "torch": torch, "folder": folder}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(mb, name), name, globs=names)
    assert example.examples
    failed, _ = doctest.DocTestRunner().run(example)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("function", [testing.check_attack, testing.toy_clip])
def test_the_examples_of_the_test_kit(function, capsys):
    names = {"mb": mb, **vars(testing)}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    assert example.examples
    assert not doctest.DocTestRunner().run(example).failed, capsys.readouterr().out


def test_a_run_is_read_the_second_time_and_reports_progress(tmp_path):
    told = []
    first = mb.run("quick-v1", "tiny-clip", out=tmp_path, n=6, progress=told.append)
    assert told[-1].settled == 6
    told.clear()
    again = mb.run("quick-v1", ["tiny-clip"], out=tmp_path, n=6, progress=told.append)
    assert again == first
    assert not told
    assert {record.identity for record in mb.records(tmp_path)} == {r.identity for r in first}


def test_a_saved_record_has_the_bytes_of_a_run_and_counts_as_finished(tmp_path):
    records = mb.run("quick-v1", "tiny-clip", out=tmp_path / "a", n=6)
    files = {mb.read_record(path).identity: path for path in (tmp_path / "a").rglob("*.json")}
    assert len(files) == len(records)
    for record in records:
        written = files[record.identity]
        saved = tmp_path / "b" / written.relative_to(tmp_path / "a")
        record.save(str(saved))
        assert saved.read_bytes() == written.read_bytes()
        assert [path.name for path in saved.parent.glob(".*.tmp")] == []
    told = []
    again = mb.run("quick-v1", "tiny-clip", out=tmp_path / "b", n=6, progress=told.append)
    assert again == records
    assert not told


def test_a_record_is_not_saved_over_a_directory(tmp_path):
    record = mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-1", eps="2/255", n=4)
    with pytest.raises(StorageError, match="could not be written"):
        record.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_resumes_and_gives_the_same_record(tmp_path):
    def stop(progress):
        if any((tmp_path / "two").rglob("[!.]*.json")):
            raise KeyboardInterrupt  # as Ctrl-C does

    whole = mb.run("quick-v1", "tiny-clip", out=tmp_path / "whole", n=6)
    with pytest.raises(KeyboardInterrupt):
        mb.run("quick-v1", "tiny-clip", out=tmp_path / "two", n=6, progress=stop)
    finished = mb.records(tmp_path / "two")
    assert 0 < len(finished) < len(whole)
    resumed = mb.run("quick-v1", "tiny-clip", out=tmp_path / "two", n=6)
    assert resumed[: len(finished)] == finished
    assert [(r.identity, r.samples) for r in resumed] == [(r.identity, r.samples) for r in whole]


def linear(images):
    """Class 1 where the mean of the pixels is above 0.5: its margin is known."""
    score = (images.mean((1, 2, 3)) - 0.5) * 100
    return torch.stack([-score, score], 1)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_linear_classifier_is_broken_exactly_within_its_margin(engine):
    means = torch.tensor([0.505, 0.51, 0.53, 0.6, 0.4])
    images = means[:, None, None, None].expand(-1, 3, 4, 4).clone()
    labels = torch.tensor([1, 1, 1, 1, 1])
    found = mb.attack(
        linear, images, labels, classes=2, threat="pgd-20", eps="4/255", engine=engine
    )
    assert found.clean_correct.tolist() == [True, True, True, True, False]
    assert found.broken.tolist() == [True, True, False, False, False]
    assert found.robust.tolist() == [False, False, True, True, False]
    assert [name is not None for name in found.broken_by] == found.broken.tolist()
    assert (found.adversarial - images).abs().max() <= 4 / 255 + 1e-6
    assert torch.equal(found.adversarial[2:], images[2:])
    assert linear(found.adversarial[:2]).argmax(1).tolist() == [0, 0]


def test_mb_attack_agrees_with_evaluate():
    """The same samples, labels, seed and names of samples give the same verdicts."""
    record = mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-5", eps="2/255", n=12)
    from mmtard_bench.tasks.samples import find_task, load_task

    task = find_task("digits/digit")
    data = load_task(task, n=12, seed=0)
    preprocess = mb.load_model("tiny-clip").preprocess
    images = torch.stack(
        [data.image(row, surface="native", preprocess=preprocess) for row in range(12)]
    )
    labels = torch.tensor(data.labels)
    found = mb.attack(
        "tiny-clip",
        images,
        labels,
        classes=data.classes,
        templates=data.templates,
        threat="pgd-5",
        eps="2/255",
    )
    assert found.clean_correct.tolist() == [s.clean_correct for s in record.samples]
    assert int(found.robust.sum()) == pytest.approx(sum(s.robust for s in record.samples), abs=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.rand(2, 3, 4, 4) * 255}, "before normalisation"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "Divide 8-bit images by 255"),
        ({"images": torch.full((2, 3, 4, 4), torch.nan)}, "expected"),
        ({"images": torch.rand(3, 4, 4)}, "(N, 3, H, W)"),
        ({"labels": torch.tensor([0, 2])}, "from 0 to 1"),
        ({"labels": torch.tensor([0])}, "2 integers"),
        ({"classes": ["a", "b"]}, "Class names go with a Clip"),
        ({"model": "tiny-clip"}, "needs the class names"),
        ({"threat": "text-charmer-k1", "eps": "1/1"}, "changes pixels"),
        ({"threat": "pdg-2"}, "no attack"),
        ({"eps": "0.5"}, "exact positive fraction"),
    ],
)
def test_wrong_arguments_of_attack(change, words):
    given = {
        "model": linear,
        "images": torch.rand(2, 3, 4, 4),
        "labels": torch.tensor([0, 1]),
        "classes": 2,
        "threat": "pgd-2",
        **change,
    }
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        mb.attack(**given)


def test_no_gradient_is_an_error_not_robustness():
    with pytest.raises(InputError, match="No gradient reaches the pixels"):
        mb.attack(
            lambda images: linear(images.detach()),
            torch.full((2, 3, 4, 4), 0.6),
            torch.tensor([1, 1]),
            classes=2,
            threat="pgd-2",
        )


def test_names_are_listed():
    assert "tiny-clip" in mb.list_models()
    assert "digits/digit" in mb.list_tasks()
    assert "digits/test" in mb.list_datasets()
    assert "pgd-{steps}" in mb.list_attacks()
    assert "quick-v1" in mb.list_suites()


def test_records_is_a_function_and_a_folder(folder):
    import mmtard_bench.records.schema

    assert callable(mb.records)
    assert mmtard_bench.records.schema.Record is mb.Record
    with pytest.raises(InputError, match="no directory nowhere"):
        mb.records("nowhere")


def test_an_error_of_the_progress_callback_is_the_callers():
    def tired(progress):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        mb.evaluate(
            "tiny-clip", task="digits/digit", threat="pgd-1", eps="1/255", n=4, progress=tired
        )

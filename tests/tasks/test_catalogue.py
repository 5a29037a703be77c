"""The tasks on public data sets: what they declare, without a network."""

import json
import re
import subprocess
import sys

import open_clip
import pytest

import mmtard_bench as mb
from mmtard_bench import registry
from mmtard_bench.data.manifest import ROBUSTBENCH_LIST
from mmtard_bench.data.webdataset import hub_repository
from mmtard_bench.tasks.catalogue import (
    IMAGENET,
    IMAGENET_FOLDER,
    TASKS,
    ZERO_SHOT_13,
    imagenet_classes,
    imagenet_templates,
)
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.suites import load_suite
from tests.cli.test_bad_input import SUITE, rgb, table

# RobustVLM, CLIP_benchmark/benchmark/datasets.txt; "wds/vtab/x" is the repository "wds_vtab-x".
ROBUSTVLM = """wds/vtab/cifar10 wds/stl10 wds/vtab/cifar100 wds/cars wds/vtab/caltech101
wds/vtab/pets wds/vtab/flowers wds/vtab/dtd wds/vtab/eurosat wds/fgvc_aircraft wds/vtab/pcam
wds/imagenet-r wds/imagenet_sketch"""


def test_the_13_are_robustvlms():
    expected = {
        f"clip-benchmark/wds_{name.removeprefix('wds/').replace('/', '-')}"
        for name in ROBUSTVLM.split()
    }
    assert {dataset.repository for dataset in ZERO_SHOT_13} == expected
    native = {dataset.name for dataset in ZERO_SHOT_13 if dataset.surface == "native"}
    assert native == {"cifar10", "cifar100", "stl10"}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_declaration_is_whole(task):
    assert registry.tasks.get(task.name) is task
    assert task.metric == "zero-shot classification"
    assert task.n_classes >= 2
    assert task.convert_rgb
    assert re.search(r"\b(19|20)\d\d\b", task.citation)
    if task.data.startswith("wds:"):
        name, revision = hub_repository(task)
        assert name.startswith("clip-benchmark/wds_")
        assert re.fullmatch(r"[0-9a-f]{40}|", revision)
        assert (task.split, task.classes, task.templates) == ("test", (), ())
        assert task.licence
        # Enough of them for the 1,000 that robustvlm-v1 draws.
        assert task.samples >= 1000
        assert 0 < (task.shard_samples or 1) <= 10_000
    else:
        assert task.data == f"imagefolder:${IMAGENET_FOLDER}"
        assert len(task.classes) == task.n_classes == IMAGENET.n_classes
        assert len(task.templates) == 80
        assert all(template.count("{}") == 1 for template in task.templates)


def test_imagenets_prompts_are_open_clips():
    assert imagenet_classes() == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert list(imagenet_templates()) == [f("{}") for f in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_they_are_listed_without_torch_or_a_network(here):
    code = (
        "import sys; from mmtard_bench.cli import main; status = main(['list', 'tasks', '--json']);"
        "heavy = {'torch', 'datasets', 'huggingface_hub', 'open_clip'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {row["name"]: row for row in json.loads(done.stdout)}
    assert {task.name for task in TASKS} <= set(listed)
    assert listed["pcam"]["n_classes"] == 2
    assert listed["pcam"]["citation"] == "Veeling et al., 2018, arXiv 1806.03962"
    assert listed["imagenet-folder"]["templates"] == 80
    plain = here("list", "tasks")
    assert "cifar10 " in plain.stdout
    assert "attacked at the native resolution" in plain.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of two images in the folder that the environment names."""
    names = []
    for i in range(6):
        path = tmp_path / "val" / f"n{i // 2:08d}" / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rgb(i))
        names.append(path.relative_to(tmp_path / "val").as_posix())
    monkeypatch.setenv("MY_IMAGES", str(tmp_path / "val"))
    return names


def folder_suite(tmp_path, **keys):
    task = table("mine", "imagefolder:$MY_IMAGES", classes=["a", "b", "c"], **keys)
    fields = {"attack": "pgd-2", "norm": "linf", "eps": '"8/255"', "surface": "model", "more": ""}
    (tmp_path / "mine-v1.toml").write_text(SUITE.format(n=2, task=task, **fields))
    return load_suite(str(tmp_path / "mine-v1.toml"))


def test_a_folder_named_by_the_environment(tmp_path, folder, monkeypatch):
    suite = folder_suite(tmp_path)
    ((task, _),) = suite.plan
    data = load_task(task, n=None, seed=0)
    assert sorted(data.manifest.ids) == folder
    # The suite is the same wherever the folder is, and nobody reads where that was.
    assert task.data == "imagefolder:$MY_IMAGES"
    monkeypatch.delenv("MY_IMAGES")
    assert folder_suite(tmp_path).digest == suite.digest
    with pytest.raises(mb.InputError, match=r"MY_IMAGES.*not set"):
        load_task(task, n=None, seed=0)


def test_only_the_listed_samples_are_drawn(tmp_path, folder):
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in folder[::2]))
    plain = folder_suite(tmp_path)
    suite = folder_suite(tmp_path, samples_file=str(tmp_path / "list.txt"))
    assert suite.digest != plain.digest
    ((task, _),) = suite.plan
    data = load_task(task, n=None, seed=0)
    assert sorted(data.manifest.ids) == folder[::2]
    assert dict(zip(data.manifest.ids, data.labels, strict=True))[folder[2]] == 1
    with pytest.raises(mb.InputError, match=r"n = 4 .*holds 3"):
        load_task(task, n=4, seed=0)
    # The others may change: they are not part of the data.
    (tmp_path / "val" / folder[1]).write_bytes(rgb(50))
    assert load_task(task, n=None, seed=0).revision == data.revision
    (tmp_path / "val" / folder[0]).write_bytes(rgb(50))
    assert load_task(task, n=None, seed=0).revision != data.revision
    (tmp_path / "list.txt").write_text("n0/gone.JPEG\n" + folder[0])
    with pytest.raises(mb.InputError, match=r"1 of the 2 samples .*n0/gone\.JPEG"):
        load_task(task, n=None, seed=0)


def test_robustbenchs_list(tmp_path, folder, monkeypatch):
    ((task, _),) = folder_suite(tmp_path, samples_file="robustbench").plan
    monkeypatch.setenv(ROBUSTBENCH_LIST, str(tmp_path / "ids.txt"))
    with pytest.raises(mb.InputError, match="cannot be read"):
        load_task(task, n=None, seed=0)
    (tmp_path / "ids.txt").write_text("\n".join(folder[:3]))
    assert sorted(load_task(task, n=None, seed=0).manifest.ids) == folder[:3]
    # The one in the package, if it is there.
    monkeypatch.delenv(ROBUSTBENCH_LIST)
    package = tmp_path / "site" / "robustbench"
    (package / "helper_files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(mb.InputError, match=ROBUSTBENCH_LIST):
        load_task(task, n=None, seed=0)
    (package / "helper_files" / "imagenet_test_image_ids.txt").write_text("\n".join(folder[2:]))
    assert sorted(load_task(task, n=None, seed=0).manifest.ids) == folder[2:]


def test_imagenet_folders_must_be_whole(tmp_path, folder, monkeypatch):
    monkeypatch.setenv(IMAGENET_FOLDER, str(tmp_path / "val"))
    with pytest.raises(mb.InputError, match=r"1000 classes, but the data set names 3"):
        load_task(find_task("imagenet-folder"), n=None, seed=0)

"""What the wheel holds: a user who installs it has the suites and the tiny models."""

import subprocess
import sys
import zipfile

from tests.conftest import REPOSITORY


def test_the_wheel_is_whole_and_small(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert {
        "mmtard_bench/py.typed",
        "mmtard_bench/suite_files/quick-v1.toml",
        "mmtard_bench/suite_files/digits-v1.toml",
        "mmtard_bench/evaluation/gallery.html",
        "mmtard_bench/leaderboard/page/assets/page.js",
        "mmtard_bench/models/weights/tiny-clip/open_clip_model.safetensors",
        "mmtard_bench/models/weights/student-mmt-ard.safetensors",
        "mmtard_bench/models/weights/teacher-robust.json",
        "mmtard_bench/tasks/imagenet_classes.txt",
        "mmtard_bench/tasks/imagenet_templates.txt",
        "mmtard_bench/train/recipes/digits/mmt-ard.toml",
    } <= set(sizes)
    assert not any(name.startswith(("tests", "leaderboard", "runs")) for name in sizes)
    assert sum(sizes.values()) < 25_000_000

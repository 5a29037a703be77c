"""Whole runs: what they leave, how they go on, and that nothing but the recipe decides."""

import errno
import io
import json
import os
import shutil
import signal
from copy import deepcopy

import datasets
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.models.loading import load_local_dir, load_model
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.models.towers import with_visual
from mmtard_bench.train import checkpoint, session
from mmtard_bench.train.checkpoint import Card, read_card
from mmtard_bench.train.make.ship import ship
from mmtard_bench.train.methods import METHODS
from mmtard_bench.train.towers import require_apart
from tests.conftest import wait_for
from tests.forked import Forked
from tests.models.toys import add_toys


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def without_seconds(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history(folder)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_the_image_tower_alone(method, run_small):
    student = "tiny-vit" if METHODS[method].patches else "tiny-clip-small"
    folder = run_small("run", f"method={method}", f"student={student}", "steps=2", "save_every=1")
    clip = load_model(f"local-dir:{folder}")
    start = load_model(student).module.state_dict()
    for key, value in clip.module.state_dict().items():
        assert torch.equal(value, start[key]) != key.startswith("visual."), key
    card = read_card(folder)
    assert card.weights_digest == clip.digest
    assert card.origin.digests["student"] == load_model(student).digest
    assert set(card.metrics) == {"validation/clean", "validation/robust"}
    assert (folder / "diagnostics.png").stat().st_size > 10_000


def test_a_run_is_a_function_of_recipe_and_seed(run_small):
    first, again, other = run_small("a"), run_small("b"), run_small("c", seed=1)
    assert_same(weights(first), weights(again))
    assert without_seconds(first) == without_seconds(again)
    assert not torch.equal(
        weights(first)["visual.attnpool.c_proj.weight"],
        weights(other)["visual.attnpool.c_proj.weight"],
    )


@pytest.mark.parametrize("method", ["clean-ft", "ard"])
def test_every_layer_learns_in_training_mode_and_is_attacked_in_evaluation(
    method, run_small, monkeypatch
):
    original, learning, attacked = session.Tower.forward, [], []

    def look(self, images):
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            where = attacked if images.requires_grad else learning
            where.append({layer.training for layer in self.modules()})
        return original(self, images)

    monkeypatch.setattr(session.Tower, "forward", look)
    run_small("run", f"method={method}", "steps=3", "log_every=2", "validation.every=1000")
    assert learning == [{True}] * 3
    assert all(modes == {False} for modes in attacked)
    assert (len(attacked) >= 6) == (method == "ard")


def test_half_precision_trains_weights_of_full_precision(run_small):
    half, full = run_small("half", "precision=bf16", "steps=2"), run_small("full", "steps=2")
    start = load_model("tiny-clip-small").module.state_dict()
    for name, value in weights(half).items():
        assert value.dtype == start[name].dtype
        if name.startswith("visual.") and value.dtype == torch.float32:
            assert not torch.equal(value, weights(full)[name])
            assert not torch.equal(value, start[name])
    # bf16 keeps 8 bits: the first loss, of the same weights, differs by its rounding at most.
    first, other = (history(folder)[0]["loss/kl_robust"] for folder in (half, full))
    assert first == pytest.approx(other, rel=0.05)


def test_the_history_holds_what_a_user_wants_to_see(run_small):
    lines = history(run_small("a", "method=mmt-ard"))
    trained = [line for line in lines if "loss/kl_robust" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for line in trained:
        assert {"loss/kl_clean", "loss/consistency", "train/clean", "train/adv"} <= set(line)
        for role in ("clean", "robust"):
            assert {f"agreement/{role}/clean", f"agreement/{role}/adv"} <= set(line)
        for weight in ("weights/robust", "weights/clean"):
            assert len(line[weight]) == 11
            assert line[weight] == sorted(line[weight])
    assert [line["step"] for line in lines if "validation/robust" in line] == [3, 6]
    assert all(
        line["validation/robust"] <= line["validation/clean"]
        for line in lines
        if "validation/robust" in line
    )


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def stop_at(monkeypatch, step, error):
    """Make the step of this number raise, before it is made."""
    original = session.Session._step

    def interrupted(self, number, *rest):
        if number == step:
            raise error
        return original(self, number, *rest)

    monkeypatch.setattr(session.Session, "_step", interrupted)


@pytest.mark.parametrize(
    ("method", "step"), [("mmt-ard", 1), ("mmt-ard", 3), ("mmt-ard", 5), ("mtard", 5)]
)
def test_a_killed_run_goes_on_to_the_same_weights(method, step, run_small, monkeypatch):
    """``mtard`` remembers its weights and first losses from step to step."""
    options = [f"method={method}", *["options.rate=0.5"] * (method == "mtard")]
    whole = run_small("whole", *options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, step, Killed())
        run_small("cut", *options)
    cut = run_small("cut", *options, resume=True)
    assert_same(weights(whole), weights(cut))
    assert without_seconds(whole) == without_seconds(cut)


def test_text_guided_attention_needs_a_grid_of_patches(run_small):
    folder = run_small("vit", "method=tga-zsr", "student=tiny-vit", "options.refine=1.0")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    refine = [line["loss/refine"] for line in lines if "loss/refine" in line]
    # The images differ from clean ones, so their maps do; the map of the start is that of itself.
    assert refine[0] > 0
    assert lines[0]["loss/constrain"] == pytest.approx(0, abs=1e-4)
    assert lines[-2]["loss/constrain"] > 1e-3
    with pytest.raises(InputError, match="ModifiedResNet have no embeddings in the space of"):
        run_small("residual", "method=tga-zsr", "student=tiny-clip-small")


def test_kill_9_in_the_middle_and_resume(recipe, tmp_path, run_small):
    slow = ["--set", "steps=16", "--set", "log_every=100", "--set", "validation.every=100"]
    command = ["train", str(recipe), "--device", "cpu", *slow, "--out", str(tmp_path / "cut")]
    process = Forked(command, tmp_path, {}, tmp_path / "said")
    try:
        wait_for("step-*/progress.json", tmp_path / "cut", process, seconds=120)
    finally:
        process.kill()
        process.communicate(60)
    assert not (tmp_path / "cut" / "card.json").exists()
    again = Forked([*command, "--resume"], tmp_path, {}, tmp_path / "again")
    out, errors = again.communicate(300)
    assert again.returncode == 0, errors
    assert "Going on from step" in out
    whole = run_small("whole", "steps=16", "log_every=100", "validation.every=100")
    assert_same(weights(whole), weights(tmp_path / "cut"))


def test_ctrl_c_keeps_the_last_step(run_small, monkeypatch, tmp_path):
    original = session.Session._step

    def pressed(self, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.Session, "_step", pressed)
        run_small("cut", "save_every=100")
    assert [path.name for path in (tmp_path / "cut" / "states").iterdir()] == ["step-0000003"]
    run_small("cut", "save_every=100", resume=True)
    assert_same(weights(run_small("whole", "save_every=100")), weights(tmp_path / "cut"))


def test_only_the_last_states_are_kept_and_foreign_folders_stay(run_small, tmp_path):
    foreign = tmp_path / "run" / "states" / "step-0000001"
    run_small("run", "steps=2", "save_every=1")
    foreign.joinpath("progress.json").unlink()
    foreign.joinpath("mine.txt").write_text("not yours")
    shutil.rmtree(foreign.with_name("step-0000002"))
    (tmp_path / "run" / "card.json").unlink()
    with pytest.raises(StorageError, match="step-0000001 could not be written"):
        run_small("run", "steps=2", "save_every=1", resume=True)
    assert foreign.joinpath("mine.txt").read_text() == "not yours"
    folder = run_small("other", "steps=6", "save_every=1", "keep=2")
    names = sorted(path.name for path in (folder / "states").iterdir())
    assert names == ["step-0000005", "step-0000006"]


def test_a_finished_run_is_not_made_again(run_small):
    folder = run_small("run", "steps=1")
    before = (folder / "card.json").read_bytes()
    run_small("run", "steps=1", resume=True)
    assert (folder / "card.json").read_bytes() == before


def test_a_run_does_not_touch_what_is_there(run_small, tmp_path):
    run_small("run", "steps=1")
    with pytest.raises(InputError, match="add --resume"):
        run_small("run", "steps=1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty"):
            run_small("full", resume=resume)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_cannot_go_on(finished, run_small, monkeypatch):
    with monkeypatch.context() as patch:
        if not finished:
            stop_at(patch, 4, Killed())
        try:
            run_small("run")
        except Killed:
            assert not finished
    with pytest.raises(InputError, match=r"recipe.batch \(16, now 8\)"):
        run_small("run", "batch=8", resume=True)
    with pytest.raises(InputError, match=r"seed \(0, now 7\)"):
        run_small("run", resume=True, seed=7)
    run_small("run", "log_every=2", resume=True)


def test_nan_stops_before_the_update_and_names_the_term(run_small, tmp_path):
    with pytest.raises(InputError, match="the loss term 'kl_robust' became NaN"):
        run_small("run", "learning_rate=1e30", "clip_norm=1e30", "warmup=0.0", "save_every=1")
    (state,) = (tmp_path / "run" / "states").iterdir()
    assert state.name == "step-0000001"


def test_a_full_disk_loses_nothing(run_small, tmp_path, monkeypatch):
    original = checkpoint.States.save

    def full(self, write, progress, *, main):
        if progress.step == 4:

            def write(folder):
                (folder / "half").write_bytes(b"0")
                raise OSError(28, "No space left on device")

        original(self, write, progress, main=main)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(checkpoint.States, "save", full)
        run_small("run")
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step-0000002"]
    cut = run_small("run", resume=True)
    assert_same(weights(cut), weights(run_small("whole")))


def test_clean_teachers_are_asked_once_a_sample(run_small, monkeypatch):
    seen = []
    original = session.Teacher.__call__

    def count(self, images):
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(session.Teacher, "__call__", count)
    run_small(
        "long",
        "steps=130",
        "batch=16",
        "log_every=1000",
        "validation.every=1000",
        "save_every=1000",
    )
    # 130 x 16 images of a set of 2,000: one pass over the set, and the log looks at x' twice.
    assert sum(seen) == 1 + 2000 + 2 * 16
    seen.clear()
    run_small("short", "steps=2", "log_every=1000")
    assert sum(seen) == 2 * 16 + 2 * 16


def test_the_trackers_get_what_the_history_gets(run_small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_small("run", "method=mmt-ard", trackers=["tensorboard"])
    events = EventAccumulator(str(folder / "tracker"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/kl_robust", "train/adv", "validation/robust"} <= set(tags["scalars"])
    assert {"weights/robust", "weights/clean"} == set(tags["histograms"])
    assert len(events.Scalars("loss/kl_robust")) == 6


def test_an_unknown_tracker_is_refused(run_small):
    with pytest.raises(InputError, match="nonsense"):
        run_small("run", trackers=["nonsense"])


def test_adapters_without_lora_are_refused(run_small):
    with pytest.raises(InputError, match=r"has no \[lora\]"):
        run_small("run", adapter=True)


def test_a_saved_adapter_makes_the_student_from_its_start(run_small, tmp_path):
    pytest.importorskip("peft")
    add_toys(tmp_path)
    lora = ["lora.rank=4", "lora.alpha=8", "lora.dropout=0.1"]
    student = "toy-vit-quickgelu:random"
    folder = run_small("run", f"student={student}", *lora, "steps=2", adapter=True)
    clip = load_model(f"{student}+lora:{folder / 'adapter'}")
    trained, start = weights(folder), load_model(student).module.state_dict()
    for name, weight in clip.module.state_dict().items():
        torch.testing.assert_close(weight, trained[name])
    assert sum(not weight.equal(start[name]) for name, weight in trained.items()) == 4


def test_students_and_teachers_are_named_as_anywhere(run_small, tmp_path):
    tower = f"+visual:{WEIGHTS / 'teacher-robust.safetensors'}"
    plain = run_small("plain", "steps=2")
    spelt = run_small("spelt", "steps=2", f"teachers.robust=tiny-clip{tower}")
    start = run_small("start", "steps=2", f"student=tiny-clip{tower}")
    assert weights(plain).keys() == weights(spelt).keys()
    assert all(weight.equal(weights(spelt)[name]) for name, weight in weights(plain).items())
    digest = load_model("teacher-robust").digest
    assert read_card(spelt).origin.digests["robust teacher"] == digest
    assert read_card(start).origin.digests["student"] == digest


def test_a_recipe_changed_before_the_first_state_is_noticed(run_small, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 1, Killed())
        run_small("run", "save_every=100")
    with pytest.raises(InputError, match=r"recipe.learning_rate \(0.001, now 0.002\)"):
        run_small("run", "learning_rate=0.002", resume=True)


def test_another_teacher_of_the_same_name_is_noticed(run_small, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(WEIGHTS / "tiny-clip", teacher)
    named = f"teachers.robust=local-dir:{teacher}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 3, Killed())
        run_small("run", named)
    changed = weights(teacher)
    changed["visual.conv1.weight"] += 1
    save_file(changed, teacher / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"digests\.robust teacher"):
        run_small("run", named, resume=True)


def test_a_damaged_state_is_a_sentence(run_small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 5, Killed())
        run_small("run")
    state = tmp_path / "run" / "states" / "step-0000004"
    random = state / "random_states_0.pkl"
    random.write_bytes(random.read_bytes()[:-40] + bytes(40))
    # Which accelerate itself would pass over in silence.
    with pytest.raises(
        InputError, match=r"is damaged: random_states_0\.pkl: not as saved\. Delete"
    ):
        run_small("run", resume=True)
    shutil.rmtree(state)
    assert_same(weights(run_small("run", resume=True)), weights(run_small("whole")))


def test_whatever_is_not_as_it_was_saved_in_a_state_is_noticed(tmp_path):
    states = checkpoint.States(tmp_path, keep=2, steps=6)

    def write(folder):
        for name in ("model.safetensors", "random_states_0.pkl"):
            (folder / name).write_bytes(name.encode() * 100)

    def refused(words):
        with pytest.raises(InputError, match=words):
            states.latest()

    states.save(write, checkpoint.Progress(step=4, seconds=1.5), main=True)
    state, progress = states.latest()
    assert (state.name, progress.step, progress.seconds) == ("step-0000004", 4, 1.5)
    for path in state.iterdir():
        whole = path.read_bytes()
        damaged = whole[:-2] + b"!" + whole[-1:]
        path.write_bytes(damaged)
        refused("is damaged: .* --resume continues from the state before")
        path.write_bytes(whole)
    said = json.loads((state / "progress.json").read_text())
    for key, value, words in (
        ("step", 10**12, "says step 1000000000000 of 6"),
        ("step", 0, "'step'"),
        ("seconds", float("nan"), "'seconds'"),
        ("files", {}, "not as saved"),
    ):
        (state / "progress.json").write_text(json.dumps({**said, key: value}))
        refused(f"is damaged: .*{words}")
    (state / "progress.json").write_text(json.dumps(said))
    assert states.latest() == (state, progress)
    (state / "more").write_bytes(b"")
    refused("more: not as saved")
    (state / "more").unlink()
    (state / "model.safetensors").unlink()
    refused(r"model\.safetensors: not as saved")
    state.rename(state.with_name("step-1000000000000"))
    refused("progress.json says step 4 of 6")


def test_a_resumed_run_with_dropout_ends_the_same(run_small, monkeypatch):
    vit = ["student=ViT-S-32-alt:random", "lora.rank=2", "lora.alpha=2.0", "lora.dropout=0.5"]
    vit += ["steps=2", "save_every=1", "batch=2", "attack.steps=1", "validation.samples=2"]
    vit += ["surface=native"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 1, Killed())
        run_small("cut", *vit)
    whole, cut = run_small("whole", *vit), run_small("cut", *vit, resume=True)
    assert_same(weights(whole), weights(cut))


def write_images(path, images):
    """A table of images of two classes in turn."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    labels = [i % 2 for i in range(len(images))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(path)


def test_a_damaged_image_is_named_from_a_worker_too(tmp_path, run_small, monkeypatch):
    write_images(tmp_path / "bad.parquet", [{"bytes": b"no image", "path": None}] * 8)
    monkeypatch.setattr("mmtard_bench.train.data.IN_MEMORY", 0)
    monkeypatch.setattr("mmtard_bench.train.data.Images.__init__", _without_a_look)
    with pytest.raises(InputError, match=r"^parquet:.*'00000.*is damaged") as caught:
        run_small(
            "run", f'train={{name="bad", data="parquet:{tmp_path}/bad.parquet"}}', "workers=1"
        )
    assert "Traceback" not in str(caught.value)


def _without_a_look(self, data, preprocess, surface):
    self.data, self.preprocess, self.surface = data, preprocess, surface
    self._kept = self._shape = None


@pytest.mark.parametrize("where", ["train", "validation.task"])
@pytest.mark.parametrize("memory", [0, 10**9])
def test_images_of_several_sizes_are_a_sentence(where, memory, tmp_path, run_small, monkeypatch):
    monkeypatch.setattr("mmtard_bench.train.data.IN_MEMORY", memory)
    images = [Image.new("RGB", (32 + 8 * (i == 11), 32)) for i in range(12)]
    write_images(tmp_path / "mixed.parquet", images)
    task = f'{where}={{name="mixed", data="parquet:{tmp_path}/mixed.parquet"}}'
    with pytest.raises(InputError, match=r"(mixes image sizes|several sizes).*'00000011'"):
        run_small("run", task, "batch=12", "steps=1")


def test_a_single_image_cannot_be_normalised(run_small):
    with pytest.raises(InputError, match=r"batch = 1 leaves .* expected at least 2"):
        run_small("run", "batch=1")


FOREIGN = save({"embeddings": torch.zeros(3, 4)})
LINE = b'{"step": 1, "seconds": 0.5, "loss/a": 1, "weights/a": [0.5]}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("states/memory-robust.safetensors", b"no tensors", "delete it, and the teacher looks"),
        ("states/memory-robust.safetensors", FOREIGN, r"\(shape \(3, 4\)\); delete it"),
        ("history.jsonl", b"[1, 2]\n", "history.jsonl, line 1 is damaged"),
        ("history.jsonl", b"half\n", "history.jsonl, line 1 is damaged: Invalid JSON"),
        ("history.jsonl", LINE + b'{"step": 2, "seconds": 1, "\xff": 1}\n', "line 2 is damaged"),
        ("history.jsonl", LINE + b'{"step": 2, "seconds": 1, "a": "b"}\n', "line 2 is damaged"),
        ("history.jsonl", LINE + b'{"seconds": 1}\n', "line 2 is damaged: the key 'step'"),
        ("history.jsonl", b'{"step": 1e400, "seconds": 1}\n', "line 1 is damaged: 'step'"),
    ],
)
def test_damage_is_a_sentence_when_a_run_goes_on(
    name, content, words, run_small, tmp_path, monkeypatch
):
    long = ["steps=130", "save_every=1", "validation.every=1000"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 2, Killed())
        run_small("run", *long)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        run_small("run", *long, resume=True)


def test_what_ships_is_what_its_card_names(run_small, tmp_path):
    shutil.copytree(WEIGHTS / "tiny-clip-small", tmp_path / "tiny-clip-small")
    ship(run_small("run", "steps=2"), "mine", tmp_path)
    tower = tmp_path / "mine.safetensors"
    clip = with_visual(load_local_dir(tmp_path / "tiny-clip-small", "mine"), tower, "mine")
    card = Card.model_validate_json((tmp_path / "mine.json").read_text())
    assert card.weights_digest == clip.digest != read_card(tmp_path / "run").weights_digest
    for name, trained in weights(tmp_path / "run").items():
        torch.testing.assert_close(clip.module.state_dict()[name], trained, rtol=1e-3, atol=1e-7)
    with pytest.raises(InputError, match=r"no card\.json"):
        ship(tmp_path / "tiny-clip-small", "other", tmp_path)


@pytest.mark.parametrize("wanting", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_each_file_of_a_state_may_find_the_disk_full(wanting, tmp_path):
    """torch's writer of zip files closes its file with another error than the system's."""
    states = checkpoint.States(tmp_path, keep=2, steps=6)
    tensors = {"a": torch.zeros(1000)}

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(folder):
        save_file(tensors, folder / "model.safetensors")
        for name in ("optimizer.bin", "random_states_0.pkl"):
            with (Full if name == wanting else io.FileIO)(folder / name, "w") as file:
                torch.save(tensors, file)
        if wanting == "model.safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    begun = checkpoint.Progress(step=2, seconds=1)
    states.save(lambda folder: (folder / "a").write_bytes(b""), begun, main=True)
    with pytest.raises(StorageError, match=r"step-0000004 could not be written: .*No space left"):
        states.save(write, checkpoint.Progress(step=4, seconds=2), main=True)
    assert states.latest()[1].step == 2
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-0000002"]
    with pytest.raises(RuntimeError, match="no matter of storage"), checkpoint.storage(tmp_path):
        raise RuntimeError("no matter of storage")


def shared_weights(clip):
    return clip


def shared_view(clip):
    """A model of its own, but for one parameter that is a part of another's memory."""
    own = deepcopy(clip)
    bias = clip.module.visual.bn1.bias
    own.module.visual.bn1.bias = torch.nn.Parameter(bias.detach()[:], requires_grad=False)
    return own


def shared_buffer(clip):
    own = deepcopy(clip)
    own.module.visual.bn1.running_mean = clip.module.visual.bn1.running_mean
    return own


@pytest.mark.parametrize("share", [shared_weights, shared_view, shared_buffer])
def test_a_teacher_that_shares_memory_with_the_student_is_refused(share, run_small, monkeypatch):
    student = load_model("tiny-clip-small")
    found = iter([student, share(student)])
    monkeypatch.setattr(session, "load_model", lambda spec: next(found))
    with pytest.raises(InputError, match=r"The original teacher .* shares .* 'visual"):
        run_small("run", "method=fare", "teachers={}")


def test_teachers_of_their_own_are_apart():
    student = load_model("tiny-clip-small")
    require_apart(student, deepcopy(student), "original teacher")
    require_apart(student, load_model("tiny-clip"), "clean teacher")

"""Each label gets the name of its own class, or there is an error, a note, a warning."""

import datasets
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import mmtard_bench as mb
from mmtard_bench.data.digits import DigitsSplit
from mmtard_bench.tasks.naming import check_labels, class_names
from mmtard_bench.tasks.samples import load_task
from tests.cli.test_bad_input import GOOD, parquet


class Named:
    """As much of a data set as counts here."""

    def __init__(self, names: tuple[str, ...] = (), labels: tuple[int, ...] = ()) -> None:
        self.class_names, self.labels = names, labels
        self.ids = [f"s{i}" for i in range(len(labels))]


def task(*classes: str) -> mb.Task:
    return mb.Task("t", "parquet:x", ("{}",), classes=classes)


def notes(own: tuple[str, ...], *classes: str) -> tuple[str, ...]:
    found, said = class_names(task(*classes), Named(own))
    assert found == classes
    return said


@given(st.permutations(["bird", "cat", "dog", "Golden_Retriever"]))
def test_the_datas_own_names_in_another_order_are_refused(order):
    own = ("bird", "cat", "dog", "Golden_Retriever")
    spoken = tuple(name.lower().replace("_", " ") for name in order)
    if tuple(order) == own:
        assert notes(own, *spoken) == ()
        return
    with pytest.raises(mb.InputError, match="in the order of the data's labels"):
        class_names(task(*spoken), Named(own))


@pytest.mark.parametrize(
    ("own", "classes"),
    [
        (("bird", "cat", "dog"), ("a cat", "a dog", "a bird")),
        (("birds", "cats", "dogs"), ("cat", "dog", "bird")),
        (("AnnualCrop", "SeaLake"), ("sea lake", "annual crop")),
        (("tench, Tinca tinca", "goldfish, Carassius auratus"), ("goldfish", "tench")),
        (("bird", "cat", "dog"), ("fowl", "dog", "hound")),  # one of them alone
        (("0", "1", "2"), ("1", "2", "3")),
        (("猫", "犬"), ("犬", "猫")),
    ],
)
def test_a_name_that_is_another_class_of_the_data_is_refused(own, classes):
    with pytest.raises(mb.InputError, match=r"the task calls the label \d .* but in parquet:x"):
        class_names(task(*classes), Named(own))


def test_other_names_are_a_note():
    own = ("automobile", "air plane", "dog")
    assert notes(own, "car", "airplanes", "dog") == (
        "The task's class names differ from the data's ('automobile' is 'car').",
    )
    assert notes(own, *own) == ()
    # Twins in the data: either is meant.
    assert notes(("crane", "crane"), "the crane", "crane") == ()


@pytest.mark.parametrize("pattern", ["{}", "class_{}", "{}.0"])
@pytest.mark.parametrize("start", [0, 1])
def test_numbered_classes_in_the_order_of_text_are_refused(pattern, start):
    numbers = [pattern.format(i) for i in range(start, start + 11)]
    names = tuple("abcdefghijk")
    with pytest.raises(mb.InputError, match=r"leading zeros"):
        class_names(task(*names), Named(tuple(sorted(numbers))))
    # In the order of numbers there is no doubt, and a note says which is which.
    (note,) = notes(tuple(numbers), *names)
    assert f"'{numbers[0]}' is 'a', '{numbers[1]}' is 'b'" in note
    padded = tuple(f"{i:02d}" for i in range(start, start + 11))
    assert len(notes(padded, *names)) == 1


def said(labels: tuple[int, ...], count: int) -> tuple[str, ...]:
    return check_labels(task(), Named((), labels), labels, "abcdefgh"[:count])


def test_the_whole_label_column_is_checked():
    assert said((0, 1, 2, 0), 3) == ()
    with pytest.raises(mb.InputError, match=r"sample 's2' has the label 3.*count from 1: subtract"):
        said((1, 2, 3), 3)
    with pytest.raises(mb.InputError, match=r"'s1' has the label -1, .* from 0 to 2\.$"):
        said((0, -1, 3), 3)
    assert said((0, 2, 2), 3) == ("1 of 3 classes have no sample in the data (b).",)
    with pytest.warns(UserWarning, match="no sample has the label 0, 'a'. If its labels count"):
        assert len(said((1, 2, 2), 3)) == 1


def test_labels_of_samples_that_are_not_drawn_count(tmp_path):
    spec = parquet(tmp_path / "x.parquet", GOOD, [0, 1, 2, 1])
    for seed in range(4):
        with pytest.raises(mb.InputError, match="has the label 2, but there are 2 classes"):
            load_task(mb.Task("t", spec, ("{}",), classes=("cat", "dog")), n=1, seed=seed)


def test_files_that_name_the_classes_in_another_order_are_refused(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=classes)
        )
        rows = {"image": [Image.new("RGB", (4, 4))], "label": [0]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(
        mb.InputError, match=r"b\.parquet and .*a\.parquet name the classes differently"
    ):
        load_task(mb.Task("t", f"parquet:{tmp_path}/*.parquet", ("{}",)), n=None, seed=0)


def test_the_digits_are_right_and_need_no_note():
    data = load_task(mb.Task("t", "digits/test", ("{}",)), n=3, seed=0)
    assert isinstance(data.dataset, DigitsSplit)
    assert data.notes == ()


def test_a_file_that_names_the_classes_after_one_that_does_not_is_refused(tmp_path):
    label = datasets.ClassLabel(names=["dog", "cat"])
    for name, kind in (("a", datasets.Value("int64")), ("b", label)):
        rows = {"image": [Image.new("RGB", (4, 4))], "label": [0]}
        features = datasets.Features(image=datasets.Image(), label=kind)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
    spec = f"parquet:{tmp_path}/*.parquet"
    with pytest.raises(mb.InputError, match=r"\(dog, cat; not at all\)"):
        load_task(mb.Task("t", spec, ("{}",), classes=("cat", "dog")), n=None, seed=0)


def test_numbers_before_names_do_not_hide_which_class_is_meant():
    own = ("10_bird", "1_cat", "2_dog")
    with pytest.raises(mb.InputError, match="'1_cat' is the label 1"):
        notes(own, "cat", "dog", "bird")
    with pytest.raises(mb.InputError, match="'10_bird' comes before '1_cat'"):
        notes(own, "kitten", "puppy", "chick")
    assert notes(own, "bird", "cat", "dog") == ()
    assert notes(("001.Laysan_Albatross", "002.Wren"), "laysan albatross", "wren") == ()
    assert notes(("737-200", "757-200"), "Boeing 737", "757-200") != ()  # 200 is no name

"""A gallery shows what the attack did, of the samples asked for, and lets no text format it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import Outcome
from mmtard_bench.evaluation.gallery import (
    Gallery,
    Shown,
    choose_record,
    choose_samples,
    facts,
    panels,
)
from mmtard_bench.evaluation.gallery_page import to_html, to_png, write_gallery
from mmtard_bench.evaluation.sources import load_model_of, threat_of
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.records.schema import Record
from mmtard_bench.tasks.scoring import Verdict
from tests.conftest import REPOSITORY, Cli, assert_sentence
from tests.leaderboard.test_leaderboard import in_suite, made

ENTRY = REPOSITORY / "leaderboard" / "entries" / "teacher-robust"
IMAGE = torch.full((3, 4, 6), 0.25)
SUITE = """
name = "tiny-v1"
description = "two samples"
n = 6
seed = 3
tasks = ["digits/digit"]
[[threats]]
attack = "pgd-3"
norm = "linf"
eps = "16/255"
"""


def outcome(**changes: object) -> Outcome:
    found = {"id": "s/0", "label": 0, "image": IMAGE, "before": 0, "after": 0, "broken": False}
    return Outcome(**{**found, "verdict": Verdict(True, 0), **changes})


def broken(**changes: object) -> Outcome:
    shift = torch.zeros_like(IMAGE)
    shift[0, 0, 0], shift[1, 2, 3] = 8 / 255, -4 / 255
    found = {"after": 2, "broken": True, "adversarial": IMAGE + shift, "broken_by": "pgd-5"}
    return outcome(**{**found, **changes})


def gallery_of(found: Outcome, record: Record | None = None, **changes: object) -> Gallery:
    record = record or made("b" if found.adversarial is not None else "r")
    shown = Shown(record.samples[0], found)
    parts = {"classes": ("zero", "one", "two"), "threat": threat_of(record), **changes}
    return Gallery(record, shown=(shown,), **parts)


def said(gallery: Gallery) -> dict[str, str]:
    return dict(facts(gallery, gallery.shown[0]))


def test_the_perturbation_is_around_grey_at_full_contrast():
    gallery = gallery_of(broken())
    (_, clean), (title, change), (_, adversarial) = panels(gallery.shown[0])
    assert clean.shape == (4, 6, 3)
    assert (clean == 64).all()
    assert adversarial[0, 0].tolist() == [72, 64, 64]
    assert adversarial[2, 3].tolist() == [64, 60, 64]
    assert title == "perturbation x 15.9"
    assert change[0, 0].tolist() == [255, 128, 128]
    assert change[2, 3].tolist() == [128, 64, 128]


def test_what_is_said_of_a_broken_sample():
    assert said(gallery_of(broken())) == {
        "true class": "0: zero",
        "prediction before": "0: zero",
        "prediction after": "2: two",
        "re-attack": "broken by pgd-5",
        "distance": "linf 8/255, eps 8/255",
        "record": "broken by pgd-5",
    }
    unconfirmed = said(gallery_of(broken(broken=False, after=0)))
    assert unconfirmed["re-attack"].endswith("a second pass does not confirm it")


def test_samples_that_stand_or_were_wrong_have_their_clean_image_alone():
    stands = gallery_of(outcome())
    assert [title for title, _ in panels(stands.shown[0])] == ["clean"]
    assert said(stands)["re-attack"].startswith("robust: ")
    assert said(stands)["record"] == said(stands)["re-attack"]
    wrong = gallery_of(outcome(before=1, after=1), made("w"))
    assert "not attacked" in said(wrong)["re-attack"]
    assert "prediction after" not in said(wrong)
    assert said(wrong)["record"] == said(wrong)["re-attack"]


def test_a_verdict_that_differs_from_the_record_says_so():
    wrong = outcome(before=1, after=1)
    pairs = [(broken(), "r"), (outcome(), "b"), (wrong, "r"), (outcome(), "w"), (broken(), "w")]
    for found, letter in pairs:
        assert "the re-attack differs" in said(gallery_of(found, made(letter)))["record"]


def test_an_l2_distance_and_edits_of_a_name():
    threat = made("b").threat.model_copy(update={"norm": "l2", "eps": "128/255"})
    l2 = gallery_of(broken(), in_suite(made("b"), threat=threat))
    assert said(l2)["distance"] == "l2 8.94/255, eps 128/255"
    facts_ = {"norm": "levenshtein", "eps": "2/1", "parameters": {"edits": 2}}
    record = made("b").model_copy(update={"threat": threat.model_copy(update=facts_)})
    text = gallery_of(broken(adversarial=IMAGE, name="zeero"), record)
    assert said(text)["distance"] == "levenshtein 1/1, eps 2/1"
    assert said(text)["edited name"] == "zero → zeero (1 edit)"
    assert [title for title, _ in panels(text.shown[0])] == ["clean (no pixel changed)"]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)> & \u202etxt\x1b[2J'


def test_no_text_formats_the_page():
    record = made("b", EVIL)
    plain = Page(to_html(gallery_of(broken())))
    evil = Page(to_html(gallery_of(broken(name=EVIL, broken_by=EVIL), record, classes=(EVIL,) * 3)))
    assert evil.tags == [*plain.tags, "dt", "dd"]  # the edited name
    assert "script" not in evil.tags
    assert evil.text.count("alert(1)</script>") > 5
    assert "\u202e" not in evil.text
    assert "\x1b" not in evil.text
    assert not any(name.startswith("on") for name, _ in evil.attributes)


def test_a_page_is_one_file_that_loads_nothing():
    text = to_html(gallery_of(broken()))
    page = Page(text)
    assert any("default-src 'none'" in str(value) for _, value in page.attributes)
    addresses = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(addresses) == 3
    assert "http:" not in text
    assert "https:" not in text
    pictures = []
    for address in addresses:
        head, _, data = address.partition(",")
        assert head == "data:image/png;base64"
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    for picture, (_, pixels) in zip(pictures, panels(gallery_of(broken()).shown[0]), strict=True):
        assert (picture == pixels).all()
    assert text.count('class="small"') == 3
    large = gallery_of(outcome(image=torch.zeros(3, 224, 224)))
    assert 'class="small"' not in to_html(large)


def test_a_picture_with_names_that_matplotlib_would_take_apart():
    record = made("b", r"$\frac{x}$")
    gallery = gallery_of(broken(name="_$x$ " + "y" * 300), record, classes=("$", "_a", "\t\x00"))
    with Image.open(io.BytesIO(to_png(gallery))) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_the_first_record_with_broken_samples_is_chosen():
    failed = made("rb", status="error", error="broke", results=None, samples=[])
    robust, fallen, other = made("rr"), made("rb", "second"), made("rb", attack="pgd-7")
    assert choose_record([failed, robust, fallen, other]) == fallen
    assert choose_record([failed, robust]) == robust
    assert choose_record([fallen, other], threat="pgd-7 linf 8/255") == other
    with pytest.raises(InputError, match="Did you mean pgd-7 linf 8/255"):
        choose_record([other], threat="pgd-7 linf 9/255")
    with pytest.raises(InputError, match="task 'digits'"):
        choose_record([other], task="digits")
    with pytest.raises(InputError, match="No record is finished"):
        choose_record([failed])


def test_samples_are_drawn_among_those_attacked():
    record = made("wrb" * 20)
    chosen = choose_samples(record)
    assert chosen == choose_samples(record)
    assert chosen != choose_samples(record, seed=1)
    assert len(set(chosen)) == 8
    wrong = {sample.id for sample in record.samples if not sample.clean_correct}
    assert not wrong & set(choose_samples(record, count=100))
    assert len(choose_samples(record, count=100)) == 40
    assert choose_samples(record, ids=["s/3", "s/0", "s/3"]) == ["s/3", "s/0"]
    with pytest.raises(InputError, match=r"no sample 's/61'\. Did you mean s/"):
        choose_samples(record, ids=["s/0", "s/61"])
    with pytest.raises(InputError, match="and 20 more"):
        choose_samples(record, ids=["elsewhere"])
    with pytest.raises(InputError, match="wrong on every clean image"):
        choose_samples(made("ww"))
    with pytest.raises(InputError, match="at most 100"):
        choose_samples(made("r" * 200), count=101)


@pytest.mark.parametrize("spec", ["os:getcwd", "os:getcwd+visual:x", "python object", "m"])
def test_a_record_has_no_code_run(spec):
    model = made("b").model.model_copy(update={"source": spec})
    with pytest.raises(InputError, match="say so: --weights SPEC"):
        load_model_of(in_suite(made("b"), model=model))


def test_the_model_must_be_the_records():
    with pytest.raises(InputError, match="not the model of the record"):
        load_model_of(made("b"), "tiny-clip")
    with pytest.raises(InputError, match="no model 'tiny-clap'"):
        load_model_of(made("b"), "tiny-clap")


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected \.html or \.png"):
        write_gallery(gallery_of(broken()), tmp_path / "x.gif")


def test_an_entry_through_the_command_line(here: Cli, tmp_path, short_attacks):
    threat = "apgd-pair linf 8/255"
    record = choose_record(read_entry(ENTRY).records, task="digits/digit", threat=threat)
    attacked = [sample for sample in record.samples if sample.clean_correct]
    names = [next(s.id for s in attacked if s.robust is robust) for robust in (True, False)]
    options = ("--task", "digits/digit", "--threat", threat, "--samples", ",".join(names))
    done = here("show", ENTRY, "--gallery", *options)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "gallery.html").read_text("utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == names
    assert "robust: the attack found nothing" in text
    assert "the re-attack differs" not in text
    options = ("--task", "digits/retrieval", "--random", "1", "--out", "x.png")
    done = here("show", ENTRY, "--gallery", *options)
    assert done.returncode == 0, done.stderr
    assert "teacher-robust on digits/retrieval" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_a_suite_of_ones_own(here: Cli, tmp_path):
    (tmp_path / "tiny-v1.toml").write_text(SUITE)
    done = here("run", "tiny-v1.toml", "--model", "tiny-clip", "--n", "2", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert_sentence(here("show", "runs", "--gallery"), "'tiny-v1', which does not ship")
    done = here("show", "runs", "--gallery", "--suite", "tiny-v1.toml")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 samples of tiny-v1+n2" in done.stdout
    (tmp_path / "tiny-v1.toml").write_text(SUITE.replace("seed = 3", "seed = 4"))
    done = here("show", "runs", "--gallery", "--suite", "tiny-v1.toml")
    assert_sentence(done, "another suite 'tiny-v1+n2' than tiny-v1.toml")


def test_bad_input_is_a_sentence(here: Cli, tmp_path):
    made("rb").save(tmp_path / "x.json")
    assert_sentence(here("show", "x.json", "--gallery", "--out", "x.pdf"), "neither a page")
    assert_sentence(here("show", "x.json", "--gallery", "--samples", "s/9"), "no sample 's/9'")
    assert_sentence(here("show", "x.json", "--gallery"), "loaded as data", "--weights")
    for option in ("--task", "--samples", "--seed", "--out"):
        assert_sentence(here("show", "x.json", option, "1"), f"{option} is for a gallery")
    assert here("show", "x.json", "--gallery", "--json").returncode == 2

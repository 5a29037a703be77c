"""The levels on honest entries, what is printed and written down."""

import json
import re
import shutil
import sys
from types import ModuleType

import pytest

from mmtard_bench.leaderboard.entries.breaks import read_breaks
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.entries.verifications import read_verifications
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.records.schema import SuiteFacts
from tests.conftest import assert_sentence
from tests.leaderboard.verify import forge


@pytest.mark.parametrize("name", ["weak", "strong", "curve"])
def test_honest_entries_pass_every_level(here, copy, name):
    done = here("verify", copy(name), "--level", "reproduced", "--reattack", 8, "--seed", 5)
    assert done.returncode == 0, done.stderr
    for word in ("well-formed: 2 records", "replayed:", "re-attacked:", "reproduced:", "seed 5"):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith(f"{name}: reproduced")


def test_without_options_it_is_replayed(here, copy):
    done = here("verify", copy("weak"))
    assert "at most 0 of a record differ" in done.stdout
    assert "re-attacked" not in done.stdout


def test_well_formed_needs_no_model(here, copy):
    folder = copy("weak")
    done = here("verify", folder, "--level", "well-formed", "--weights", "there-is-none")
    assert done.returncode == 0, done.stderr
    assert_sentence(here("verify", folder, "--weights", "there-is-none"), "does not run code")


def test_a_seed_is_chosen_and_printed(here, copy):
    folder = copy("strong")
    seeds = set()
    for _ in range(2):
        done = here("verify", folder, "--reattack", 1)
        seeds.add(re.search(r"seed (\d+):", done.stdout)[1])
    assert len(seeds) == 2


def test_what_was_drawn_and_what_that_says(here, copy):
    done = here("verify", copy("strong"), "--reattack", 4, "--seed", 0)
    line = next(line for line in done.stdout.splitlines() if "digits/digit linf" in line)
    assert "0 of 4 broken by cw-linf-5" in line
    assert "overstated by at most" in line
    assert "10 points would be caught with" in line


def test_an_entry_that_is_refused_costs_no_other_its_turn(here, copy):
    weak, strong = copy("weak"), copy("strong")
    forge.rewrite(weak, forge.each(seed=5))
    done = here("verify", weak, strong, "--level", "well-formed")
    assert_sentence(done, f"{weak} is refused", "disagree on the seed")
    assert "strong: well-formed" in done.stdout


def test_levels_are_written_down_sorted_and_once(here, copy):
    weak, strong = copy("weak"), copy("strong")
    path = weak.parent.parent / "verification.json"
    for level, name in (("replayed", "B"), ("well-formed", "A"), ("replayed", "B")):
        options = ("--level", level, "--record", "--by", name)
        assert here("verify", strong, weak, *options).returncode == 0
    found = read_verifications(path)
    assert [(v.entry, v.level, v.by) for v in found] == [
        ("strong", "well-formed", "A"),
        ("strong", "replayed", "B"),
        ("weak", "well-formed", "A"),
        ("weak", "replayed", "B"),
    ]
    assert found[0].records == read_entry(strong).runs[0].digest
    assert len(path.read_text().splitlines()) == 6


def test_a_refused_entry_is_not_written_down(here, copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.each(seed=5))
    assert here("verify", folder, "--record", "--by", "me").returncode == 2
    assert not (folder.parent.parent / "verification.json").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--record",), "--by"),
        (("--by", "me"), "--record"),
        (("--record", "--by", "<b>me</b>"), "U+003C"),
        (("--reattack", 4, "--level", "replayed"), "goes beyond"),
        (("--adversarials", "none"), "not a file of adversarial images"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_options_that_do_not_go_together(here, copy, options, word):
    assert_sentence(here("verify", copy("weak"), *options), word)


def test_a_model_that_fails_is_a_sentence(here, copy, monkeypatch):
    from mmtard_bench.models.clip import Clip

    def fails(*_):
        raise RuntimeError("kernel\nstack")

    monkeypatch.setattr(Clip, "image_features", fails)
    assert_sentence(here("verify", copy("weak")), "The model of 'weak' fails: RuntimeError: kernel")


def attack_file(here, folder, name="a.safetensors"):
    """Images that break what an entry's records call broken."""
    done = here("submit", folder, "--name", "x", "--entries", "out/entries", "--adversarials", name)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def stronger(here, copy):
    """An entry that calls five samples robust which images in a file break."""
    folder = copy("weak")
    attack_file(here, folder)
    forge.rewrite(folder, forge.samples(lambda some: forge.overstated(some, 5)))
    return folder


def test_a_stronger_attack_is_written_down_with_credit(here, stronger):
    entry = read_entry(stronger)
    robust = {s.id for s in entry.records[0].samples if s.robust}
    command = ("break", stronger, "--adversarials", "a.safetensors", "--by", "A. Breaker")
    done = here(*command, "--paper", "https://example.org/paper")
    assert done.returncode == 0, done.stderr
    (found,) = read_breaks(stronger.parent.parent / "breaks")
    assert (found.entry, found.suite, found.by) == ("weak", "small-v1", "A. Breaker")
    assert found.model == entry.card.digest
    (fallen,) = found.fallen
    assert (fallen.task, fallen.norm, fallen.eps) == ("digits/digit", "linf", "8/255")
    assert set(fallen.ids) == robust
    assert len(robust) == 5
    # The same images again, under another name, are no news.
    again = (*command[:-1], "Somebody Else")
    assert_sentence(here(*again), "no earlier break names")
    names = [path.name for path in (stronger.parent.parent / "breaks").iterdir()]
    assert names == ["weak--a.-breaker.json"]


def test_a_break_is_of_weights_and_outlives_other_records_of_them(here, stronger):
    command = ("break", stronger, "--adversarials", "a.safetensors", "--by", "me")
    assert here(*command, "--images", "https://example.org/a.safetensors").returncode == 0
    forge.rewrite(stronger, forge.each(seconds=1.0))
    assert_sentence(here(*command), "no earlier break names")


def test_images_that_break_nothing_new_are_refused(here, copy):
    folder = copy("weak")
    attack_file(here, folder)
    done = here("break", folder, "--adversarials", "a.safetensors", "--by", "me")
    assert_sentence(done, "No image of a.safetensors breaks a sample")
    assert not (folder.parent.parent / "breaks").exists()


def test_images_for_another_model_are_refused(here, copy):
    attack_file(here, copy("weak"))
    done = here("break", copy("strong"), "--adversarials", "a.safetensors", "--by", "me")
    assert_sentence(done, "has images for the weights")


@pytest.mark.parametrize(
    ("option", "value"), [("--by", "<img>"), ("--paper", "javascript:alert(1)"), ("--by", "")]
)
def test_credit_that_formats_is_refused(here, copy, option, value):
    folder = copy("weak")
    words = {"--adversarials": "a.safetensors", "--by": "me", option: value}
    done = here("break", folder, *(word for pair in words.items() for word in pair))
    assert_sentence(done, f"{option} ", "is not allowed")


def test_an_image_in_a_ball_breaks_the_larger_ones_too(here, copy):
    folder = copy("curve")
    attack_file(here, folder)

    def called_robust(records):
        """Broken at 2/255, which the file has images for, but robust at 6/255, it is said."""
        small, large = sorted(records, key=lambda record: record.threat.eps)
        broken = [s.id for s in small.samples if s.broken_by is not None][:1]
        both = [
            forge.forged(r, samples=[forge.robust(s) if s.id in broken else s for s in r.samples])
            for r in (large, small)
        ]
        # At the smaller radius such a sample is not attacked again.
        taken = {s.id for s in both[0].samples if s.robust or not s.clean_correct}
        free = {"forward": 0, "backward": 0}
        rows = [s.model_copy(update=free) if s.id in taken else s for s in both[1].samples]
        return [both[0], forge.forged(both[1], samples=rows)]

    forge.rewrite(folder, called_robust, "bent-v1")
    done = here("break", folder, "--adversarials", "a.safetensors", "--by", "me")
    assert done.returncode == 0, done.stderr
    (found,) = read_breaks(folder.parent.parent / "breaks")
    assert {fallen.eps for fallen in found.fallen} == {"2/255", "6/255"}


def test_stored_images_are_replayed(here, copy):
    folder = copy("weak")
    done = here(
        "submit", folder, "--name", "weak", "--entries", folder.parent, "--adversarials", "a.st"
    )
    assert done.returncode == 0, done.stderr
    digest = json.loads((folder / "card.json").read_text())["adversarials"]
    assert digest in done.stdout
    broken = sum(s.broken_by is not None for s in read_entry(folder).records[0].samples)
    assert "give --adversarials FILE" in here("verify", folder).stdout
    done = here("verify", folder, "--adversarials", "a.st")
    assert done.returncode == 0, done.stderr
    assert f"{broken} adversarial images in ball and box" in done.stdout
    # Images of samples that the entry now calls robust.
    forge.rewrite(folder, forge.samples(lambda some: forge.overstated(some, 1)))
    assert_sentence(
        here("verify", folder, "--adversarials", "a.st"), "which the entry calls robust"
    )


def test_another_file_than_the_cards_is_refused(here, copy):
    folder = copy("weak")
    attack_file(here, folder)
    done = here("verify", folder, "--adversarials", "a.safetensors")
    assert_sentence(done, "is not the file of the entry 'weak'")


def test_a_suite_that_ships_no_more_is_refused(here, copy):
    folder = copy("weak")
    facts = SuiteFacts(name="gone-v1", protocol=None, digest="1" * 64, records=2)
    forge.rewrite(folder, forge.each(suite=facts))
    (folder / "small-v1.json").rename(folder / "gone-v1.json")
    assert_sentence(here("verify", folder), "which does not ship")


def test_a_number_of_parameters_that_the_weights_do_not_have_is_refused(here, copy):
    folder = copy("weak")
    (one, *_) = read_entry(folder).records
    # The records first: an entry is read only where card and records agree.
    forge.rewrite(folder, forge.each(model=one.model.model_copy(update={"parameters": 7})))
    card = folder / "card.json"
    card.write_text(
        card.read_text().replace(f'"parameters": {one.model.parameters}', '"parameters": 7')
    )
    assert_sentence(here("verify", folder), "7 parameters", f"have {one.model.parameters}")


@pytest.mark.parametrize("level", ["well-formed", "replayed"])
def test_weights_that_would_run_code_are_refused_at_every_level(here, copy, level):
    folder = copy("weak")
    (one, *_) = read_entry(folder).records
    forge.rewrite(folder, forge.each(model=one.model.model_copy(update={"source": "pip:main"})))
    card = folder / "card.json"
    card.write_text(
        card.read_text().replace(f'"weights": "{one.model.source}"', '"weights": "pip:main"')
    )
    assert_sentence(here("verify", folder, "--level", level), "'pip:main'", "does not run code")


def test_a_recipe_of_a_card_is_never_carried_out(here, copy, tmp_path, monkeypatch):
    """Neither in an entry's card, which has no room for one, nor in a checkpoint's."""
    called = []
    made = ModuleType("foreign")
    made.__getattr__ = called.append
    monkeypatch.setitem(sys.modules, "foreign", made)
    recipe = {"student": "foreign:make", "teachers": {"robust": "foreign:make"}}
    folder, weights = copy("seen"), tmp_path / "weights"
    shutil.copytree(WEIGHTS / "tiny-clip-small", weights)
    (weights / "card.json").write_text(json.dumps({"recipe_digest": "0" * 64, "recipe": recipe}))
    done = here("verify", folder, "--weights", f"local-dir:{weights}")
    assert done.returncode == 0, done.stderr
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "recipe": recipe}))
    assert_sentence(here("verify", folder), "the key 'recipe' is unknown")
    assert called == []

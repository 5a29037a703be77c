"""Attacks on the leaderboard itself. Each forger is competent: all hashes and figures follow."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation import checks
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.entries.folder import read_entries, read_entry
from mmtard_bench.leaderboard.verify.well_formed import require_formed
from mmtard_bench.records.black_box import BlackBox
from mmtard_bench.records.schema import Flag, SuiteFacts
from mmtard_bench.tasks.samples import load_task
from mmtard_bench.tasks.suites import load_suite
from tests.conftest import REPOSITORY, assert_sentence
from tests.leaderboard.verify import forge

FORMATTING = (
    "<script>alert(1)</script>",
    "![x](https://evil.example/x.png)",
    "`rm`",
    "a | b",
    "line\nbreak",
    "\x1b[2J",
    "right\u202eto left",
    "\u200bzero width",
)


def formed(folder: Path) -> None:
    for run in read_entry(folder).runs:
        require_formed(run)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        formed(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["weak", "strong", "curve"])
def test_an_honest_entry_is_well_formed(copy, name):
    formed(copy(name))


# -- verdicts ---------------------------------------------------------------------------------


def test_an_edit_without_new_hashes_is_noticed(copy):
    path = copy("weak") / "small-v1.json"
    text = path.read_text()
    verdicts = text.index('"verdicts":"') + len('"verdicts":"')
    assert text[verdicts] in "ax"
    path.write_text(text[:verdicts] + "." + text[verdicts + 1 :])
    refused(path.parent, "edited or cut short")


def test_aggregates_that_do_not_follow(copy):
    folder = copy("weak")

    def flattered(records):
        better = records[0].results.model_copy(update={"robust_accuracy": 0.99})
        return [records[0].model_copy(update={"results": better}), *records[1:]]

    forge.rewrite(folder, flattered)
    refused(folder, "aggregates do not follow")


def test_robust_implies_right_on_the_clean_image(copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.samples(lambda some: [forge.robust(sample) for sample in some]))
    refused(folder, "clean_correct contradicts its prediction")


def test_tampered_verdicts_are_caught_by_an_attack(here, copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.samples(lambda some: forge.overstated(some, 20)))
    assert here("verify", folder, "--device", "cpu").returncode == 0
    done = here("verify", folder, "--reattack", 16, "--seed", 3)
    assert_sentence(done, "16 of 16 samples", "overstates its robustness")


def test_tampered_verdicts_are_caught_by_running_again(here, copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.samples(lambda some: forge.overstated(some, 3)))
    done = here("verify", folder, "--level", "reproduced", "--seed", 3, "--reattack", 1)
    assert_sentence(done, "3 samples are robust for the entry alone")


def test_tampered_predictions_are_caught_by_a_clean_pass(here, copy):
    folder = copy("weak")

    def right(some):
        wrong = [sample.id for sample in some if not sample.clean_correct][:2]
        assert len(wrong) == 2
        return [
            forge.robust(s.model_copy(update={"prediction": s.label, "clean_correct": True}))
            if s.id in wrong
            else s
            for s in some
        ]

    forge.rewrite(folder, forge.samples(right))
    formed(folder)
    assert_sentence(here("verify", folder), "2 of 40 clean images", "may differ by rounding")


def test_a_curve_that_rises(copy):
    folder = copy("curve")

    def bent(records):
        small, large = sorted(records, key=lambda record: record.threat.eps)
        broken = [s.id for s in small.samples if s.broken_by is not None][:1]
        samples = [forge.robust(s) if s.id in broken else s for s in large.samples]
        return [small, forge.forged(large, samples=samples)]

    forge.rewrite(folder, bent, "bent-v1")
    refused(folder, "contradict those at larger radii")


# -- samples and suite ------------------------------------------------------------------------


def test_swapped_sample_ids(copy):
    folder = copy("weak")

    def swapped(some):
        one, other = some[0], some[1]
        return [
            one.model_copy(update={"id": other.id}),
            other.model_copy(update={"id": one.id}),
            *some[2:],
        ]

    forge.rewrite(folder, forge.samples(swapped))
    refused(folder, "samples of digits/digit are not those that small-v1 draws")


def test_an_easier_manifest(copy):
    """Other samples of the same data, all of them right and robust."""
    folder = copy("weak")
    suite = load_suite("small-v1")
    ids = load_task(suite.plan[0][0], n=40, seed=1).manifest.ids

    def easier(some):
        changes = [{"id": i, "prediction": s.label} for i, s in zip(ids, some, strict=True)]
        right = [s.model_copy(update=c) for s, c in zip(some, changes, strict=True)]
        return [forge.robust(s.model_copy(update={"clean_correct": True})) for s in right]

    forge.rewrite(folder, forge.samples(easier))
    refused(folder, "not those that small-v1 draws")


def test_fewer_samples(copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.samples(lambda some: some[:20]))
    refused(folder, "not those that small-v1 draws")


def test_labels_that_agree_with_the_predictions(copy):
    folder = copy("weak")

    def relabelled(some):
        right = [s.model_copy(update={"label": s.prediction, "clean_correct": True}) for s in some]
        pairs = zip(some, right, strict=True)
        return [s if s.clean_correct else forge.robust(other) for s, other in pairs]

    forge.rewrite(folder, forge.samples(relabelled))
    refused(folder, "disagree on the labels")


def suite_facts(**changes: object) -> SuiteFacts:
    suite = load_suite("small-v1")
    facts = {"name": suite.name, "protocol": suite.protocol, "digest": suite.digest, "records": 2}
    return SuiteFacts(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "1" * 64}, "another suite 'small-v1' than the one that ships"),
        ({"protocol": "robustvlm-v1"}, "disagree on the suite"),
        ({"records": 1}, "disagree on the suite"),
    ],
)
def test_a_wrong_suite(copy, changes, words):
    folder = copy("weak")
    forge.rewrite(folder, forge.each(suite=suite_facts(**changes)))
    refused(folder, words)


def test_a_suite_of_ones_own(copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.each(suite=suite_facts(name="easy-v1")))
    (folder / "small-v1.json").rename(folder / "easy-v1.json")
    refused(folder, "'easy-v1', which does not ship")


def test_a_record_taken_out(copy):
    folder = copy("weak")
    forge.rewrite(folder, lambda records: records[:1])
    refused(folder, "lacks 1 of the 2 records", "linf 8/255")


def test_a_record_put_in(copy):
    folder = copy("weak")

    def more(records):
        threat = records[0].threat.model_copy(update={"eps": "1/255"})
        return [*records, forge.forged(records[0], threat=threat)]

    forge.rewrite(folder, more)
    refused(folder, "adds 1 of the 2 records")


@pytest.mark.parametrize(
    ("what", "facts"),
    [
        ("task", {"data": "digits/train"}),
        ("task", {"templates": ["{}"]}),
        ("task", {"revision": "other"}),
        ("task", {"n_classes": 11}),
    ],
)
def test_another_task_under_its_name(copy, what, facts):
    folder = copy("weak")
    task = read_entry(folder).records[0].task.model_copy(update=facts)
    forge.rewrite(folder, forge.each(task=task))
    refused(folder, f"disagree on the {what}")


@pytest.mark.parametrize("change", [{"steps": 1}, {"loss": "none"}, {"edits": 0}])
def test_a_weaker_attack_under_its_name(copy, change):
    folder = copy("weak")

    def weaker(records):
        threat = records[0].threat
        threat = threat.model_copy(update={"parameters": {**threat.parameters, **change}})
        return [forge.forged(records[0], threat=threat), *records[1:]]

    forge.rewrite(folder, weaker)
    refused(folder, "disagree on the attack")


def test_an_attack_in_bfloat16_is_one_of_ours(copy):
    folder = copy("weak")

    def lower(records):
        threats = [r.threat for r in records]
        facts = [{**t.parameters, "attack_precision": "bfloat16"} for t in threats]
        threats = [
            t.model_copy(update={"parameters": p}) for t, p in zip(threats, facts, strict=True)
        ]
        return [forge.forged(r, threat=t) for r, t in zip(records, threats, strict=True)]

    forge.rewrite(folder, lower)
    formed(folder)


def test_a_lucky_seed(copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.each(seed=5))
    refused(folder, "disagree on the seed")


def test_a_failed_record(copy):
    folder = copy("weak")

    def failed(records):
        one = records[0].model_copy(update={"status": "error", "error": "oh", "results": None})
        return [one, *records[1:]]

    forge.rewrite(folder, failed)
    refused(folder, "finished records only")


# -- what a record says of itself -------------------------------------------------------------


def test_a_flag_that_the_model_must_have(here, copy, monkeypatch):
    folder = copy("weak")
    monkeypatch.setattr(checks, "_SCALES", (1e4, 1e5))
    assert_sentence(here("verify", folder), "lacks the flag 'unusual-logit-scale'")


def test_a_flag_that_the_samples_must_have(copy):
    folder = copy("weak")

    def unconfirmed(some):
        return [s.model_copy(update={"unconfirmed": s.broken_by is not None}) for s in some]

    forge.rewrite(folder, forge.samples(unconfirmed))
    refused(folder, "its flags do not follow from its samples")


def test_a_flag_of_ones_own(copy):
    folder = copy("weak")
    forge.rewrite(folder, forge.first(flags=[Flag(code="best-of-all", detail="truly")]))
    refused(folder, "the flag 'best-of-all' does not exist")


@pytest.mark.parametrize("when", ["2199-01-01T00:00:00+00:00", "today", "2026-01-01T00:00:00", ""])
def test_a_record_from_no_time(copy, when):
    folder = copy("weak")
    forge.rewrite(folder, forge.first(created=when))
    refused(folder, "expected a time in the past")


@pytest.mark.parametrize("text", FORMATTING)
@pytest.mark.parametrize("where", ["note", "flag", "environment", "preprocessing", "attack"])
def test_text_of_a_record_that_formats(copy, where, text):
    folder = copy("weak")

    def said(records):
        record = records[0]
        changes = {
            "note": {"notes": [text]},
            "flag": {"flags": [Flag(code="zero-gradients", detail=text)]},
            "environment": {
                "environment": record.environment.model_copy(update={"platform": text})
            },
            "preprocessing": {
                "model": record.model.model_copy(update={"preprocessing": {"x": {text: [1]}}})
            },
            "attack": {
                "samples": [
                    s.model_copy(update={"broken_by": text}) if s.broken_by else s
                    for s in record.samples
                ]
            },
        }
        return [forge.forged(record, **changes[where]), *records[1:]]

    forge.rewrite(folder, said)
    refused(folder, "is not allowed")


@pytest.mark.parametrize("text", FORMATTING)
@pytest.mark.parametrize("field", sorted(set(Card.model_fields) - {"parameters"}))
def test_text_of_a_card_that_formats(copy, field, text):
    folder = copy("weak")
    forge.recard(folder, **{field: [text] if field == "authors" else text})
    refused(folder, "The model card", "is not valid")


def test_a_class_name_that_was_edited_into_another_text(tmp_path):
    """A text attack's edits are the one place for free text: at most so many from the class's."""
    folder = tmp_path / "tiny-clip"
    shutil.copytree(REPOSITORY / "leaderboard" / "entries" / "tiny-clip", folder)

    def renamed(records):
        (place,) = [i for i, r in enumerate(records) if r.threat.attack == "text-charmer-k1"]
        record = records[place]
        some = list(record.samples)
        row = next(i for i, s in enumerate(some) if s.edit)
        edit = some[row].edit.model_copy(update={"original": "<b>", "adversarial": "<i>"})
        some[row] = some[row].model_copy(update={"edit": edit})
        records[place] = forge.forged(record, samples=some)
        return records

    forge.rewrite(folder, renamed, "text-v1")
    refused(folder, "does not belong to its class")


# -- names and files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/x", "a/b", "..", "a\\b", "Weak", "wéak", "we\u0430k", "a" * 65, "-x"],
)
def test_a_name_that_is_a_path_or_not_plain(here, copy, name):
    folder = copy("weak")
    board = here("submit", folder, f"--name={name}", "--entries", "out")
    assert_sentence(board, "cannot be the name of an entry")
    assert not Path("out").exists()
    forge.recard(folder, name=name)
    refused(folder, "The model card")


@pytest.mark.parametrize("name", ["../x-v1.json", "evil.sh", "Small-v1.json", "small.json"])
def test_files_that_do_not_belong(copy, name):
    folder = copy("weak")
    (folder / Path(name).name).write_text("{}")
    refused(folder, *([] if ".." in name else ["does not belong"]))


def test_a_link_out_of_the_entry(copy):
    folder = copy("weak")
    (folder / "small-v1.json").unlink()
    (folder / "small-v1.json").symlink_to("/etc/passwd")
    refused(folder, "not a plain file")


@pytest.mark.parametrize("file", ["card.json", "small-v1.json", "other-v1.json"])
def test_two_gigabytes(copy, file):
    folder = copy("weak")
    with (folder / file).open("ab") as sparse:
        os.truncate(sparse.fileno(), 2 * 2**30)
    started = time.monotonic()
    refused(folder, "2,147,483,648 bytes")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("other", ["Weak", "vveak", "w-eak", "we.ak"])
def test_names_that_differ_by_case_or_look_alike(copy, other):
    folder = copy("weak")
    twin = folder.parent / other
    twin.mkdir()
    for path in folder.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"look alike|cannot be the name"):
        read_entries(folder.parent)


# -- weights ----------------------------------------------------------------------------------


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.mkdir, (str(Path("ran").absolute()),)


def test_a_pickle_with_code_is_not_run(here, copy):
    folder = copy("weak")
    source = mb.models.tiny.WEIGHTS / "tiny-clip-small"
    local = Path("weights")
    local.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (local / path.name).write_bytes(path.read_bytes())
    evil = pickle.dumps({"visual.x": Code()})
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.bin", "evil.pt"):
        (local / name).write_bytes(evil)
    pickle.loads(evil)
    assert Path("ran").is_dir()  # such a pickle does run
    Path("ran").rmdir()
    for spec in (
        "local-dir:weights",
        "ViT-B-32:weights/evil.pt",
        "tiny-clip-small+visual:weights/evil.pt",
        "transformers:weights",
    ):
        done = here("verify", folder, "--weights", spec)
        assert_sentence(done, "is refused")
        assert not Path("ran").exists(), spec


@pytest.mark.parametrize("whose", ["card", "verifier"])
def test_weights_that_are_a_function_are_not_called(here, copy, whose):
    """A card may say "os:getcwd": it has no dot, so it looks like an architecture and a tag."""
    folder = copy("weak")
    Path("evilmodule.py").write_text("import os\nos.mkdir('ran')\ndef make(): pass\n")
    spec = "evilmodule:make"
    extra = ["--weights", spec]
    if whose == "card":
        model = read_entry(folder).records[0].model.model_copy(update={"source": spec})
        forge.rewrite(folder, forge.each(model=model))
        text = (folder / "card.json").read_text()
        assert '"weights": "student-clean-ft"' in text
        (folder / "card.json").write_text(text.replace("student-clean-ft", spec))
        extra = []
    done = here("verify", folder, *extra)
    assert_sentence(done, "does not run code of an entry")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "weights",
    ["local-dir:/x", "package.module:factory", "../x", "hf-hub:a/../b", "hf-hub:../../x", "a:b/c"],
)
def test_weights_of_a_card_that_are_paths_or_code(copy, weights):
    folder = copy("weak")
    forge.recard(folder, weights=weights)
    refused(folder, "weights that anybody can get")


def test_other_weights_than_the_cards(here, copy):
    done = here("verify", copy("weak"), "--weights", "student-tecoa")
    assert_sentence(done, "is not the model of the entry 'weak'")


def test_preprocessing_that_is_not_the_models(here, copy):
    folder = copy("weak")

    def other(records):
        model = records[0].model
        values = {**model.preprocessing, "mean": [0, 0, 0]}
        other = model.model_copy(update={"preprocessing": values})
        return [forge.forged(record, model=other) for record in records]

    forge.rewrite(folder, other)
    assert_sentence(here("verify", folder), "the preprocessing of the record")


def test_prompts_that_are_not_the_models(here, copy):
    folder = copy("weak")
    task = read_entry(folder).records[0].task.model_copy(update={"prompts_digest": "0" * 64})
    forge.rewrite(folder, forge.each(task=task))
    formed(folder)
    assert_sentence(here("verify", folder), "the prompts of the record")


def test_json_that_is_too_deep_is_a_sentence(copy):
    folder = copy("weak")
    (folder / "small-v1.json").write_text("[" * 100_000)
    refused(folder, "edited or cut short")
    (folder / "card.json").write_text(json.dumps([1]))
    refused(folder, "The model card")


# -- the check without gradients --------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"drawn": 8, "broken": 5}, "flags do not follow"),
        ({"drawn": 2, "broken": 0}, "drew 2 samples"),
        ({"drawn": 40, "broken": 0}, "drew more samples than are robust"),
    ],
)
def test_a_check_without_gradients_that_is_edited(copy, check, message):
    folder = copy("strong")
    box = BlackBox(attack="square-100", **check)
    forge.rewrite(
        folder, lambda records: [r.model_copy(update={"black_box": box}) for r in records]
    )
    refused(folder, message)

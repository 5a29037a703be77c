"""The command eval: one task, threat models by option, the table of run."""

import json

import pytest

import mmtard_bench as mb
from tests.conftest import assert_sentence

EVAL = ("eval", "--task", "digits/digit", "--threat", "pgd-3", "--eps", "2/255", "--n", "6")


def test_eval_scores_what_evaluate_scores(here):
    done = here(*EVAL, "--eps", "4/255", "--model", "tiny-clip", "--json", "--seed", "3")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [
        mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-3", eps=eps, n=6, seed=3)
        for eps in ("2/255", "4/255")
    ]
    assert [record["identity"] for record in records] == [one.identity for one in expected]
    for record, one in zip(records, expected, strict=True):
        assert [s["robust"] for s in record["samples"]] == [s.robust for s in one.samples]


def test_models_from_a_file_and_one_that_fails(here, tmp_path):
    (tmp_path / "models.txt").write_text("# ours\ntiny-clip\n\nnowhere-clip  # a slip\n")
    done = here(*EVAL, "--models-from", "models.txt", "--model", "teacher-robust", "--out", "found")
    assert done.returncode == 2
    assert "nowhere-clip" in done.stderr
    assert "tiny-clip on digits/digit" in done.stdout
    assert {record.model.name for record in mb.records(tmp_path / "found")} == {
        "tiny-clip",
        "teacher-robust",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["No model is given", "--models-from"]),
        (["--models-from", "none.txt"], ["none.txt", "cannot be read"]),
        (["--model", "tiny-clip", "--eps", "0.1"], ["'0.1'", "exact positive fraction"]),
        (["--model", "tiny-clip", "--threat", "pdg-3"], ["no attack 'pdg-3'", "pgd-{steps}"]),
        (["--model", "tiny-clip", "--task", "digits/digits"], ["no task 'digits/digits'"]),
        (["--model", "tiny-clip", "--n", "0"], ["'0'", "at least 1"]),
    ],
)
def test_slips(here, arguments, words):
    assert_sentence(here(*EVAL, *arguments), *words)


def test_limit_is_another_name_for_n_that_no_help_shows(here):
    assert here(*EVAL[:-2], "--limit", "2", "--model", "tiny-clip").returncode == 0
    assert "--limit" not in here("run", "--help").stdout


def test_the_help_has_every_command_in_a_group(here):
    text = here("--help").stdout
    for command in ("run", "eval", "train", "compare", "submit", "break", "leaderboard"):
        assert f"\n  {command} " in text
    assert text.index("Score models:") < text.index("Train students:") < text.index("Leaderboard:")

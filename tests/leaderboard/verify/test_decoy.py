"""An entry whose weights mislead gradients, with records that hide the flags of the evaluation."""

from typing import get_args

import pytest

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.checks import SampleCode
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.verify.reattacked import reattack
from mmtard_bench.leaderboard.verify.well_formed import require_formed
from tests.cheats.models import checker
from tests.conftest import assert_sentence
from tests.leaderboard.verify.forge import CPU, entry, forged, run


@pytest.fixture
def decoy(tmp_path):
    """The spec of the weights, and the folder of the entry."""
    spec = checker(tmp_path / "decoy")
    hidden = [
        forged(record, flags=[flag for flag in record.flags if flag.code in get_args(SampleCode)])
        for record in run(spec, "small-v1")
    ]
    assert all(record.robust_accuracy > 0.5 for record in hidden)
    return spec, entry(tmp_path / "board" / "entries", hidden, "decoy", weights="hf-hub:me/decoy")


def test_a_replay_finds_the_flags_that_the_records_hide(decoy, here):
    spec, folder = decoy
    done = here("verify", folder, "--weights", spec)
    assert_sentence(done, "lacks the flag", "gradient-does-not-predict")


def test_square_breaks_what_gradients_do_not(decoy):
    spec, folder = decoy
    formed = require_formed(read_entry(folder).runs[0])
    told = []
    with pytest.raises(InputError, match="overstates its robustness"):
        reattack([formed], mb.load_model(spec), CPU, count=16, seed=3, tell=told.append)
    assert "and square-500 and other gradients" in told[0]

"""What only running a suite again can find."""

from types import SimpleNamespace

import pytest

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.verify import reproduced
from mmtard_bench.records.recall import Ranks
from mmtard_bench.records.schema import Flag
from tests.conftest import assert_sentence
from tests.leaderboard.test_leaderboard import made
from tests.leaderboard.verify import forge


def test_retrieval_comes_again(here, copy):
    done = here("verify", copy("seen"), "--level", "reproduced", "--reattack", "1")
    assert done.returncode == 0, done.stderr
    assert "seen: reproduced" in done.stdout


def test_recalls_under_attack_that_nobody_finds_again_are_refused(here, copy):
    folder = copy("seen")

    def unharmed(some):
        """As if no attack had moved a caption."""
        return [
            sample.model_copy(
                update={
                    "ranks": Ranks(
                        image=sample.ranks.image,
                        captions=tuple((p, clean, clean) for p, clean, _ in sample.ranks.captions),
                    )
                }
            )
            for sample in some
        ]

    forge.rewrite(folder, forge.samples(unharmed), "seen-v1")
    assert here("verify", folder).returncode == 0
    assert_sentence(
        here("verify", folder, "--level", "reproduced", "--reattack", "1"), "text_to_image_attacked"
    )


def test_verdicts_that_make_an_entry_look_worse_are_refused(here, copy):
    folder = copy("strong")

    def fallen(some):
        lost = [sample.id for sample in some if sample.robust][:5]
        assert len(lost) == 5
        return [
            s.model_copy(update={"robust": False, "broken_by": "pgd-5"}) if s.id in lost else s
            for s in some
        ]

    forge.rewrite(folder, forge.samples(fallen))
    done = here("verify", folder, "--level", "reproduced", "--seed", "1")
    assert_sentence(done, "5 samples are robust here alone", "understates")


def test_a_flag_that_the_verdicts_give_cannot_be_hidden():
    flag = Flag(code="square-beats-gradients", detail="3 of 9")
    here, entry = made("rb", flags=[flag]), made("rb")
    reproduced._require_flags(SimpleNamespace(name="t pgd", record=here), entry)
    with pytest.raises(InputError, match="lacks the flag 'square-beats-gradients': 3 of 9"):
        reproduced._require_flags(SimpleNamespace(name="t pgd", record=entry), here)

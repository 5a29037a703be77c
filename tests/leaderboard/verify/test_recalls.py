"""Recalls under attack that a record claims, against a new attack on some of its images."""

from dataclasses import replace

import pytest

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.verify.bounds import limit_of_claim
from mmtard_bench.leaderboard.verify.recalls import Claim, attack_recalls, require_recalls
from mmtard_bench.leaderboard.verify.well_formed import require_formed
from mmtard_bench.records.recall import Ranks
from tests.conftest import REPOSITORY
from tests.leaderboard.verify.forge import CPU

ENTRIES = REPOSITORY / "leaderboard" / "entries"


def unharmed(some):
    """As if no attack had moved a caption, nor an image further than to rank 2."""
    return [
        sample.model_copy(
            update={
                "ranks": Ranks(
                    image=(sample.ranks.image[0], min(sample.ranks.image[1], 2)),
                    captions=tuple((p, clean, clean) for p, clean, _ in sample.ranks.captions),
                )
            }
        )
        for sample in some
    ]


def formed(folder):
    return require_formed(read_entry(folder).runs[0])


def test_recalls_of_which_the_attack_left_next_to_nothing():
    """tiny-clip has 2% text-to-image recall at 1 under PGD; the forged record says 100%."""
    whole = require_formed(read_entry(ENTRIES / "tiny-clip").only("retrieval-v1").runs[0])
    (honest,) = [place for place in whole.places if place.threat.attack == "pgd-20"]
    bent = honest.record.model_copy(update={"samples": unharmed(honest.record.samples)})
    clip, told = mb.load_model("tiny-clip"), []

    def check(place):
        run = replace(whole, places=(place,))
        return require_recalls(run, clip, CPU, count=16, seed=1, tell=told.append)

    assert check(honest).startswith("; recalls overstated by at most")
    assert "claims missed by a new attack" in told[0]
    with pytest.raises(InputError, match=r"15 of 16 claims missed.*overstates its recalls"):
        check(replace(honest, record=bent))


def test_with_the_seed_of_the_record_and_all_images_nothing_is_missed(copy, monkeypatch):
    """The ranks among all drawn images are then those of the record."""
    (place,) = formed(copy("seen")).places
    monkeypatch.setattr(
        "mmtard_bench.leaderboard.verify.recalls.random.Random.getrandbits", lambda *_: 0
    )
    monkeypatch.setattr(
        "mmtard_bench.leaderboard.verify.recalls.random.Random.sample", lambda _, ids, count: ids
    )
    clip = mb.load_model("tiny-clip-small")
    claims = attack_recalls(place, clip, CPU, count=16, seed=0)
    recalls = place.record.results.recalls
    for claim in claims:
        which = claim.direction.replace(" ", "_") + "_attacked"
        index = (1, 5, 10).index(claim.cutoff)
        assert claim.answered / claim.total == getattr(recalls, which)[index]
        assert (claim.drawn, claim.missed) == (claim.answered, 0)
        assert claim.overstated == 0


def test_a_claim_knows_its_bound():
    claim = Claim("image to text", 5, total=100, answered=100, drawn=100, missed=30)
    assert claim.overstated == 0.3
    assert Claim("image to text", 5, total=100, answered=80, drawn=0, missed=0).overstated == 0.8


def test_few_misses_are_explained_and_many_are_not():
    assert limit_of_claim(0, 6) == 0
    for drawn in (5, 20, 60):
        assert 0.2 * drawn < limit_of_claim(drawn, 6) < 0.7 * drawn + 2

"""Radii are exact fractions, names are unique, unknown names get a hint."""

import pytest
from hypothesis import given, strategies as st

from mmtard_bench import registry
from mmtard_bench.errors import InputError
from mmtard_bench.registry import Registry, attack_family
from mmtard_bench.types import Eps, ThreatModel


@given(numerator=st.integers(1, 999_999), denominator=st.integers(1, 999_999))
def test_eps_keeps_the_fraction_as_written(numerator, denominator):
    eps = Eps.parse(f"{numerator}/{denominator}", norm="l2")
    assert str(eps) == f"{numerator}/{denominator}"
    assert float(eps) == numerator / denominator


@pytest.mark.parametrize(
    "text",
    ["0.031", "0", "8", "8/0", "0/255", "-8/255", "8.0/255", "", None, 0.03, 8, "\uff18/255"],
)
def test_anything_but_a_positive_fraction_is_refused(text):
    with pytest.raises(InputError, match="exact positive fraction"):
        Eps.parse(text)


@given(numerator=st.integers(1, 999_999), denominator=st.integers(1, 999_999))
def test_no_linf_radius_is_above_the_range_of_pixels(numerator, denominator):
    text = f"{numerator}/{denominator}"
    if numerator <= denominator:
        assert str(Eps.parse(text)) == text
        return
    for make in (lambda: Eps.parse(text), lambda: ThreatModel("pgd-1", "linf", text)):
        with pytest.raises(InputError, match=f'at most 1/1. For .* write "{numerator}/255"'):
            make()


def test_threat_models_have_names():
    eps = Eps.parse("8/255")
    assert ThreatModel("pgd-20", "linf", eps).name == "pgd-20 linf 8/255"
    assert ThreatModel("pgd-20", "linf", eps, "model").name == "pgd-20 linf 8/255 model"


@pytest.mark.parametrize("wrong", [{"norm": "l7"}, {"surface": "deep"}])
def test_threat_models_are_checked(wrong):
    facts = {"attack": "pgd-2", "norm": "linf", "eps": Eps.parse("8/255"), **wrong}
    with pytest.raises(InputError, match="does not fit; expected"):
        ThreatModel(**facts)


def test_a_name_is_registered_once():
    names: Registry[int] = Registry("number", "errors")
    names.add("one", 1)
    with pytest.raises(InputError, match="'one' is taken"):
        names.add("one", 2)
    assert names.get("one") == 1
    with pytest.raises(InputError, match="Did you mean one"):
        names.get("onne")
    with pytest.raises(InputError, match="Known: one"):
        names.get("zzzz")


@pytest.mark.parametrize(
    "name", ["pdg-20", "pgd", "pgd-{steps}", "pgd-0", "pgd--3", "autoattack", ""]
)
def test_unknown_attacks_are_refused(name):
    with pytest.raises(InputError):
        attack_family(name)


def test_attacks_with_steps_are_one_family():
    assert attack_family("pgd-20") == attack_family("pgd-7") == "pgd-{steps}"
    assert attack_family("autoattack-standard") == "autoattack-standard"


def test_everything_that_ships_is_registered():
    assert {"tiny-clip", "tiny-tecoa"} <= set(registry.models)
    assert {"digits/digit", "digits/unseen"} <= set(registry.tasks)
    assert {"digits/test", "digits/unseen"} <= set(registry.datasets)
    assert {"robustvlm-v1", "mmtard-imagenet-v1", "tecoa-v1", "rb-standard-v1"} <= set(
        registry.protocols
    )
    assert set(registry.attacks) >= {
        "pgd-{steps}",
        "cw-linf-{steps}",
        "cw-l2",
        "apgd-pair",
        "autoattack-standard",
        "autoattack-rand",
    }

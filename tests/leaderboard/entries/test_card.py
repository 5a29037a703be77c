"""Model cards: text of strangers that formats nothing and hides nothing."""

import json
import unicodedata

import pytest
from hypothesis import given, strategies as st

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.card import (
    Card,
    card_from_text,
    card_schema,
    card_to_text,
)
from tests.conftest import REPOSITORY

FACTS = {"name": "my-clip", "weights": "hf-hub:me/my-clip", "digest": "d"}
PLAIN = ("architecture", "pretraining_data", "finetuning_data", "training_threat", "licence")
PLAIN += ("contact",)
ALLOWED = st.characters(
    categories=["L", "Nd", "Po"], exclude_characters="\\\u1160\u115f\u3164\uffa0"
)


@given(values=st.lists(st.text(ALLOWED, min_size=1, max_size=20), min_size=6, max_size=6))
def test_cards_come_back(values):
    card = Card(**FACTS, authors=values, parameters=3, **dict(zip(PLAIN, values, strict=True)))
    assert card_from_text(card_to_text(card), "here") == card


EVIL = ["<b>", "a|b", "`x`", "[x](y)", "a\\b", "a\nb", "a\tb", "\x1b[2J", "a\u202eb", "a\u200bb"]
EVIL += ["a\u00adb", "a\u2028b", "a\u00a0b", "a\u3164", "a\ufe0f", "\u2800", "a\u034fb", " a", ""]
EVIL += ["a\ud800", "x" * 301]


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
@pytest.mark.parametrize("field", ["authors", *PLAIN])
def test_no_field_takes_what_formats_or_hides(field, evil):
    value = [evil] if field == "authors" else evil
    text = json.dumps({**FACTS, field: value})
    with pytest.raises(InputError, match="not valid"):
        card_from_text(text, "here")


@given(text=st.text(max_size=30))
def test_a_line_that_is_taken_shows_all_that_it_holds(text):
    try:
        card = card_from_text(json.dumps({**FACTS, "contact": text}), "here")
    except InputError:
        return
    assert card.contact == text
    assert not set("<>|`[]\\") & set(text)
    kinds = {unicodedata.category(c)[0] for c in text if c != " "}
    assert not kinds & {"C", "Z"}


ADDRESSES = ["http://a.org/x", "javascript:alert(1)", "https://a.org/(x)", 'https://a.org/"x', ""]
ADDRESSES += ["https://a.org/x y", "https://u:p@a.org/", "https://a.org/\u202e", "ftp://a.org", "x"]


@pytest.mark.parametrize("field", ["paper", "code"])
@pytest.mark.parametrize("address", ADDRESSES, ids=ascii)
def test_an_address_is_https_and_formats_nothing(field, address):
    with pytest.raises(InputError, match="not valid"):
        card_from_text(json.dumps({**FACTS, field: address}), "here")


ELSEWHERE = ["local-dir:x", "hf-hub:../x/y", "hf-hub:me/..", "pkg.module:make", "transformers:x"]
ELSEWHERE += ["tiny-clip+visual:x.pt", "https://a.org/w.pt", "hf-hub:me/my clip", "x\n", "../x", ""]
ELSEWHERE += ["ViT-B-32:/etc/x.pt", "ViT-B-32:x.pt", "hf-hub:m\u0435/clip", "hf-hub:x", "RN50:"]


@pytest.mark.parametrize(
    "weights",
    ["hf-hub:me/my-clip@v1.0", "transformers:me/x", "ViT-B-32:openai", "convnext_base:laion400m"],
)
def test_weights_from_a_hub_or_a_tag_are_taken(weights):
    assert Card(**{**FACTS, "weights": weights}).weights == weights


@pytest.mark.parametrize("weights", ELSEWHERE, ids=ascii)
def test_weights_are_where_anybody_gets_them(weights):
    with pytest.raises(InputError, match="not valid"):
        card_from_text(json.dumps({**FACTS, "weights": weights}), "here")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"name": "x"}', "[" * 100_000, json.dumps({**FACTS, "rank": 1})]
    + [json.dumps({**FACTS, "parameters": value}) for value in ("3", 3.5, -1, True)],
    ids=lambda text: ascii(text[:30]),
)
def test_what_is_no_card_is_a_sentence(text):
    with pytest.raises(InputError, match="The model card here is not valid"):
        card_from_text(text, "here")


def test_the_schema_that_editors_use_is_the_cards():
    kept = (REPOSITORY / "leaderboard" / "card.schema.json").read_text("utf-8")
    assert kept == card_schema(), (
        "python -m mmtard_bench.leaderboard.entries.card > leaderboard/card.schema.json"
    )
    schema = json.loads(kept)
    assert set(schema["properties"]) == {*Card.model_fields, "$schema"}
    assert schema["additionalProperties"] is False

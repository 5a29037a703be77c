"""The page and the plots as text: what they say, and that nothing in them gets out of its place."""

import base64
import hashlib
import json
import re
from xml.etree import ElementTree

from hypothesis import given, settings, strategies as st

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.build import build
from mmtard_bench.leaderboard.page.facts import page_facts
from mmtard_bench.leaderboard.page.plots import palette, plots
from mmtard_bench.leaderboard.reported import Reported
from mmtard_bench.records.statistics import wilson
from mmtard_bench.records.tables import percent
from tests.conftest import Cli, assert_sentence
from tests.leaderboard.page.boards import N, board, records
from tests.leaderboard.test_leaderboard import made

HOSTILE = ["</script><script>x", "<!--<script>", "]]>", "\u2028", "${x}", "$data", "&lt;", "a\nb"]


def data_of(page: str) -> dict[str, object]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text(min_size=1))
def test_no_text_leaves_its_place(name):
    text = name.encode("utf-8", "replace").decode()  # a record's file cannot hold half a character
    page = build(Board(loose=[made("rb", text)]))
    assert page.count("<script") == page.count("</script>") == 2
    assert data_of(page)["suites"][0]["rows"][0]["model"] == text


def test_only_its_own_script_and_style_may_run_and_nothing_is_fetched():
    page = build(board())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    for kind, tag in (
        ("script-src", "<script>(.*?)</script>"),
        ("style-src", "<style>(.*?)</style>"),
    ):
        (text,) = re.findall(tag, page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    assert set(re.findall(r"(?:src|href)=\"([^\"]*)\"", markup)) == {
        "data:,",
        "#main",
        "#/",
        "README.md",
    }
    assert "url(" not in page
    assert "innerHTML" not in page
    assert " style=" not in markup


def test_the_same_board_gives_the_same_bytes():
    assert build(board()) == build(board())
    assert plots(board()) == plots(board())


@settings(deadline=None)
@given(st.text("rb", min_size=1, max_size=60))
def test_figures_are_those_of_the_tables(outcomes):
    """Rounded like them, so that the page never says 81.3 where the tables say 81.2."""
    facts = page_facts(Board(loose=[made(outcomes)]))
    cell = facts["suites"][0]["rows"][0]["worst"]["linf 8/255"]
    value = outcomes.count("r") / len(outcomes)
    expected = [value, *wilson(outcomes.count("r"), len(outcomes))]
    assert [f"{figure:.1f}" for figure in cell] == [percent(share) for share in expected]


def test_a_model_has_its_card_history_and_credits():
    facts = page_facts(board())
    card = dict(facts["models"]["strong"]["card"])
    assert card["paper"] == ["https://example.org/paper"]
    assert card["authors"] == card["contact"] == []
    (seen,) = facts["models"]["strong"]["history"]
    assert (seen["level"], seen["by"], seen["current"]) == ("replayed", "A. Reader", True)
    # It was of other records, and so counts for nothing.
    assert not facts["models"]["middling"]["history"][0]["current"]
    rows = {row["model"]: row for row in facts["suites"][0]["rows"]}
    assert rows["strong"]["level"] == 1
    assert rows["middling"]["level"] is None
    assert rows["weak"]["credits"][0]["by"] == "B. Breaker"
    assert rows["weak"]["worst"]["linf 2/255"][0] == 100 * 6 / N
    assert [p[:2] for p in rows["strong"]["tasks"]["t"]["curves"]["pgd-5 linf"]] == [
        ["0", 100.0],
        ["2/255", 97.5],
        ["8/255", 87.5],
        ["16/255", 75.0],
    ]


def test_what_others_reported_is_marked():
    row = Reported(
        protocol="p-v1",
        model="other",
        hub="",
        backbone="B",
        method="M",
        train_eps="",
        metric="average",
        threat="clean",
        eps="",
        value="60.0",
        source="a README",
    )
    (table,) = page_facts(Board(reported=[row]))["reported"]
    assert table["title"] == "p-v1, average (reported)"
    assert dict(zip(table["headers"], table["rows"][0], strict=True))["status"] == "reported"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Of two colours, from 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_both_themes():
    colours = palette()
    assert contrast("#000000", "#ffffff") == 21
    assert len(colours) == 14
    grounds = [colours.pop(name) for name in ("paper", "panel")]
    del colours["line"]  # of grids and borders, which say nothing
    for name, shades in colours.items():
        for ground in grounds:
            for theme in (0, 1):
                assert contrast(shades[theme], ground[theme]) >= 4.5, (name, theme)


def test_plots_are_drawings_of_the_rows():
    (name,) = plots(board())
    assert name == "quick-v1-scatter.svg"
    root = ElementTree.fromstring(plots(board())[name])
    texts = [of.text for of in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"strong", "middling", "weak", "loose", "worst case linf 16/255, %"} <= set(texts)
    marks = [of for of in root.iter() if "transform" in of.attrib]
    assert len(marks) == 4 * (3 + 1)  # in each panel and in the legend
    assert plots(Board(loose=records("alone", 3, 2, 1))) == {}


def test_names_cannot_draw():
    hostile = [record for text in HOSTILE for record in records(text, 9, 5, 1)]
    (text,) = plots(Board(loose=hostile)).values()
    tags = {of.tag.partition("}")[2] for of in ElementTree.fromstring(text).iter()}
    assert tags == {"svg", "title", "style", "rect", "path", "text"}


def test_the_command_writes_the_page_and_notices_when_it_is_stale(here: Cli, tmp_path):
    for number, record in enumerate(records("mine", 30, 20, 10)):
        record.save(tmp_path / "runs" / f"{number}.json")
    command = ("leaderboard", "--records", "runs", "--output", "out/BOARD.md")
    assert here(*command).returncode == 0
    page = tmp_path / "out" / "index.html"
    assert not page.exists()
    assert here(*command, "--check").returncode == 0
    assert here(*command, "--check", "--html").returncode == 1
    assert here(*command, "--html").returncode == 0
    assert 'href="BOARD.md"' in page.read_text("utf-8")
    assert here(*command, "--check").returncode == 0
    page.write_text(page.read_text("utf-8").replace("75.0", "99.9"), "utf-8")
    done = here(*command, "--check")
    assert done.returncode == 1
    assert "index.html is stale" in done.stderr
    assert "--html" in done.stderr
    assert_sentence(here("leaderboard", "--records", "nowhere", "--html"), "no directory nowhere")

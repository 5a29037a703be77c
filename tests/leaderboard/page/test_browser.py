"""The page in a browser: it opens from disk, asks for nothing, and is usable without a mouse."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtard_bench.leaderboard.badges import LEGEND
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.build import build
from tests.conftest import REPOSITORY
from tests.leaderboard.page.boards import board, entry, records, verification

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Reader:
    """A page that is opened from disk, and everything that it complained of or fetched."""

    def __init__(self, browser: "playwright.Browser", path: Path, board: Board, **options: object):
        path.write_text(build(board), "utf-8")
        self.url = path.as_uri()
        self.page = browser.new_page(**options)
        self.heard: list[str] = []
        self.page.on("console", lambda message: self.heard.append(message.text))
        self.page.on("pageerror", lambda error: self.heard.append(str(error)))
        self.page.on("request", self._fetched)
        self.page.goto(self.url)

    def _fetched(self, request: "playwright.Request") -> None:
        if request.url.partition("#")[0] != self.url:
            self.heard.append(request.url)

    def models(self) -> list[str]:
        """Of the first table, in its order."""
        return self.page.locator("table").first.locator("tbody th").all_inner_texts()

    def go(self, path: str) -> None:
        self.page.goto(self.url + path)
        self.page.reload()  # so that the view is there when this returns


@pytest.fixture
def opened(browser, tmp_path, request) -> Iterator[Reader]:
    """The page at the size and in the theme that a test asks for."""
    options = {"viewport": {"width": 1280, "height": 800}, **getattr(request, "param", {})}
    reader = Reader(browser, tmp_path / "index.html", board(), **options)
    yield reader
    assert reader.heard == []  # no error, no warning, no request
    reader.page.close()


PHONE = {"viewport": {"width": 360, "height": 740}}
LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}


def test_a_table_is_sorted_and_filtered_with_the_keyboard(opened):
    page = opened.page
    assert opened.models() == ["strong", "middling", "loose", "weak"]
    header = page.get_by_role("columnheader", name="worst case linf 2/255").first
    header.get_by_role("button").focus()
    for key, order, first in (("Enter", "descending", "strong"), ("Space", "ascending", "weak")):
        page.keyboard.press(key)
        assert header.get_attribute("aria-sort") == order
        assert opened.models()[0] == first
    page.get_by_role("searchbox").focus()
    page.keyboard.type("MIDD")
    assert opened.models() == ["middling"]
    assert page.get_by_role("status").first.inner_text() == "1 of 4 models"
    assert page.locator(".point").count() == 1 + 4  # of one row: in the scatter, on its curve
    page.get_by_role("searchbox").fill("")
    page.get_by_role("checkbox").focus()
    page.keyboard.press("Space")
    assert opened.models() == ["strong"]


def test_tab_leads_everywhere_beginning_with_the_way_past_the_header(opened):
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "filter"
    seen = set()
    while (tag := page.evaluate("document.activeElement.tagName")) != "BODY":  # the last one was it
        seen.add(tag)
        # Marks of plots show it on themselves.
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == ("none" if tag == "a" else "solid")
        page.keyboard.press("Tab")
    assert seen == {"A", "BUTTON", "INPUT", "SELECT", "DIV", "SUMMARY", "a"}  # the last one of SVG
    page.locator(".point").first.focus()
    assert page.locator("figcaption").first.inner_text().startswith("strong: zero-shot average 100")


def test_a_point_leads_to_its_model_and_back(opened):
    page = opened.page
    page.locator(".point").first.focus()
    page.keyboard.press("Enter")
    heading = page.locator("h1")
    playwright.expect(heading).to_have_text("strong")
    playwright.expect(heading).to_be_focused()
    text = page.locator("main").inner_text()
    assert page.get_by_role("link", name="https://example.org/paper").count() == 1
    assert "not stated" in text
    assert "replayed on quick-v1, 2026-11-20, by A. Reader with 1.0: 31 of 31 images" in text
    assert page.locator("pre").inner_text() == "mmtard-bench run quick-v1 --model strong"
    page.go_back()
    playwright.expect(heading).to_have_text("quick-v1")
    assert opened.models()[0] == "strong"
    opened.go("#/model/weak")
    assert (
        "stronger attack by B. Breaker, 2026-11-21: broke 4 samples"
        in page.locator("main").inner_text()
    )
    opened.go("#/model/nobody")
    assert heading.inner_text() == "Not here"


def test_the_command_is_copied_or_selected(opened):
    opened.go("#/model/strong")
    opened.page.get_by_role("button", name="Copy").focus()
    opened.page.keyboard.press("Enter")
    said = opened.page.locator("main [role=status]")
    playwright.expect(said).not_to_be_empty()
    if said.inner_text() != "copied":
        assert opened.page.evaluate("String(getSelection())").startswith("mmtard-bench run")


def test_curves_have_a_point_a_radius(opened):
    assert opened.page.get_by_role("heading", name="Robust accuracy against eps").count() == 1
    lines = opened.page.locator("polyline")
    assert lines.count() == 4
    assert len(lines.first.get_attribute("points").split()) == 4
    assert lines.first.evaluate("line => getComputedStyle(line).fill") == "none"
    titles = opened.page.locator(".point title").all_text_contents()
    assert any(text.startswith("strong: 87.5 [") and "at eps 8/255" in text for text in titles)


@pytest.mark.parametrize("opened", [PHONE], indirect=True)
def test_nothing_sticks_out_on_a_phone(opened):
    for path in ("", "#/model/strong", "#/model/loose"):
        opened.go(path)
        opened.page.wait_for_timeout(100)  # charts are drawn for the width that there is
        width = opened.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, path
    opened.go("")
    box = opened.page.locator(".scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.evaluate("box => box.scrollLeft = 300")
    name = opened.page.locator("tbody th").first.bounding_box()
    assert 0 <= name["x"] <= 20


@pytest.mark.parametrize("width", [1280, 1265])  # without and with a scroll bar
def test_the_page_that_ships_has_no_column_cut_off_at_1280_pixels(browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    url = (REPOSITORY / "leaderboard" / "index.html").as_uri()
    page.goto(url)
    models = page.locator("tbody th a").first.get_attribute("href")
    links = page.locator("nav a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert len(links) > 3
    for path in [*links, models]:
        page.goto(url + path)
        page.reload()
        sizes = page.locator(".scroll").evaluate_all(
            "boxes => boxes.map(box => [box.ariaLabel, box.scrollWidth - box.clientWidth])"
        )
        assert len(sizes) > 0
        assert [label for label, beyond in sizes if beyond > 0] == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_the_drop_down_shows_the_ball_of_the_plot(opened):
    """At the start that is the ball that decides, here the last one of three."""
    page = opened.page
    axis = page.locator("figure svg text").filter(has_text="worst case").first
    assert page.locator("#ball").input_value() == "linf 16/255"
    assert axis.text_content() == "worst case linf 16/255, %"
    page.locator("#ball").select_option("linf 2/255")
    assert axis.text_content() == "worst case linf 2/255, %"


def test_badges_are_explained(opened):
    badge = opened.page.locator("td .badge", has_text="replayed").first
    assert badge.get_attribute("title").startswith("the published weights give the recorded")
    assert "good" in badge.get_attribute("class").split()
    legend = opened.page.locator("details")
    assert not legend.locator("dl").is_visible()
    legend.locator("summary").click()
    assert legend.locator("dt").count() == legend.locator("dd").count() == len(LEGEND)
    assert "a stronger attack broke these samples later" in legend.inner_text()
    about = opened.page.locator("#about")
    assert about.is_visible()
    opened.go("#/model/strong")
    assert not about.is_visible()


@pytest.mark.parametrize(("opened", "dark"), [(LIGHT, False), (DARK, True)], indirect=["opened"])
def test_the_theme_follows_the_system_until_the_button_is_pressed(opened, dark):
    """The button always names the other theme."""

    def require(dark: bool) -> None:
        name = "Light theme" if dark else "Dark theme"
        playwright.expect(button).to_have_text(name)
        ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")

    button = opened.page.locator("#theme")
    require(dark)
    opened.page.emulate_media(color_scheme="light" if dark else "dark")
    require(not dark)
    button.click()
    require(dark)
    opened.page.emulate_media(color_scheme="dark" if dark else "light")
    require(dark)
    button.click()
    require(not dark)


def test_text_of_strangers_runs_nothing(browser, tmp_path):
    """Built past every check of cards and records, as if all of those had failed."""
    run = "window.hacked = 1"
    name = f"</script><script>{run}</script><img src=x onerror='{run}'>"
    facts = {
        "authors": [f"<img src=x onerror='{run}'>"],
        "paper": f"javascript:{run}",
        "code": "https://example.org/' onclick='window.hacked = 1",
        "licence": "<!-- <script>",
    }
    hostile = Board(
        entries=[entry(name, 30, 20, 10, **facts)],
        loose=records("__proto__", 3, 2, 1),
        verifications=[verification("x").model_copy(update={"entry": name, "by": name})],
    )
    reader = Reader(browser, tmp_path / "index.html", hostile)
    page = reader.page
    assert reader.models() == [name, "__proto__"]
    page.get_by_role("link", name=name).first.click()
    heading = page.locator("h1")
    playwright.expect(heading).to_have_text(name)
    text = page.locator("main").inner_text()
    assert all(value in text for value in (*facts["authors"], facts["paper"], facts["licence"]))
    links = page.locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert all(link.startswith(("#", "https://example.org/")) for link in links)
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None
    reader.go("#/model/__proto__")
    assert heading.inner_text() == "__proto__"
    assert reader.heard == []
    page.close()


def test_without_scripts_it_points_to_the_tables(browser, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(build(board()), "utf-8")
    page = browser.new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    assert page.get_by_role("link", name="README.md").count() == 1
    page.close()

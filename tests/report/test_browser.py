"""The page in a real browser: nothing fetched, no complaints, tabs and sorting by mouse and by keyboard, dark and light."""

import json
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytest.importorskip("kaleido", reason="the extra `report` is not installed")

from browser import opened
from choreographer.browsers.chromium import Chromium

from pairquant.report.page import write_report

pytestmark = pytest.mark.skipif(not Chromium.find_browser(skip_local=False), reason="no Chrome or Chromium here")

DRAWN = "[...document.querySelectorAll('article:not([hidden]) .plot')].every(p => p.querySelector('.main-svg'))"
SHOWN = "[...document.querySelectorAll('article')].map(a => !a.hidden)"
TABLE = "document.querySelector('#panel-2 section:last-of-type table')"
ERRORS = f"[...{TABLE}.tBodies[0].rows].map(r => Number(r.cells[6].dataset.rank))"
SORT_ERRORS = f"{TABLE}.querySelectorAll('thead button')[6]"
FASTEST = "[...document.querySelectorAll('#panel-1 section')].at(-1).querySelector('tbody th').textContent"
SORT_SPEEDS = "[...document.querySelectorAll('#panel-1 section')].at(-1).querySelectorAll('thead button')[3]"
INK = "getComputedStyle(document.querySelector('article:not([hidden]) .plot .xtick text')).fill"


@pytest.fixture(scope="module")
def report(quick, trained, compared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    (directory / "compare.json").write_text(json.dumps(compared("big", quick, trained, "other")))
    write_report([quick, trained], directory / "report.html", results=[directory / "compare.json"])
    return directory / "report.html"


@pytest.fixture(scope="module")
def page(report):
    with opened(report) as page:
        page.prefer("light")
        page.wait_for(f"!!window.Plotly && {DRAWN}")
        yield page
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_tabs_follow_mouse_and_keyboard(page):
    assert page.value(SHOWN) == [True, False, False]
    page.value("document.querySelectorAll('[role=tab]')[1].click()")
    assert page.value(SHOWN) == [False, True, False]
    assert page.value(DRAWN)
    page.value("document.querySelector('[aria-selected=true]').focus()")
    for key, shown in (
        ("ArrowRight", 2),
        ("ArrowRight", 0),
        ("ArrowLeft", 2),
        ("Home", 0),
        ("End", 2),
        ("ArrowLeft", 1),
    ):
        page.press(key)
        assert page.value(SHOWN) == [place == shown for place in range(3)], key
        assert page.value("document.activeElement.getAttribute('aria-selected')") == "true", key


def test_a_column_sorts_down_and_up(page):
    unsorted = page.value(ERRORS)
    assert unsorted != sorted(unsorted, reverse=True)
    page.value(f"{SORT_ERRORS}.click()")
    assert page.value(ERRORS) == sorted(unsorted, reverse=True)
    page.value(f"{SORT_ERRORS}.focus()")
    page.press("Enter")
    assert page.value(ERRORS) == sorted(unsorted)
    assert page.value(f"{SORT_ERRORS}.closest('th').getAttribute('aria-sort')") == "ascending"


def test_every_table_sorts_by_itself(page):
    assert page.value(FASTEST) == "big"
    page.value(f"{SORT_SPEEDS}.click()")
    assert page.value(FASTEST) == "other"
    assert page.value("document.querySelectorAll('#panel-1 [aria-sort]').length") == 1


def test_figures_follow_the_system_and_the_switch(page):
    light = page.value(INK)
    page.prefer("dark")
    page.wait_for(f"{INK} !== '{light}'")
    page.value("document.getElementById('theme').click()")
    assert page.value(INK) == light


def test_nothing_is_wider_than_a_phone(page):
    page.resize(375, 800, mobile=True)
    for place in range(3):
        page.value(f"document.querySelectorAll('[role=tab]')[{place}].click()")
        page.wait_for(
            "[...document.querySelectorAll('article:not([hidden]) .main-svg')].every(s => s.clientWidth <= 375)"
        )
        assert page.value("document.documentElement.scrollWidth") == 375


def test_a_crowds_names_stand_beside_their_points_only_where_there_is_room(quick, compared, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(compared("big", *(f"model-{n}" for n in range(14)))))
    write_report([quick], tmp_path / "report.html", results=[tmp_path / "compare.json"])
    names = "document.querySelectorAll('[data-figure=compared-kl-by-bits] .textpoint text').length"
    with opened(tmp_path / "report.html") as page:
        page.resize(1280, 800)
        page.wait_for(f"!!window.Plotly && {DRAWN}")
        assert page.value(names) == 14
        page.resize(375, 800, mobile=True)
        page.value("document.getElementById('theme').click()")
        page.wait_for(f"{names} === 0")
        assert page.complaints == []


def test_figures_come_as_svg_and_png(quick, tmp_path):
    write_report([quick], tmp_path / "report.html", figures=tmp_path / "figures")
    names = ("angles", "errors", "magnitude", "pair", "scales", "seconds")
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files == {f"1-quick-{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        assert ET.parse(tmp_path / "figures" / f"1-quick-{name}.svg").getroot().tag.endswith("svg")
        assert (tmp_path / "figures" / f"1-quick-{name}.png").read_bytes().startswith(b"\x89PNG")

"""Figures as files: what is handed to the browser that draws them, and what is said when it cannot."""

import struct
import sys
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytest.importorskip("kaleido", reason="the extra `report` is not installed")

import kaleido
from choreographer.browsers.chromium import Chromium
from plotly import graph_objects as go

from pairquant.report.images import PNG_SCALE, WIDE, WIDTH, require_browser, write_images
from pairquant.report.style import Plot, layout, template
from pairquant.support.errors import ConfigError, ResourceError

PLOTS = {
    "narrow": Plot("kl", "Divergence", "Caption.", go.Figure(layout=layout(340, "bits", "KL")).add_scatter(y=[1, 2])),
    "wide": Plot(
        "kl", "All of them", "Caption.", go.Figure(layout=layout(560, "bits")).add_scatter(y=[1, 2]), wide=True
    ),
}


@pytest.fixture
def jobs(monkeypatch):
    """What the browser is asked to draw; it answers with the failures that are put into `jobs.failures`."""

    class Jobs(list):
        failures = ()

    asked = Jobs()

    def draw(given, kopts):
        asked.extend(given)
        asked.options = kopts
        return asked.failures

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", draw)
    return asked


def test_each_figure_is_asked_for_in_both_formats_under_its_key(jobs, tmp_path):
    write_images(PLOTS, tmp_path / "figures", template("light"))
    assert (tmp_path / "figures").is_dir()
    found = {job["path"].name: job["opts"] for job in jobs}
    assert set(found) == {f"{key}.{kind}" for key in PLOTS for kind in ("svg", "png")}
    for name, options in found.items():
        assert options["format"] == name.rpartition(".")[2]
        assert options["width"] == (WIDE if name.startswith("wide") else WIDTH)
        assert options["scale"] == (PNG_SCALE if name.endswith("png") else 1)
    assert found["wide.svg"]["height"] > PLOTS["wide"].figure.layout.height, "no room for the title"


def test_a_file_is_on_white_and_named_and_its_legend_is_below(jobs, tmp_path):
    write_images(PLOTS, tmp_path, template("light"))
    drawn = next(job["fig"]["layout"] for job in jobs if job["path"].name == "narrow.svg")
    assert drawn["paper_bgcolor"] == "white"
    assert drawn["title"]["text"] == "Divergence"
    assert drawn["template"] == template("light")
    assert drawn["legend"]["y"] < 0
    assert drawn["legend"]["yanchor"] == "top"
    go.Figure(next(job["fig"] for job in jobs))  # Plotly takes it


def test_the_figures_of_the_page_stay_as_they_are(jobs, tmp_path):
    before = PLOTS["narrow"].to_dict()
    write_images(PLOTS, tmp_path, template("light"))
    assert PLOTS["narrow"].to_dict() == before


def test_nothing_is_fetched_from_the_network(jobs, tmp_path):
    write_images(PLOTS, tmp_path, template("light"))
    assert jobs.options == {"mathjax": False}


def test_a_browser_that_fails_is_told_with_the_directory(jobs, tmp_path):
    jobs.failures = [RuntimeError("the tab crashed")]
    with pytest.raises(ResourceError, match=r"figures.*failed: the tab crashed"):
        write_images(PLOTS, tmp_path / "figures", template("light"))


def test_without_a_browser_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda cls, **_: None))
    with pytest.raises(ConfigError, match="none was found: install it .*BROWSER_PATH"):
        require_browser()
    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda cls, **_: "/usr/bin/chromium"))
    require_browser()


def test_without_kaleido_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ConfigError, match=r"pip install 'pairquant\[report\]'"):
        require_browser()


@pytest.mark.skipif(not Chromium.find_browser(skip_local=False), reason="no Chrome or Chromium here")
def test_a_browser_draws_them_at_the_size_that_was_asked_for(tmp_path):
    write_images(PLOTS, tmp_path, template("light"))
    for key, width in (("narrow", WIDTH), ("wide", WIDE)):
        png = (tmp_path / f"{key}.png").read_bytes()
        assert struct.unpack(">I", png[16:20]) == (PNG_SCALE * width,)
        root = ET.parse(tmp_path / f"{key}.svg").getroot()
        assert root.get("width") == str(width)
        assert PLOTS[key].title in "".join(root.itertext())

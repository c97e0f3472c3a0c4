"""The page: everything in one file, nothing fetched, the figures' numbers those of the facts, bad places refused first."""

import base64
import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.report import images
from pairquant.report.facts import gather
from pairquant.report.figures import checkpoint_plots, comparison_plots, strokes
from pairquant.report.page import write_report
from pairquant.report.style import strokes_of
from pairquant.support.errors import ConfigError, PairQuantError

MOST_BYTES = 5_000_000


class Markup(HTMLParser):
    """Every address and every style of a page, and the roles of its elements."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.styles, self.roles = [], [], set()
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [
            attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes
        ]
        self.styles.append(attributes.get("style", ""))
        self.roles.add(attributes.get("role"))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self.styles.append(data)


def values(array):
    """What Plotly has packed as base64."""
    dtypes = {"f4": torch.float32, "f8": torch.float64}
    return torch.frombuffer(bytearray(base64.b64decode(array["bdata"])), dtype=dtypes[array["dtype"]])


def plots_of(checkpoint):
    return {plot.key: plot.to_dict() for plot in checkpoint_plots(checkpoint, strokes_of([checkpoint.name]))}


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_figures_hold_the_facts(quick):
    facts = gather([quick]).checkpoints[0]
    plots = plots_of(facts)
    assert set(plots) == {"errors", "magnitude", "pair", "angles", "scales", "seconds"}
    before, after = plots["magnitude"]["data"]
    torch.testing.assert_close(values(before["y"]), facts.close_up.magnitude_before)
    torch.testing.assert_close(values(after["y"]), facts.close_up.magnitude_after)
    scattered = plots["pair"]["data"][1]
    torch.testing.assert_close(values(scattered["x"]), facts.close_up.points_after[:, 0])
    torch.testing.assert_close(values(scattered["y"]), facts.close_up.points_after[:, 1])
    heat = plots["errors"]["data"][0]
    for linear in facts.linears:
        shown = heat["z"][heat["y"].index(linear.kind)][heat["x"].index(linear.block)]
        assert shown == pytest.approx(100 * linear.error)


def test_training_is_drawn_through_both_stages(trained):
    facts = gather([trained]).checkpoints[0]
    lines = plots_of(facts)["training"]["data"]
    assert len(lines) == 4  # two blocks, validation and training
    assert lines[0]["x"] == [0, 1, 2, 2, 3, 4]
    assert lines[1]["y"] == [epoch.validation for epoch in facts.blocks[1].history]


def test_accuracy_is_set_against_bits(quick, trained, results):
    parts = [{"start": 0, "end": 10, "kl": 0.1}, {"start": 10, "end": 30, "kl": 0.3}]
    files = [
        results("a.json", quick, 5.0, {"wiki.txt": {"kl": 0.2, "kl_interval": [0.15, 0.3], "kl_by_position": parts}}),
        results("b.json", trained, 4.0, {"wiki.txt": {"kl": 0.4}}),
        results("c.json", "original", 16.0, {"wiki.txt": {}}),
    ]
    facts = gather([quick, trained], files)
    plots = {plot.key: plot.to_dict()["data"] for plot in comparison_plots(facts, strokes(facts))}
    assert set(plots) == {"kl-by-bits", "perplexity-by-bits", "errors-by-block", "kl-by-position"}
    (points,) = plots["kl-by-bits"]
    assert (points["x"], points["y"], points["text"]) == ([5.0, 4.0], [0.2, 0.4], ["quick", "trained"])
    assert points["error_y"]["array"] == pytest.approx([0.1, 0])
    (line,) = plots["kl-by-position"]
    assert (line["name"], line["x"], line["y"]) == ("wiki.txt", [5, 20], [0.1, 0.3])
    assert plots["perplexity-by-bits"][0]["x"] == [4.0, 5.0, 16.0]


def test_the_page_is_whole_and_small(quick, trained, results, tmp_path):
    evaluated = results("a.json", quick, 5.0, {"wiki.txt": {"kl": 0.1234}})
    write_report([quick, trained], tmp_path / "report.html", results=[evaluated])
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < MOST_BYTES
    markup = Markup(page)
    assert all(address.startswith("data:") for address in markup.addresses), markup.addresses
    assert not any(re.search(r"@import|url\(", style) for style in markup.styles)
    assert "tab" in markup.roles
    assert "0.1234" in page
    places = re.findall(r'data-figure="([^"]+)"', page)
    assert set(places) == set(data_of(page)["figures"])
    assert "1-quick-errors" in places
    assert "2-trained-training" in places


def test_a_page_needs_neither_source_nor_log_nor_results(quick, tmp_path):
    bare = shutil.copytree(quick, tmp_path / "bare")
    for name in ("pairquant.json", "pairquant.jsonl"):
        (bare / name).unlink()
    config = json.loads((bare / "config.json").read_text())
    del config["quantization_config"]["provenance"]
    (bare / "config.json").write_text(json.dumps(config))
    write_report([bare], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for remark in ("source (not recorded) is not on this machine", "No errors were recorded", "No log was kept"):
        assert remark in page
    assert "tab" not in Markup(page).roles
    assert {key.rpartition("-")[2] for key in data_of(page)["figures"]} == {"magnitude", "pair", "angles", "scales"}


def test_what_others_wrote_into_a_checkpoint_stays_text(quick, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    named = shutil.copytree(quick, tmp_path / "named")
    config = json.loads((named / "config.json").read_text())
    config["quantization_config"]["provenance"] |= {"preset": hostile, "calibration": [hostile]}
    (named / "config.json").write_text(json.dumps(config))
    write_report([named], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert html.escape(hostile) in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "report.txt"}, "must end in .html"),
        ({"output": "nowhere/report.html"}, "there is no directory"),
        ({"figures": "nowhere/figures"}, "there is no directory"),
        ({"figures": "file"}, "is a file"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        write_report(["no-such-model"], **options)


def test_what_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kaleido", None)
        with pytest.raises(ConfigError, match="needs? the package kaleido: pip install"):
            write_report(["no-such-model"], figures="figures")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "pairquant.report.figures")
        patch.delattr("pairquant.report.figures")
        patch.setitem(sys.modules, "plotly", None)
        with pytest.raises(ConfigError, match="needs the package plotly: pip install"):
            write_report(["no-such-model"])
    pytest.importorskip("kaleido")
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **_: None)
    with pytest.raises(ConfigError, match="need Chrome or Chromium"):
        images.require_browser()


def test_a_missing_model_leaves_no_page(tmp_path):
    with pytest.raises(PairQuantError):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []

"""`pairquant report`: options reach the page, and it says where that is."""

import pytest
from typer.testing import CliRunner

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from pairquant.cli.app import app

PATH = "model.layers.0.mlp.up_proj"


def test_the_command_writes_the_page_that_was_asked_for(quick, trained, results, tmp_path):
    import pairquant.cli  # noqa: F401  # every command joins the application

    evaluated = results("result.json", quick, 5.0, {"wiki.txt": {"kl": 0.1234}})
    output = tmp_path / "page.html"
    arguments = [str(quick), str(trained), "--eval", str(evaluated), "--linear", PATH, "--output", str(output)]
    done = CliRunner().invoke(app, ["report", *arguments])
    assert done.exit_code == 0, done.output
    assert f"{output} written" in done.output.replace("\n", "")
    page = output.read_text()
    assert "0.1234" in page
    assert page.count(f"{PATH}: magnitude of each input channel") == 2
    assert page.count("trained as a whole") == 1  # one of the two was

"""The Python of docs/python.md runs as it stands, top to bottom; links between documents lead somewhere."""

import json
import os
import re
from pathlib import Path

import pytest
import tomllib
from tiny_models import TEXT, save_trained

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    save_trained(tmp_path / "MODEL", steps=20)
    (tmp_path / "my-text.txt").write_text(TEXT.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    page = (ROOT / "docs" / "python.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["quality"].kl > 0
    assert names["weight"].shape == (names["packed"].layout.out_features, names["packed"].layout.in_features)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_files_that_the_tree_of_the_house_names_are_there():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    there = {file.name for file in (ROOT / "src" / "pairquant").rglob("*.py")}
    assert set(re.findall(r"(?<!\*)\b\w+\.py\b", tree)) <= there


def test_the_table_of_versions_has_the_oldest_supported_ones_and_those_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page.partition("## Versions that were run")[2].partition("\n## ")[0]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = dict(entry.split(">=") for entry in needed)
    assert f"| Transformers {oldest['transformers']} | {oldest['torch']} |" in table
    found = json.loads((ROOT / "benchmarks" / "results" / "sglang-families-cpu.json").read_text())
    ours = found["versions"]
    row = next(line for line in table.splitlines() if line.startswith("| SGLang"))
    assert (
        f"SGLang {ours['sglang']} | {ours['torch'].removesuffix('.0')} | {ours['transformers'].removesuffix('.0')}"
        in row
    )
    failed = [family for family, figures in found["families"].items() if "failed" in figures]
    assert f"{len(found['families']) - len(failed)} families" in row
    assert all(family in row for family in failed)

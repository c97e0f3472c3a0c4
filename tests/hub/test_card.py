"""The model card: front matter that a hub can read, the numbers of the run, and files of results that are no such."""

import json
import shutil

import pytest
import yaml
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.checkpoint.describe import readme_digest
from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.hub.card import MARKER, ORIGINAL, Origin, OriginalCard, widths, write_card
from pairquant.support.errors import ConfigError
from pairquant.support.version import __version__

NAME = "ann/tiny-PARO"
RESULTS = {
    "model": "out", "reference": "org/original",
    "texts": {"data/wiki.txt": {"tokens": 12345, "perplexity": 6.78901, "kl": 0.01234, "top1": 0.98765}},
    "device": "one | CPU", "versions": {"torch": "2.13", "transformers": "5.17"},
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),), seed=7,
        overrides=("down_proj=bits:8",),
    )  # fmt: skip
    pairquant.quantize(save_tiny(root / "source"), root / "out", config, device="cpu")
    return root / "out"


@pytest.fixture
def directory(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "out")


def opened(directory):
    return Checkpoint.open(ModelFiles.find(str(directory)))


def write(directory, origin=None, results=None, name=NAME):
    """Front matter, as any reader of YAML has it, and text of the card that is written."""
    assert write_card(opened(directory), name, origin or Origin(), results)
    empty, front, text = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def rows_of(text):
    """Cells of every table's rows, by the first of them."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {first: rest for first, *rest in cells}


class TestFrontMatter:
    def test_it_has_what_the_hub_asks_for(self, directory):
        front, _ = write(directory, Origin("org/original", "apache-2.0"))
        assert front == {
            "base_model": "org/original", "base_model_relation": "quantized", "license": "apache-2.0",
            "library_name": "transformers", "pipeline_tag": "text-generation",
            "tags": ["paroquant", "pairquant", "quantized", "4-bit", "8-bit"],
        }  # fmt: skip

    def test_without_an_origin_no_base_is_claimed_and_the_license_is_unknown(self, directory):
        front, text = write(directory)
        assert front["license"] == "unknown"
        assert "base_model" not in front
        assert "base_model_relation" not in front
        assert text.split(f"# {NAME}")[1].strip().startswith("A model in 4 and 8 bits")

    def test_what_the_sources_card_says_stays_unless_it_is_no_longer_true(self, directory):
        own = "---\nlicense: mit\nlanguage:\n- en\ntags: chat\nwidget: [{text: 'a: \"b\"'}]\nnew_version: org/next\n---\nHi."
        (directory / "README.md").write_text(own)
        report = json.loads((directory / "pairquant.json").read_text())
        (directory / "pairquant.json").write_text(json.dumps(report | {"readme_sha256": readme_digest(directory)}))
        front, text = write(directory)
        assert (front["license"], front["language"], front["widget"]) == ("mit", ["en"], [{"text": 'a: "b"'}])
        assert "new_version" not in front
        assert "paroquant" in front["tags"]
        assert text.split(ORIGINAL)[1].strip() == "Hi."
        again, _ = write(directory, Origin(license="apache-2.0"))
        assert again == front | {"license": "apache-2.0"}

    @pytest.mark.parametrize("license", ["no", "null", "other: see below", "- x", "1.0", "# none"])
    def test_what_yaml_would_read_otherwise_is_quoted(self, directory, license):
        assert write(directory, Origin("org/original", license))[0]["license"] == license


class TestText:
    def test_the_numbers_are_those_of_the_run(self, directory):
        _, text = write(directory)
        rows, checkpoint = rows_of(text), opened(directory)
        assert rows["bits per weight"] == [f"{checkpoint.bits_per_weight():.2f} in 14 linear layers"]
        assert rows["seed"] == ["7"]
        assert rows["preset"] == ["quick"]
        assert __version__ in rows["tool"][0]
        assert rows["calibration"] == ["text.txt, 4 × 32 tokens"]
        weights = (directory / "model.safetensors").stat().st_size
        assert rows["size"] == [f"{weights / 1e6:.1f} MB"]
        assert "8 bits" in rows["format"][0]

    def test_the_recipe_is_the_runs(self, directory):
        _, text = write(directory)
        recipe = text.split("```json\n")[1].split("```")[0]
        assert json.loads(recipe) == json.loads((directory / "pairquant.json").read_text())["config"]["recipe"]

    def test_widths_begin_with_the_default(self, directory):
        assert widths(opened(directory)) == [4, 8]

    def test_the_name_is_in_every_command(self, directory):
        _, text = write(directory, name="team/other")
        for line in (
            "vllm serve team/other",
            'AutoTokenizer.from_pretrained("team/other")',
            "pairquant chat team/other",
        ):
            assert line in text

    def test_a_checkpoint_from_elsewhere_has_a_card_without_what_it_does_not_tell(self, directory):
        (directory / "pairquant.json").unlink()
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]["provenance"]
        (directory / "config.json").write_text(json.dumps(config))
        _, text = write(directory)
        assert "## Recipe" not in text
        assert rows_of(text).keys() & {"format", "bits per weight", "size", "preset", "seed", "calibration"} == {
            "format", "bits per weight", "size",
        }  # fmt: skip

    def test_a_card_that_somebody_wrote_stays(self, directory):
        (directory / "README.md").write_text("# Mine\n")
        assert not write_card(opened(directory), NAME, Origin(), None)
        assert (directory / "README.md").read_text() == "# Mine\n"
        (directory / "README.md").write_text(f"<!-- {MARKER} -->\n# Ours, from before\n")
        assert write_card(opened(directory), NAME, Origin(), None)
        assert "from before" not in (directory / "README.md").read_text()


class TestResults:
    def written(self, tmp_path, content):
        file = tmp_path / "results.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    def test_they_are_in_the_card_as_measured(self, directory, tmp_path):
        _, text = write(directory, results=self.written(tmp_path, RESULTS))
        assert rows_of(text)["wiki.txt"] == ["12,345", "6.789", "0.0123", "0.9877"]
        assert "against org/original." in text
        assert r"Measured on one \| CPU with torch 2.13, transformers 5.17." in text

    def test_without_a_reference_its_cells_are_empty(self, directory, tmp_path):
        row = RESULTS["texts"]["data/wiki.txt"] | {"kl": None, "top1": None}
        alone = RESULTS | {"reference": None, "texts": {"wiki.txt": row}}
        _, text = write(directory, results=self.written(tmp_path, alone))
        assert "| wiki.txt | 12,345 | 6.789 |  |  |" in text
        assert "against" not in text.split("## Results")[1].split("## Run it")[0]

    @pytest.mark.parametrize(
        "content",
        [
            "", '{"model": "out", "texts": {', "[]", "{}", {"texts": {}},
            RESULTS | {"texts": {"wiki.txt": {"tokens": "many", "perplexity": 2.0}}},
            RESULTS | {"texts": {"wiki.txt": {"tokens": 5}}},
            RESULTS | {"texts": ["wiki.txt"]},
            {"rows": [{"name": "out", "size_bytes": 1, "quantized_in_s": None, "evaluation": RESULTS}]},
        ],
        ids=["empty", "cut off", "list", "nothing", "no model", "no number", "no perplexity", "texts", "comparison"],
    )  # fmt: skip
    def test_files_of_anything_else_are_named_and_no_card_is_written(self, directory, tmp_path, content):
        file = self.written(tmp_path, content)
        with pytest.raises(ConfigError, match=r"results '.*results\.json'"):
            write_card(opened(directory), NAME, Origin(), file)
        assert not (directory / "README.md").exists()

    def test_a_missing_file_and_a_directory_are_named(self, directory, tmp_path):
        for place in (tmp_path / "nowhere.json", tmp_path):
            with pytest.raises(ConfigError, match=place.name):
                write_card(opened(directory), NAME, Origin(), place)


class TestOriginalCard:
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_front_matter_and_text_are_told_apart(self, newline):
        content = "---\nlicense: mit\n---\n# Title\n\n---\nbelow a line\n".replace("\n", newline)
        found = OriginalCard.parse(content)
        assert found.data["license"] == "mit"
        assert found.text.splitlines() == ["# Title", "", "---", "below a line"]

    @pytest.mark.parametrize("front", ["a: [", "- a list", "\tlicense: mit", "a: b: c"])
    def test_broken_front_matter_is_left_out_and_the_text_kept(self, front):
        found = OriginalCard.parse(f"---\n{front}\n---\n# Title\n")
        assert found == OriginalCard({}, "# Title")


@pytest.mark.parametrize("front", ["language: [en, no]", "language: no"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_norwegian_and_a_byte_order_mark_survive(front, mark):
    card = OriginalCard.parse(f"{mark}---\n{front}\nlicense: mit\n---\ntext")
    assert card.data["license"] == "mit"
    assert card.data["language"] in (["en", "no"], "no")
    assert card.text == "text"

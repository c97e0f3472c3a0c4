"""What is gathered is what the files hold and core computes, with and without the source."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pairquant.checkpoint.read import Checkpoint, ModelFiles
from pairquant.core.linear import decode, rotated_weight, transform_of
from pairquant.report.facts import BINS, gather, group_range, labels, magnitudes, outlier_ratio
from pairquant.support.errors import CheckpointError, ConfigError, PairQuantError

PATH = "model.layers.1.mlp.down_proj"
CHAINS = {
    "chains": 2, "tokens": 60, "kl": 0.2, "kl_interval": None, "departures": [4, None], "departure_median": None,
    "kl_by_position": [], "kl_of_chains": [0.2, 0.2], "tokens_of_chains": [30, 30], "finished": 0.0,
    "never_departed": 0.5, "plan": {"count": 2, "tokens": 30},
}  # fmt: skip


def of(model, **options):
    return gather([model], **options).checkpoints[0]


@pytest.fixture
def moved(quick, tmp_path):
    """A checkpoint whose source is not on this machine."""
    directory = shutil.copytree(quick, tmp_path / "moved")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["provenance"]["source"] = "/nowhere/model"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_linear_is_described_by_its_record_and_its_weight(quick, source):
    checkpoint = Checkpoint.open(ModelFiles.find(str(quick)))
    weight = load_file(source / "model.safetensors")[f"{PATH}.weight"]
    turned = transform_of(checkpoint.packed(PATH)).weight_in(weight)
    facts = {linear.path: linear for linear in of(quick).linears}
    assert list(facts) == list(checkpoint.report["linears"])
    linear = facts[PATH]
    assert (linear.block, linear.kind, linear.layout) == ("1", "down", checkpoint.layout(PATH))
    assert linear.error == checkpoint.report["linears"][PATH]["error"]
    assert linear.outliers_before == pytest.approx(outlier_ratio(magnitudes(weight)))
    assert linear.outliers_after == pytest.approx(outlier_ratio(magnitudes(turned)))
    assert linear.range_before == pytest.approx(group_range(weight, 32))
    assert linear.range_after == pytest.approx(group_range(turned, 32))
    assert linear.largest_angle == checkpoint.packed(PATH)["theta"].abs().max()


def test_the_close_up_is_the_originals_weight_in_both_bases(quick, source):
    close_up = of(quick, linear=PATH).close_up
    weight = load_file(source / "model.safetensors")[f"{PATH}.weight"]
    packed = Checkpoint.open(ModelFiles.find(str(quick))).packed(PATH)
    turned = transform_of(packed).weight_in(weight)
    assert (close_up.path, close_up.exact) == (PATH, True)
    torch.testing.assert_close(close_up.magnitude_before, weight.abs().mean(0))
    torch.testing.assert_close(close_up.magnitude_after, turned.abs().mean(0))
    torch.testing.assert_close(close_up.points_before, weight[:, list(close_up.pair)])
    torch.testing.assert_close(close_up.points_after, turned[:, list(close_up.pair)])


def test_the_pair_is_one_that_is_turned_together_and_none_differs_more(quick):
    close_up = of(quick, linear=PATH).close_up
    packed = Checkpoint.open(ModelFiles.find(str(quick))).packed(PATH)
    pairs = set()
    for rotation in packed["pairs"].tolist():
        for place in range(0, len(rotation), 2):
            start = place // 32 * 32
            pairs.add((start + rotation[place], start + rotation[place + 1]))
    magnitude = close_up.magnitude_before
    differences = {pair: abs(magnitude[pair[0]] - magnitude[pair[1]]).item() for pair in pairs}
    assert differences[close_up.pair] == max(differences.values())


def test_without_the_source_the_decoded_weight_stands_in(moved):
    facts = of(moved, linear=PATH)
    packed = Checkpoint.open(ModelFiles.find(str(moved))).packed(PATH)
    assert facts.remark == "the source (/nowhere/model) is not on this machine"
    assert not facts.close_up.exact
    torch.testing.assert_close(facts.close_up.magnitude_before, decode(packed).abs().mean(0))
    torch.testing.assert_close(facts.close_up.magnitude_after, rotated_weight(packed).abs().mean(0))


def test_a_source_that_has_become_another_model_is_not_taken_for_the_original(quick, moved, tmp_path):
    from tiny_models import save_tiny

    other = save_tiny(tmp_path / "other", "phi3")
    config = json.loads((moved / "config.json").read_text())
    config["quantization_config"]["provenance"]["source"] = str(other)
    (moved / "config.json").write_text(json.dumps(config))
    facts = of(moved)
    assert "cannot be read" in facts.remark
    assert not facts.close_up.exact


def test_the_linear_of_the_strongest_outliers_is_shown_by_default(quick):
    facts = of(quick)
    strongest = max(facts.linears, key=lambda linear: linear.outliers_before)
    assert facts.close_up.path == strongest.path


def test_histograms_count_every_angle_and_scale(quick):
    facts = of(quick)
    checkpoint = facts.checkpoint
    packed = [checkpoint.packed(path) for path in checkpoint.stored.linears() if path.endswith("q_proj")]
    for histogram, values in (
        (facts.angles, torch.cat([p["theta"].float().flatten() for p in packed])),
        (facts.scales, torch.cat([-p["channel_scales"].float().log2().flatten() for p in packed])),
    ):
        assert set(histogram.shares) == {"q", "k", "v", "o", "gate", "up", "down"}
        for shares in histogram.shares.values():
            assert len(shares) == BINS
            assert shares.sum().item() == pytest.approx(1, abs=1e-5)
        assert_counted(values, histogram)


def assert_counted(values, histogram):
    """As many values lie below each edge as the histogram says; those on an edge may be counted on either side of it."""
    width = histogram.centers[1] - histogram.centers[0]
    below = (histogram.shares["q"].double().cumsum(0) * len(values)).round()
    for edge, count in zip(histogram.centers + width / 2, below, strict=True):
        assert (values < edge - 1e-3 * width).sum() <= count <= (values <= edge + 1e-3 * width).sum()


def test_the_log_tells_of_training(trained):
    blocks = of(trained).blocks
    assert [block.index for block in blocks] == [0, 1]
    for block in blocks:
        assert [(epoch.stage, epoch.epoch) for epoch in block.history] == [
            (1, 0),
            (1, 1),
            (1, 2),
            (2, 0),
            (2, 1),
            (2, 2),
        ]


def test_a_checkpoint_from_elsewhere_has_neither_errors_nor_blocks(moved):
    for name in ("pairquant.json", "pairquant.jsonl"):
        (moved / name).unlink()
    facts = of(moved)
    assert {linear.error for linear in facts.linears} == {None}
    assert facts.blocks == []


def test_sizes_count_what_is_stored_and_what_16_bits_would_take(quick, source):
    facts = of(quick)
    assert facts.size == (quick / "model.safetensors").stat().st_size
    assert facts.size_16_bit == sum(2 * t.numel() for t in load_file(source / "model.safetensors").values())


def test_results_find_their_checkpoint_and_others_stay_beside(quick, trained, results):
    parts = [{"start": 0, "end": 10, "kl": 0.1}, {"start": 10, "end": 30, "kl": 0.3}]
    row = {"kl": 0.2, "kl_interval": [0.1, 0.4], "kl_by_position": parts}
    files = [
        results("a.json", quick, 5.0, {"/somewhere/wiki.txt": row}, chains=CHAINS | {"kl_by_position": parts}),
        results("b.json", "elsewhere/trained", 5.0, {"wiki.txt": {}}),
        results("c.json", "original", 16.0, {"wiki.txt": {}}),
    ]
    facts = gather([quick, trained], files)
    assert [[e.name for e in c.measured.evaluations] for c in facts.checkpoints] == [["quick"], ["trained"]]
    assert [e.name for e in facts.measured.evaluations] == ["quick", "trained", "original"]
    first = facts.measured.evaluations[0]
    assert (first.texts["wiki.txt"].kl, first.texts["wiki.txt"].kl_interval) == (0.2, (0.1, 0.4))
    assert first.kl_by_position == {name: [(5, 0.1), (20, 0.3)] for name in ("wiki.txt", "chains of thought")}


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels([tmp_path / "a" / "out", tmp_path / "b" / "out"]) == ["a/out", "b/out"]


def test_what_is_wrong_is_told(quick, source, results):
    bad = results("bad.json", quick, 4.6, {"wiki.txt": {"kl_by_position": [{"start": 0}]}})
    for options, error, message in (
        ({"models": [quick], "linear": "model.layers.1.mlp.down_porj"}, CheckpointError, "did you mean"),
        ({"models": [quick, quick]}, ConfigError, "given twice"),
        ({"models": [source]}, CheckpointError, "not quantized with pairwise rotations"),
        ({"models": [quick.parent / "qick"]}, PairQuantError, "did you mean"),
        ({"models": [quick], "results": [quick / "config.json"]}, ConfigError, "have no entry rows, workload, texts"),
        ({"models": [quick], "results": [bad]}, ConfigError, "kl_by_position.0.end is missing"),
    ):
        with pytest.raises(error, match=message):
            gather(**options)

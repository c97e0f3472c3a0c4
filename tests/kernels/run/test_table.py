"""The table of tiles: the nearest shape, choices that fit their kernels, and the user's own measurements."""

import json

import pytest

from pairquant.kernels.run import table
from pairquant.kernels.run.table import Bytes, Dense, Narrow, RowBytes, WholeBytes, Wide
from pairquant.support.errors import ConfigError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(table.Path, "home", lambda: tmp_path)
    table.user_table.cache_clear()
    table._choices.cache_clear()
    yield tmp_path
    table.user_table.cache_clear()
    table._choices.cache_clear()


def test_the_table_gives_the_nearest_shape(home):
    for (n, c), row in table.MEASURED["sm90"].items():
        for tokens, choice in row.items():
            assert table.choose("sm90", n, c, tokens) == choice
            assert table.choose("sm90", n + 8, c, tokens) == choice
        assert table.choose("sm90", n, c, 100_000) == table.DENSE
    assert isinstance(table.choose("sm90", 100, 64, 1), Narrow)
    assert table.choose("sm75", 4096, 4096, 4) == table.UNMEASURED[8]


def test_every_choice_fits_its_kernel():
    rows = [table.UNMEASURED, *(row for shapes in table.MEASURED.values() for row in shapes.values())]
    for row in rows:
        assert tuple(row) == table.TOKENS
        for tokens, choice in row.items():
            if isinstance(choice, Narrow):
                assert tokens <= 16
                assert 128 % choice.rows == 0 == choice.rows % 16
                assert choice.prefetch % choice.warps == 0
            elif isinstance(choice, Wide):
                assert 128 % choice.rows == 0 == choice.rows % (16 * choice.warps) or choice.warps == 8


def test_the_users_own_measurements(home):
    mine = {8: Narrow(64, 8, 2, 4, True, 8), 64: Wide(64, 64, 4), 512: Dense(1024)}
    path = table.save_user_table("sm99", {(512, 256): mine})
    assert table.choose("sm99", 512, 256, 5) == mine[8]
    assert table.choose("sm99", 512, 256, 40) == mine[64]
    assert table.choose("sm99", 512, 256, 300) == mine[512]
    assert table.choose("sm99", 512, 256, 1) == table.UNMEASURED[1]
    table.save_user_table("sm99", {(64, 64): mine})
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"out_features": 8, "in_features": 8, "choices": {"1": {"kernel": "x"}}}]']
)
def test_a_damaged_table_is_named(home, text):
    path = table.user_path("sm99")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match="Delete it"):
        table.choose("sm99", 8, 8, 1)


def test_the_nearest_shape_is_near_in_both_sides(home):
    small, large = {8: Narrow(16, 2)}, {8: Narrow(64, 2)}
    table.save_user_table("sm99", {(512, 512): small, (8192, 512): large})
    assert table.choose("sm99", 1500, 512, 8) == small[8]  # nearer by the ratio, not by the difference
    assert table.choose("sm99", 3000, 512, 8) == large[8]
    assert table.choose("sm99", 512, 8192, 8) == small[8]


@pytest.mark.parametrize("end", table.TOKENS)
def test_a_range_of_tokens_ends_where_it_says(home, end):
    table.save_user_table("sm99", {(64, 64): {end: Dense(end)}})
    assert table.choose("sm99", 64, 64, end) == Dense(end)
    assert table.choose("sm99", 64, 64, end + 1) != Dense(end)


def test_measuring_again_replaces_and_leaves_no_half_written_file(home):
    path = table.save_user_table("sm99", {(64, 64): {1: Dense(1)}})
    table.save_user_table("sm99", {(64, 64): {1: Dense(2)}})
    assert table.choose("sm99", 64, 64, 1) == Dense(2)
    assert [file.name for file in path.parent.iterdir()] == ["kernels-sm99.json"]
    assert table.choose("sm98", 64, 64, 1) == table.UNMEASURED[1], "each class of devices has a file of its own"


def test_rounded_activations_are_multiplied_in_8_bits_from_9_tokens_on(home):
    assert isinstance(table.choose_rounded("sm90", 4096, 4096, 8, "int8", 4), Narrow)
    for tokens in (9, 16, 17, 100, 512):
        choice = table.choose_rounded("sm90", 4096, 4096, tokens, "int8", 4)
        assert isinstance(choice, Bytes)
        assert choice.tokens == min(128, max(16, 1 << (tokens - 1).bit_length()))
        assert 128 % choice.rows == 0
    assert isinstance(table.choose_rounded("sm90", 28672, 4096, 512, "fp8", 4), WholeBytes)
    assert isinstance(table.choose_rounded("sm90", 4096, 4096, 1024, "fp8", 4), RowBytes)
    assert isinstance(table.choose_rounded("sm80", 4096, 4096, 512, "int8", 4), Wide), "8 bits were not measured there"


@pytest.mark.parametrize(("rows", "kind"), [(4096, WholeBytes), (1024, Bytes)])
def test_weights_that_need_their_group_scales_keep_them_for_many_tokens(home, rows, kind):
    assert isinstance(table.choose_rounded("sm90", rows, 4096, 1024, "int8", 4), RowBytes)
    assert isinstance(table.choose_rounded("sm90", rows, 4096, 1024, "int8", 4, by_row=False), kind)
    assert isinstance(table.choose_rounded("sm90", rows, 4096, 100_000, "int8", 4, by_row=False), WholeBytes)


@pytest.mark.parametrize(("activations", "bits"), [("int8", 5), ("int4", 4), ("mxfp4", 2)])
def test_what_is_rounded_in_the_rotated_basis_is_never_multiplied_by_a_weight_in_the_original_one(
    home, activations, bits
):
    for tokens in (1, 16, 512, 513, 100_000):
        choice = table.choose_rounded("sm90", 4096, 14336, tokens, activations, bits)
        assert isinstance(choice, Narrow if tokens <= 8 else Wide)


def test_floats_are_multiplied_in_16_bits_whatever_the_activations(home):
    assert not table.eight_bits("sm90", "int8", 4, floating=True)
    for tokens in (1, 64, 100_000):
        choice = table.choose_rounded("sm90", 4096, 4096, tokens, "int8", 4, floating=True)
        assert isinstance(choice, Narrow if tokens <= 8 else Wide)


@pytest.mark.parametrize(
    ("kind", "activations", "bits", "wanted"),
    [
        ("sm90", "int8", 4, True), ("sm90", "fp8", 2, True), ("sm90", "int8", 5, False), ("sm90", "int4", 4, False),
        ("sm80", "int8", 4, False),
    ],
)  # fmt: skip
def test_which_products_are_of_8_bits(kind, activations, bits, wanted):
    assert table.eight_bits(kind, activations, bits) == wanted

"""The text of a run: nothing that the whole model is trained on was fitted on before, as far as there is text."""

from dataclasses import replace

import pytest
import torch
from tiny_models import save_tiny

from pairquant.jobs.opened import Opened
from pairquant.jobs.plan import Silent
from pairquant.jobs.texts import Texts
from pairquant.optimize.ranks import Ranks
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import PRESETS, EndToEnd
from pairquant.support.errors import ConfigError, TextError

SEQ_LEN, CPU = 16, torch.device("cpu")


class Heard(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture
def draw(source, tmp_path):
    """Draw the texts of a run from so many windows of distinct tokens."""

    def of(windows, *, ranks=1, fresh=3, **options):
        recipe = replace(PRESETS[options.pop("preset", "fast")], end_to_end=EndToEnd(fresh=fresh))
        text = tmp_path / "text.txt"
        # The tokenizer of the tiny models has a token for each byte.
        generator = torch.Generator().manual_seed(3)
        letters = torch.randint(ord("a"), ord("z") + 1, (windows * SEQ_LEN,), generator=generator)
        text.write_text("".join(map(chr, letters.tolist())))
        config = QuantConfig(
            recipe=recipe, group_size=32, seq_len=SEQ_LEN, calibration=(str(text),), bos="never",
            **{"samples": 8, **options},
        )  # fmt: skip
        heard = Heard()
        return Texts.drawn(Opened.of(source, config), Ranks(0, ranks), CPU, heard), heard.notices

    return of


def rows(*parts):
    return [tuple(row) for part in parts if part is not None for row in part.tolist()]


def test_the_whole_model_is_trained_on_windows_that_nothing_else_reads_and_an_eighth_is_held_out(draw):
    texts, told = draw(100)
    assert [len(t) for t in (texts.calibration.tokens, texts.whole, texts.held_out)] == [8, 21, 3]
    found = rows(texts.calibration.tokens, texts.whole, texts.held_out)
    assert len(set(found)) == len(found) == 32
    assert not told


def test_with_too_little_text_it_reads_what_blocks_were_fitted_on_too_and_says_so(draw):
    texts, told = draw(18)
    fitted, read = rows(texts.calibration.tokens), rows(texts.whole, texts.held_out)
    assert set(fitted) <= set(read)
    assert len(set(read)) == len(read) == 18
    assert "10 windows of the 24 wanted for the last training are left" in told[-1]


def test_nothing_fresh_reads_what_blocks_were_fitted_on(draw):
    texts, told = draw(100, fresh=0)
    assert sorted(rows(texts.whole, texts.held_out)) == sorted(rows(texts.calibration.tokens))
    assert not told


def test_of_few_windows_one_is_held_out_and_of_one_none(draw):
    texts, _ = draw(100, fresh=1, samples=4)
    assert (len(texts.whole), len(texts.held_out)) == (3, 1)
    texts, _ = draw(100, fresh=1, samples=1)
    assert (len(texts.whole), texts.held_out) == (1, None)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_process_gets_as_many_windows(draw, ranks):
    texts, _ = draw(43, ranks=ranks, fresh=10)  # 35 windows are left beside those of the blocks
    assert len(texts.whole) % ranks == 0
    assert len(texts.held_out) % ranks == 0


def test_windows_that_do_not_share_out_are_refused(draw):
    with pytest.raises(ConfigError, match="7 samples and 0 validation samples do not share out evenly to 2"):
        draw(100, ranks=2, samples=7)


def test_too_little_text_for_the_blocks_is_an_error_that_counts_them(draw):
    with pytest.raises(TextError, match="8 windows of 16 tokens wanted, 5 there"):
        draw(5)


def test_validation_windows_are_apart_too(draw):
    texts, _ = draw(200, preset="paper", samples=8)
    found = rows(texts.calibration.tokens, texts.validation, texts.whole, texts.held_out)
    assert len(set(found)) == len(found)
    assert len(texts.validation) == PRESETS["paper"].training.validation_samples


def test_blocks_are_fitted_on_the_same_windows_with_and_without_it(source, draw):
    texts, _ = draw(100)
    calibration = texts.calibration
    config = QuantConfig(group_size=32, seq_len=SEQ_LEN, calibration=calibration.sources, bos="never", samples=8)
    plain = Texts.drawn(Opened.of(source, config), Ranks(), CPU, Silent())
    assert plain.calibration.digest == calibration.digest


def test_a_recipe_without_a_last_training_reads_no_more_than_before(source, draw):
    texts, _ = draw(100)
    config = QuantConfig(group_size=32, samples=8, seq_len=SEQ_LEN)
    plain = Texts.drawn(Opened.of(source, config), Ranks(), CPU, Silent())
    assert (plain.whole, plain.held_out) == (None, None)
    assert plain.digests()["whole"] is None
    assert texts.digests()["whole"] is not None


def test_a_recipe_without_text_draws_none(source):
    assert Texts.drawn(Opened.of(source, QuantConfig(preset="rtn", group_size=32)), Ranks(), CPU, Silent()) == Texts()

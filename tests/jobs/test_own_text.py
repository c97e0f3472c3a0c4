"""Text that a model samples itself: as much as is wanted, from its own chats, once, and the same for the same seed."""

import pytest
import torch
from tiny_models import save_tiny

import pairquant
from pairquant.checkpoint.read import ModelFiles
from pairquant.jobs.own_text import OwnText
from pairquant.support.errors import ResourceError, TextError

CPU = torch.device("cpu")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Heard:
    def __init__(self):
        self.notices = []

    def stage(self, text): ...

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def own(source):
    def of(template=None, seq_len=48, seed=0, purpose="calibration", prefix=(), heard=None):
        files = ModelFiles.find(str(source))
        tokenizer = files.tokenizer()
        tokenizer.chat_template = template
        return OwnText(files, 100_000, tokenizer, seq_len, seed, purpose, prefix, CPU, heard or Heard())

    return of


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_windows_are_as_many_as_wanted_and_the_same_for_a_seed(own, template, tmp_path, monkeypatch):
    first = own(template).windows(5)
    assert (first.dtype, first.shape) == (torch.int64, (5, 48))
    assert len(first.unique(dim=0)) == 5
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    assert torch.equal(own(template).windows(5), first)
    assert not torch.equal(own(template, seed=1).windows(5), first)


def test_other_seeds_and_purposes_share_no_text(own):
    found = [
        own(seed=seed, purpose=p).windows(40) for seed, p in ((0, "calibration"), (2, "calibration"), (0, "other"))
    ]
    pieces = torch.cat(found).unfold(1, 12, 12).flatten(0, 1)
    assert len(pieces.unique(dim=0)) == len(pieces)


def test_text_is_sampled_once(own, monkeypatch):
    heard = Heard()
    first = own(heard=heard).windows(3)
    before, after = heard.notices
    assert "samples 144 tokens, which takes long on a CPU" in before
    assert "self: the model sampled" in after
    monkeypatch.setattr(ModelFiles, "model", None)
    again = Heard()
    assert torch.equal(own(heard=again).windows(3), first)
    assert not again.notices
    with pytest.raises(TypeError):
        own().windows(4)


def test_what_was_kept_and_is_damaged_is_sampled_again(own, tmp_path):
    first = own().windows(3)
    (kept,) = (tmp_path / "home").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:40])
    assert torch.equal(own().windows(3), first)


def test_chats_are_written_by_the_template(own):
    found = own(CHAT, seq_len=100)
    text = found.tokenizer.decode(found.windows(2).flatten())
    assert text.count("<user>") >= 1
    question, _, answer = text.partition("</user><assistant>")
    assert question.startswith("<user>")
    assert answer


def test_windows_begin_as_those_of_other_text(own):
    found = own(prefix=(1, 7)).windows(4)
    assert (found[:, :2] == torch.tensor([1, 7])).all()


def test_a_template_that_changes_the_users_words_is_refused(own):
    with pytest.raises(TextError, match="the chat template changes the user's words"):
        own("{% for m in messages %}{{ m.content | upper }}{% endfor %}").windows(1)


def test_a_model_that_asks_nothing_is_refused(own, monkeypatch):
    found = own(CHAT)
    monkeypatch.setattr(type(found.tokenizer), "decode", lambda *a, **k: " ")
    with pytest.raises(TextError, match="writes no questions"):
        found.windows(1)


def test_a_model_larger_than_the_device_is_refused(own, monkeypatch):
    monkeypatch.setattr("pairquant.jobs.own_text.free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="are free on cpu. Choose another --device, or name other text"):
        own().windows(1)


def test_a_run_calibrates_on_it_and_says_so(source, tmp_path):
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=16, calibration=("self", "default")
    )
    pairquant.quantize(source, tmp_path / "out", config, device="cpu")
    made = ModelFiles.find(str(tmp_path / "out")).config.quantization_config
    assert "self" in made["provenance"]["calibration"]


def test_it_is_no_text_to_evaluate_on(source, tmp_path):
    with pytest.raises(TextError, match="can be calibrated on only"):
        pairquant.evaluate(source, texts=("self",), seq_len=16)

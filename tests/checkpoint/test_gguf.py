"""A GGUF file's word on `<bos>`, which the tokenizer made from it may have lost."""

import pytest
from tiny_models import beginning_tokenizer, byte_tokenizer

from pairquant.checkpoint.gguf import adds_bos, with_bos
from pairquant.checkpoint.read import ModelFiles
from pairquant.support.windows import own_prefix

gguf = pytest.importorskip("gguf")


def write(path, add_bos):
    """A GGUF file of a byte tokenizer and no weights, as Transformers reads one."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [*(token for token, _ in vocabulary), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("said", "expected"), [(True, True), (False, False), (None, False)])
def test_the_files_word(said, expected, tmp_path):
    assert adds_bos(write(tmp_path / "model.gguf", said)) is expected


def test_the_tokenizer_puts_bos_where_the_file_says_so_also_when_saved(tmp_path):
    path = write(tmp_path / "model.gguf", True)
    tokenizer = ModelFiles.find(str(path)).tokenizer()
    assert own_prefix(tokenizer) == (1,)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    assert own_prefix(type(tokenizer).from_pretrained(tmp_path / "saved")) == (1,)
    assert own_prefix(ModelFiles.find(str(write(tmp_path / "other.gguf", False))).tokenizer()) == ()


def test_what_puts_it_already_stays(tmp_path):
    """The file is not even read."""
    tokenizer = beginning_tokenizer("<pad> <s>")
    assert own_prefix(with_bos(tokenizer, tmp_path / "none.gguf")) == (0, 1)

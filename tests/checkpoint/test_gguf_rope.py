"""The rotary embedding of a GGUF file becomes parameters of Transformers with the same frequencies, or is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoConfig

from pairquant.checkpoint.gguf_rope import llama3_factors, rope_factors, with_rope
from pairquant.support.errors import SourceError

gguf = pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_stretched_frequencies_are_those_of_transformers(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    save_tiny(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "rope_parameters": LLAMA3}))
    config = AutoConfig.from_pretrained(tmp_path)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    usual = LLAMA3["rope_theta"] ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(usual / rope_factors(config), expected)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert rope_factors(AutoConfig.from_pretrained(tmp_path)) is None


def written(path, keys=(), factors=None, name="rope_freqs.weight"):
    """A GGUF file that says no more than this. keys: of the family "llama", and the writer's method for each value."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, kind, value in keys:
        getattr(writer, f"add_{kind}")(f"llama.{key}", value)
    if factors is not None:
        writer.add_tensor(name, np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path, theta=500000.0, **more):
    """What becomes of a configuration as Transformers makes it of such a file."""
    config = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": theta}, head_dim=64, **more)
    return with_rope(config, path)


@pytest.mark.parametrize(
    ("rope", "width"),
    [
        ({"factor": 8.0, "original_max_position_embeddings": 8192}, 128),  # LLaMA 3.1
        ({"factor": 32.0, "original_max_position_embeddings": 8192}, 64),  # LLaMA 3.2 1B
        ({"factor": 16.0, "original_max_position_embeddings": 4096, "high_freq_factor": 6.0}, 128),
        ({"factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4}, 96),
    ],
)
def test_factors_give_the_parameters_that_made_them(tmp_path, rope, width):
    rope = {**LLAMA3, **rope}
    found = read(written(tmp_path / "m.gguf", factors=llama3_factors(rope, width)), rope["rope_theta"])
    assert found.rope_parameters == rope


def test_bounds_that_mean_the_same_are_as_good(tmp_path):
    """Only the ratios of the two bounds to the context matter."""
    rope = {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    factors = llama3_factors(rope, 128)
    found = read(written(tmp_path / "m.gguf", factors=factors)).rope_parameters
    assert found["original_max_position_embeddings"] == 8192
    torch.testing.assert_close(llama3_factors(found, 128), factors, rtol=1e-6, atol=0)


def test_factors_of_one_change_nothing(tmp_path):
    found = read(written(tmp_path / "m.gguf", factors=np.ones(32)))
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
def test_factors_that_no_parameters_give_are_refused(tmp_path, name):
    path = written(tmp_path / "m.gguf", factors=1 + np.random.default_rng(0).random(32), name=name)
    with pytest.raises(
        SourceError, match=rf"m.gguf stretches the rotary embedding .*\({name}\).*Transformers directory"
    ):
        read(path)


def test_kinds_that_a_file_names_are_read(tmp_path):
    keys = [("rope.scaling.type", "string", "linear"), ("rope.scaling.factor", "float32", 8.0)]
    assert read(written(tmp_path / "a.gguf", keys)).rope_parameters["factor"] == 8.0
    keys[0] = ("rope.scaling.type", "string", "yarn")
    with pytest.raises(SourceError, match="rope.scaling.type 'yarn' with factor"):
        read(written(tmp_path / "b.gguf", keys))
    keys.append(("rope.scaling.original_context_length", "uint32", 32768))
    found = read(written(tmp_path / "c.gguf", keys)).rope_parameters
    assert (found["rope_type"], found["original_max_position_embeddings"]) == ("yarn", 32768)
    assert "beta_fast" not in found
    keys += [("rope.scaling.yarn_beta_fast", "float32", 16.0), ("rope.scaling.yarn_beta_slow", "float32", 2.0)]
    found = read(written(tmp_path / "d.gguf", keys)).rope_parameters
    assert (found["beta_fast"], found["beta_slow"]) == (16.0, 2.0)
    with pytest.raises(SourceError, match="a way that PairQuant does not translate .*attn_factor"):
        read(written(tmp_path / "e.gguf", [*keys, ("rope.scaling.attn_factor", "float32", 2.0)]))


def test_of_two_kinds_of_attention_the_full_one_is_stretched(tmp_path):
    keys = [("rope.scaling.type", "string", "linear"), ("rope.scaling.factor", "float32", 8.0)]
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    both = {"sliding_attention": sliding, "full_attention": {**sliding, "rope_theta": 1e6}}
    found = with_rope(SimpleNamespace(rope_parameters=both), written(tmp_path / "m.gguf", keys)).rope_parameters
    assert found["sliding_attention"] == sliding
    assert found["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}


def test_heads_are_as_wide_as_the_file_says(tmp_path):
    keys = [("attention.key_length", "uint32", 32), ("attention.value_length", "uint32", 32)]
    assert read(written(tmp_path / "m.gguf", keys)).head_dim == 32
    keys[1] = ("attention.value_length", "uint32", 16)  # of heads whose two widths differ, it says something else
    assert read(written(tmp_path / "n.gguf", keys)).head_dim == 64

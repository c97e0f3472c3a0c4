"""The input embedding quantized: looked up by Transformers, exported, inspected, resumed, planned with, refused."""

import json

import pytest
import torch
from killing import content
from safetensors.torch import load_file
from tiny_models import TEXT, save_tiny
from transformers import AutoModelForCausalLM

import pairquant
from pairquant.core.linear import decode
from pairquant.layers.embedding import RotatedEmbedding
from pairquant.models.planning import plan_model
from pairquant.optimize import embedding as embeddings
from pairquant.optimize.embedding import quantize_embedding
from pairquant.optimize.streams import Places, Streams
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.support.errors import ConfigError

CPU = torch.device("cpu")
OPTIONS = {
    "preset": "quick", "group_size": 32, "rotations": 2, "samples": 4, "seq_len": 48, "calibration": (str(TEXT),),
}  # fmt: skip
TOKENS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(7))


def quantize(source, output, **options):
    config = pairquant.QuantConfig(**{**OPTIONS, "embedding_bits": 6, **options})
    return pairquant.quantize(source, output, config, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3"])
def made(request, tmp_path_factory):
    """A source and its checkpoint; the last two had one tensor for both embeddings, and Gemma multiplies its rows."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(root / "source", request.param)
    quantize(root / "source", root / "packed", head_bits=None if request.param == "llama" else 6)
    return root / "source", root / "packed"


def test_transformers_looks_rows_up_as_the_exported_model_does(made, tmp_path):
    source, packed = made
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert isinstance(model.get_input_embeddings(), RotatedEmbedding)
    pairquant.export(packed, tmp_path / "plain", "fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    assert 0 < (plain.get_input_embeddings().weight - original).norm() / original.norm() < 0.03
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_inspect_lists_and_checks_it(made):
    found = pairquant.inspect(made[1])
    path = next(path for path in found.linears if path.endswith("embed_tokens"))
    assert 0 < found.linears[path]["error"] < 1e-3
    assert found.checkpoint.config.spec_of(path) == Spec(6, 32, 2)
    assert found.unknown is None
    runs = {row.names: row.explanation.backend for row in pairquant.jobs.inspect.backends(made[1], "cpu")}
    assert runs["embed_tokens"] == "row lookup"
    assert runs["down"] != "row lookup"


def test_dequantize_gives_a_plain_model(tmp_path):
    save_tiny(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = logits(model)
    plain = model.dequantize()
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_chunks_of_rows_give_the_bytes_of_the_whole(monkeypatch):
    weight = torch.randn(100 - 100 % 32, 64, generator=torch.Generator().manual_seed(0))
    layout, config = Spec(3, 32, 2).layout(64, 96), QuantConfig(**OPTIONS)
    whole, error = quantize_embedding("e", weight, layout, config, CPU)
    monkeypatch.setattr(embeddings, "ROWS", 32)
    parts, same = quantize_embedding("e", weight, layout, config, CPU)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.tensors.items())
    lost = (weight - decode(whole)).square().sum() / weight.square().sum()
    assert error == pytest.approx(same) == pytest.approx(lost.item(), rel=1e-4)


def test_tiny_weights_are_brought_into_the_range_of_fp16():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 1e-5
    packed, error = quantize_embedding("e", weight, Spec(8, 32, 2).layout(64, 96), QuantConfig(**OPTIONS), CPU)
    assert error < 1e-3
    assert (decode(packed) - weight).norm() < 0.02 * weight.norm()


def test_only_the_quantized_stream_reads_the_quantized_rows(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "source"))
    _, blocks = plan_model(model, QuantConfig(**OPTIONS))
    rows, own = torch.randn(288, 128), model.get_input_embeddings().weight.detach().clone()
    streams = Streams.start(model, blocks, TOKENS, True, Places(CPU, CPU, torch.float32), print, rows)
    torch.testing.assert_close(torch.cat(streams.quantized), rows[TOKENS])
    torch.testing.assert_close(torch.cat(streams.original), own[TOKENS])
    assert torch.equal(model.get_input_embeddings().weight, own)


def test_a_stopped_run_continues_to_the_same_bytes(tmp_path):
    source = save_tiny(tmp_path / "source")
    options = {
        "head_bits": 6,
        "preset": "fast",
        "recipe": pairquant.spec.recipe.recipe_with("fast", ["steps=3", "head.steps=3"], 1),
    }
    quantize(source, tmp_path / "whole", **options)

    class Stop(pairquant.jobs.quantize.Silent):
        def block(self, result):
            if result.index == 0:
                raise KeyboardInterrupt

    config = pairquant.QuantConfig(**{**OPTIONS, "embedding_bits": 6, **options})
    with pytest.raises(KeyboardInterrupt):
        pairquant.quantize(source, tmp_path / "out", config, device="cpu", progress=Stop())
    quantize(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_target_size_counts_it(tmp_path):
    source = save_tiny(tmp_path / "source")
    found = quantize(source, tmp_path / "out", target={"bits_per_weight": 5.0}, head_bits=8)
    form = json.loads((tmp_path / "out" / "pairquant-plan.json").read_text())
    assert not any("embed" in path for path in form["layers"])
    assert found.size_after < 1.1 * sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3", {}, "model.embed_tokens is the output embedding too. Add --head-bits"),
        ("llama", {"embedding_bits": 7}, "embedding_bits is 7, allowed: 2, 3, 4, 5, 6, 8"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, family, options, message):
    source = save_tiny(tmp_path / "source", family)
    with pytest.raises(ConfigError, match=message):
        quantize(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_that_fp16_scales_cannot_represent_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "source"))
    model.get_input_embeddings().weight.data.mul_(1e12)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has values .*: leave out --embedding-bits"):
        quantize(tmp_path / "source", tmp_path / "out")


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "source"))

    class Other(torch.nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens).tanh()

    model.set_input_embeddings(Other(288, 128))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no input embedding that only looks rows up"):
        plan_model(model, QuantConfig(**OPTIONS, embedding_bits=8))

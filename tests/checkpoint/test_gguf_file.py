"""GGUF files: Transformers reads back the weights and the tokenizer that went in."""

import json

import pytest
import torch
from test_families import make_source
from tiny_models import TEXT, byte_tokenizer, save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import pairquant
from pairquant.checkpoint.gguf_metadata import FAMILIES, WORDS, splitting_of, tokenizer_of, tokens_of
from pairquant.checkpoint.read import ModelFiles
from pairquant.formats.table import FORMATS
from pairquant.support.errors import ConfigError, SourceError

gguf = pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def merging_tokenizer():
    """Bytes, and two merges of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{symbol: 3 + i for i, symbol in enumerate(alphabet)}}
    vocabulary |= {"th": 259, "the": 260}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def unrotated(root, family, **changes):
    """A tiny checkpoint without transforms."""
    source = save_tiny(root / "source", family)
    merging_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    windows = {"mistral": {"sliding_window": None}, "gemma3": {"layer_types": ["sliding_attention"] * 2}}
    (source / "config.json").write_text(json.dumps(config | windows.get(family, {})))  # as llama.cpp has them
    options = {
        "transform": "none",
        "group_size": 32,
        "samples": 2,
        "seq_len": 32,
        "calibration": (str(TEXT),),
        **changes,
    }
    config = FORMATS["gguf"].settled(pairquant.QuantConfig(preset="quick", **options))
    pairquant.quantize(source, root / "tiny", config, device="cpu")  # a name that tells Transformers no family
    return root / "tiny"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_the_weights_and_the_tokenizer(family, tmp_path):
    checkpoint = unrotated(tmp_path, family)
    file = pairquant.export(checkpoint, tmp_path / "out" / "model.gguf", "gguf")
    read = ModelFiles.find(str(file)).model(torch.float32).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(pairquant.export(checkpoint, tmp_path / "plain", "fp32")).state_dict()
    assert read.keys() == plain.keys()
    for name, expected in plain.items():
        rounded = 1e-2 if "embed" in name or "lm_head" in name else 1e-3  # 8 bits; a minimum in float16
        distance = (read[name] - expected).norm()
        assert distance <= (rounded if expected.dim() == 2 else 1e-6) * expected.norm(), name
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "the other, then"
    assert tokenizer(text)["input_ids"] == merging_tokenizer()(text)["input_ids"]
    assert tokenizer.eos_token_id == 2


def test_five_bits_and_symmetric_codes_are_types_of_their_own(tmp_path):
    overrides = ("down_proj=bits:5", "q_proj=bits:8")
    checkpoint = unrotated(tmp_path, "llama", symmetric=True, overrides=overrides)
    file = pairquant.export(checkpoint, tmp_path / "model.gguf", "gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q5_0"
    assert kinds["blk.1.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.attn_k.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_a_source_in_gguf_gives_its_own_metadata(tmp_path):
    first = pairquant.export(unrotated(tmp_path, "llama"), tmp_path / "first.gguf", "gguf")
    config = FORMATS["gguf"].settled(pairquant.QuantConfig(preset="rtn", group_size=32))
    pairquant.quantize(first, tmp_path / "again", config, device="cpu")
    (tmp_path / "again" / "tokenizer.json").unlink()  # Gemma's, made from such a file, could not be described
    second = pairquant.export(tmp_path / "again", tmp_path / "second.gguf", "gguf")
    own = ("GGUF.", "general.file_type")
    said = [
        {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if not name.startswith(own)}
        for file in (first, second)
    ]
    assert said[0] == said[1]
    with pytest.raises(ConfigError, match="is the source itself"):
        pairquant.quantize_as("gguf", first, first, config, overwrite=True)
    with pytest.raises(ConfigError, match="is the file that the model was made from"):
        pairquant.export(tmp_path / "again", first, "gguf", overwrite=True)


def with_experts(root, name, **changes):
    """A tiny source with experts, which llama.cpp runs as Transformers does."""
    source = make_source(name, root / "source")
    merging_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize(
    ("name", "changes", "shared"),
    [
        ("Qwen3-MoE", {"norm_topk_prob": True}, False),
        ("Qwen2-MoE", {}, True),
        ("Mixtral", {}, False),
        ("OLMoE", {}, False),
    ],
)
def test_the_experts_of_a_block_are_one_tensor_of_each_part(name, changes, shared, tmp_path):
    source = with_experts(tmp_path, name, **changes)
    nearest = pairquant.QuantConfig(preset="rtn", group_size=32)
    pairquant.quantize(source, tmp_path / "packed", FORMATS["gguf"].settled(nearest), device="cpu")
    file = gguf.GGUFReader(pairquant.export(tmp_path / "packed", tmp_path / "model.gguf", "gguf"))
    tensors = {tensor.name: tensor for tensor in file.tensors}
    model = AutoModelForCausalLM.from_pretrained(pairquant.export(tmp_path / "packed", tmp_path / "plain", "fp32"))
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    for part, expected in (("gate", gate), ("up", up), ("down", experts.down_proj)):
        tensor = tensors[f"blk.1.ffn_{part}_exps.weight"]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert tensor.tensor_type.name == "Q4_1"
        assert (found - expected).norm() <= 1e-3 * expected.norm(), part
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert ("blk.0.ffn_gate_inp_shexp.weight" in tensors) == shared
    said = {key.partition(".")[2]: field.contents() for key, field in file.fields.items()}
    assert (said["expert_count"], said["expert_used_count"]) == (4, 2)


def test_experts_that_stay_plain_are_refused_before_the_work(tmp_path):
    config = pairquant.QuantConfig(preset="rtn", group_size=32, ignore=("lm_head", "re:.*layers.1.*experts.*"))
    source = with_experts(tmp_path, "Mixtral")
    with pytest.raises(ConfigError, match=r"layers\.1.*experts\.0\.w1 is to stay as it is.*--ignore"):
        pairquant.quantize_as("gguf", source, tmp_path / "model.gguf", config, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_experts_that_llama_cpp_runs_otherwise_are_refused_before_the_work(tmp_path):
    config = pairquant.QuantConfig(preset="rtn", group_size=32)
    for number, (name, changes, reason) in enumerate(
        [
            ("Qwen3-MoE", {"norm_topk_prob": False}, "weights of experts as they are"),
            ("Qwen2-MoE", {"norm_topk_prob": True}, "weights of experts divided by their sum"),
            ("OLMoE", {"clip_qkv": 8.0}, "cut off at 8"),
        ]
    ):
        root = tmp_path / str(number)
        with pytest.raises(SourceError, match=reason):
            pairquant.quantize_as(
                "gguf", with_experts(root, name, **changes), root / "model.gguf", config, device="cpu"
            )
        assert [path.name for path in root.iterdir()] == ["source"]
    pairquant.quantize(tmp_path / "1" / "source", tmp_path / "packed", config, device="cpu")
    said = json.loads((tmp_path / "packed" / "config.json").read_text()) | {"norm_topk_prob": False}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(said | {"mlp_only_layers": [0]}))
    with pytest.raises(SourceError, match="blocks without experts"):
        pairquant.export(tmp_path / "packed", tmp_path / "model.gguf", "gguf")


def test_bad_outputs_and_families_are_refused(tmp_path):
    checkpoint = unrotated(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"is no \.gguf file"):
        pairquant.export(checkpoint, tmp_path / "directory", "gguf")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        pairquant.export(checkpoint, tmp_path / "there.gguf", "gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(ConfigError, match="family 'phi3'"):
        pairquant.export(unrotated(tmp_path / "other", "phi3"), tmp_path / "phi3.gguf", "gguf")
    config = json.loads((checkpoint / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (checkpoint / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(SourceError, match="kind 'dynamic'"):
        pairquant.export(checkpoint, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_factors_of_a_source_in_gguf_are_kept(tmp_path):
    checkpoint = unrotated(tmp_path, "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rope_parameters": LLAMA3}))
    first = pairquant.export(checkpoint, tmp_path / "first.gguf", "gguf")
    pairquant.quantize(first, tmp_path / "again", pairquant.QuantConfig(preset="rtn", group_size=32), device="cpu")
    second = pairquant.export(tmp_path / "again", tmp_path / "second.gguf", "gguf")
    factors = [{t.name: t.data for t in gguf.GGUFReader(file).tensors}["rope_freqs.weight"] for file in (first, second)]
    assert (factors[0] == factors[1]).all()
    assert factors[0].max() == 8
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_of_attention_that_llama_cpp_lacks_are_refused(family, tmp_path):
    source = save_tiny(tmp_path / "source", family)  # windows in all blocks; in one of two
    with pytest.raises(SourceError, match="would compute something else"):
        pairquant.quantize_as(
            "gguf", source, tmp_path / "model.gguf", pairquant.QuantConfig(preset="rtn", group_size=32)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pieces_with_scores(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("the other then\n" * 50)
    for name, space in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / name / "tokenizer"), vocab_size=20, model_type="bpe",
            add_dummy_prefix=space, user_defined_symbols=["<turn>"], minloglevel=2,
        )  # fmt: skip
        number = sentencepiece.SentencePieceProcessor(str(tmp_path / name / "tokenizer.model")).PieceToId("<turn>")
        added = [{"id": number, "content": "<turn>", "special": True}]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        found = tokenizer_of(tmp_path / name, 24)
        assert (found.model, found.prefix) == ("llama", space)
        assert (found.tokens[number], found.kinds[number]) == (b"<turn>", gguf.TokenType.CONTROL)
        assert len(found.tokens) == len(found.scores) == 24


def test_rows_of_a_pair_lie_side_by_side():
    config = AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=1, hidden_size=8)
    rows = torch.arange(8)[:, None]
    turned = FAMILIES["llama"].rows("model.layers.0.self_attn.q_proj", rows, config)
    assert turned.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    for path in ("layers.0.self_attn.v_proj", "model.embed_tokens"):
        assert torch.equal(FAMILIES["llama"].rows(path, rows, config), rows)
    assert torch.equal(FAMILIES["qwen2"].rows("layers.0.self_attn.q_proj", rows, config), rows)


def splits(number, words=WORDS):
    steps = [{"type": "Split", "pattern": {"Regex": words % number}}, {"type": "ByteLevel", "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("name", "pre_tokenizer"),
    [
        ("gpt-2", {"type": "ByteLevel"}),
        ("llama-bpe", splits(r"\p{N}{1,3}")),
        ("qwen2", splits(r"\p{N}")),
        ("smollm", {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"},
        ]}),
    ],
)  # fmt: skip
def test_ways_of_splitting_are_known_by_their_look(name, pre_tokenizer):
    assert splitting_of({"model": {"type": "BPE"}, "pre_tokenizer": pre_tokenizer}) == name


def test_other_tokenizers_are_refused():
    letters = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}]+|%s| ?[^\s\p{L}\p{N}]+"  # by case, as Tekken's
    with pytest.raises(SourceError, match="splits text in a way that is not known"):
        splitting_of({"model": {"type": "BPE"}, "pre_tokenizer": splits(r"\p{N}", letters)})
    with pytest.raises(SourceError, match="splits text in a way that is not known"):
        splitting_of({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(SourceError, match=r"no tokenizer\.model"):
        splitting_of({"model": {"type": "BPE", "byte_fallback": True}})


def test_kinds_of_tokens():
    spoken = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    spoken["added_tokens"].append({"id": 261, "content": "<call>", "special": False})
    tokens, kinds = tokens_of(spoken, 263)
    assert (tokens[1], kinds[1]) == ("<s>", gguf.TokenType.CONTROL)
    assert kinds[100] == gguf.TokenType.NORMAL
    assert (tokens[261], kinds[261]) == ("<call>", gguf.TokenType.USER_DEFINED)
    assert (tokens[262], kinds[262]) == ("[PAD262]", gguf.TokenType.UNUSED)

"""The plugin for SGLang, against stand-ins for the few names that it takes from there: SGLang does not install without CUDA.

benchmarks/sglang_families.py runs the engine itself, on a CPU too.
"""

import shutil
import sys
from hashlib import sha1
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tomllib
import torch
from packed import random_packed

from pairquant.core.linear import forward
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError, ConfigError

SPEC = Spec(4, 32, 2)


class Linear(torch.nn.Module):
    """What SGLang's linear layers have that the plugin reads."""

    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


class Experts(torch.nn.Module):
    pass


class Embedding(torch.nn.Module):
    pass


class Plain:
    def process_weights_after_loading(self, layer):
        pass


@pytest.fixture
def sglang(monkeypatch):
    """Our plugin on stand-ins of SGLang's modules; `stages` and `tables` are what the modules hold."""
    group = {"get_group_rank_size": lambda group: (0, 1) if group is None else group}
    choices = ["awq"]
    tables = SimpleNamespace(QUANTIZATION_METHODS={}, CPU_QUANTIZATION_METHODS={})
    parallel = SimpleNamespace(pp_size=1)
    model = SimpleNamespace(model_path="org/model", revision=None, download_dir=None)
    drafts = SimpleNamespace(speculative_draft_model_revision="drafts")
    names = {
        "distributed.utils": group,
        "runtime_context": {"get_parallel": lambda: parallel, "get_model": lambda: model, "get_spec": lambda: drafts},
        "arg_groups.choices": {"QUANTIZATION_CHOICES": choices, "add_quantization_method_choices": choices.extend},
        "layers.quantization": vars(tables),
        "layers.quantization.base_config": {"LinearMethodBase": object, "QuantizationConfig": object},
        "layers.quantization.unquant": {"UnquantizedLinearMethod": Plain},
        "layers.linear": {"LinearBase": Linear},
        "layers.moe.fused_moe_triton": {"FusedMoE": Experts},
        "layers.vocab_parallel_embedding": {"VocabParallelEmbedding": Embedding},
    }
    for name, content in names.items():
        parts = f"sglang.srt.{name}".split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path])
        sys.modules[f"sglang.srt.{name}"].__dict__.update(content)
    ours = "pairquant.integrations.sglang"
    for name in ("linear", "config"):
        monkeypatch.delitem(sys.modules, f"{ours}.{name}", raising=False)
    found = SimpleNamespace(config=import_module(f"{ours}.config"), linear=import_module(f"{ours}.linear"))
    found.model, found.parallel, found.choices, found.tables = (
        model,
        parallel,
        choices,
        sys.modules["sglang.srt.layers.quantization"],
    )
    yield found
    for name in ("linear", "config"):
        sys.modules.pop(f"{ours}.{name}", None)


def settings(sglang, *packed, **merged):
    config = sglang.config.PairQuantConfig(CheckpointConfig(SPEC), merged)
    config.take_names(f"{path}.qweight" for path in packed)
    return config


def test_the_entry_point_enters_the_method_into_sglangs_tables_once(sglang):
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    register = EntryPoint("", project["entry-points"]["sglang.srt.plugins"]["pairquant"], "").load()
    register()
    register()
    assert sglang.choices == ["awq", "paroquant"]
    for table in (sglang.tables.QUANTIZATION_METHODS, sglang.tables.CPU_QUANTIZATION_METHODS):
        assert table["paroquant"].get_name() == "paroquant"


def test_layers_are_ours_where_the_checkpoint_holds_them_packed(sglang):
    config = settings(sglang, "a.q_proj", "a.k_proj", "a.v_proj", "a.in_x", "a.in_y", in_proj=["in_x", "in_y"])
    for prefix, packed in (("a.qkv_proj", True), ("a.in_proj", True), ("a.o_proj", False)):
        method = config.get_quant_method(Linear(), prefix)
        assert isinstance(method, sglang.linear.PairQuantLinearMethod) is packed
        assert config.is_linear_unquantized(prefix) is not packed
    assert config.get_quant_method(torch.nn.Identity(), "a.attn") is None
    config.require_all_claimed()


def test_asking_whether_a_layer_is_plain_claims_nothing(sglang):
    config = settings(sglang, "a.o_proj")
    assert not config.is_linear_unquantized("a.o_proj")
    with pytest.raises(CheckpointError, match=r"1 quantized layers, such as a.o_proj, have no linear layer"):
        config.require_all_claimed()


def test_packed_weights_that_find_no_layer_are_an_error_at_the_first_layer_even_if_it_is_plain(sglang):
    config = settings(sglang, "model.language_model.a.o_proj")
    method = config.get_quant_method(Linear(), "model.a.o_proj")
    with pytest.raises(CheckpointError, match="--format awq"):
        method.process_weights_after_loading(Linear())


@pytest.mark.parametrize(
    ("layer", "packed", "prefix"),
    [(Experts, "a.experts.0.up_proj", "a.experts"), (Embedding, "lm_head", "lm_head")],
)
def test_packed_experts_and_embeddings_are_refused(sglang, layer, packed, prefix):
    config = settings(sglang, packed)
    with pytest.raises(CheckpointError, match=f"{packed} is quantized, but SGLang runs it within a {layer.__name__}"):
        config.get_quant_method(layer(), prefix)
    assert config.get_quant_method(layer(), "b.other") is None


def read_config(sglang, model):
    """What SGLang is handed for a directory or hub name."""
    added = {"packed_modules_mapping": {"in_proj": ["x", "y"]}, "hf_config": SimpleNamespace(name_or_path=str(model))}
    return sglang.config.PairQuantConfig.from_config(CheckpointConfig(SPEC).to_dict() | added)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, without any model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def downloaded(cache, name, revision):
    """Where the files of a revision of a model lie in a cache: there are none yet."""
    home, commit = cache / f"models--{name.replace('/', '--')}", sha1(revision.encode()).hexdigest()
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    return home / "snapshots" / commit


def test_config_json_and_the_files_of_a_directory_are_read(sglang, tiny_checkpoint):
    config = read_config(sglang, tiny_checkpoint)
    assert "model.layers.0.self_attn.q_proj" in config.quantized
    assert "lm_head" not in config.quantized
    assert config.members("a.in_proj") == ["a.x", "a.y"]


@pytest.mark.parametrize(
    ("name", "revision", "wanted"),
    [("org/model", None, "main"), ("org/model", "tag", "tag"), ("org/draft", "tag", "drafts")],
)
def test_the_files_of_a_hub_name_are_read_from_the_cache(sglang, cache, tiny_checkpoint, name, revision, wanted):
    sglang.model.revision = revision
    for other in {"main", "tag", "drafts"} - {wanted}:
        downloaded(cache, name, other)
    with pytest.raises(ConfigError, match=rf"'{name}' is neither a directory nor a hub name .*--local-dir DIRECTORY"):
        read_config(sglang, name)
    shutil.copytree(tiny_checkpoint, downloaded(cache, name, wanted), dirs_exist_ok=True)
    assert read_config(sglang, name).quantized == read_config(sglang, tiny_checkpoint).quantized


def test_the_files_are_looked_for_where_sglang_downloads_to(sglang, cache, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, downloaded(tmp_path / "here", "org/model", "main"), dirs_exist_ok=True)
    sglang.model.download_dir = str(tmp_path / "here")
    assert read_config(sglang, "org/model").quantized


@pytest.mark.parametrize("model", ["org/model", "", "/no/such/directory"])
def test_a_model_whose_files_are_not_here_is_refused(sglang, cache, model):
    with pytest.raises(ConfigError, match=f"model {model!r} is neither a directory"):
        read_config(sglang, model)


def test_a_hub_name_with_a_missing_file_is_refused(sglang, cache):
    index = downloaded(cache, "org/model", "main") / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.qweight": "model-1.safetensors"}}')
    with pytest.raises(ConfigError, match="whose files are all in the hub's cache"):
        read_config(sglang, "org/model")


def test_pipeline_stages_are_refused(sglang):
    sglang.parallel.pp_size = 2
    with pytest.raises(ConfigError, match=r"--pipeline-parallel-size is 2, allowed.*: 1"):
        sglang.config.PairQuantConfig.from_config(CheckpointConfig(SPEC).to_dict())


def cut(packed, rows=None, channels=None):
    """The reference's weight, rows and channels of one rank."""
    from pairquant.core.linear import decode

    weight = decode(packed)
    return weight[slice(None) if rows is None else rows, slice(None) if channels is None else channels]


def test_rows_are_shared_out_to_ranks_and_heads_of_keys_and_values_are_had_in_common(sglang):
    """Four ranks, two heads of keys and values: ranks 2 and 3 have the second head's rows."""
    q, k, v = (random_packed(rows, 64, 32, 2, seed=seed) for seed, rows in enumerate((64, 32, 32)))
    for rank in range(4):
        config = settings(sglang, "a.q_proj", "a.k_proj", "a.v_proj")
        layer = Linear(tp_group=(rank, 4), kv_tp_group=(rank, 4), num_kv_head_replicas=2, output_size_per_partition=48)
        method = config.get_quant_method(layer, "a.qkv_proj")
        method.create_weights(layer, 64, [16, 16, 16], 64, 192, torch.float32, weight_loader=None)
        for shard, packed in (("q", q), ("k", k), ("v", v)):
            for name in packed.layout.fields():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, packed[name], shard)
        method.process_weights_after_loading(layer)
        x, head = torch.randn(3, 64), rank // 2
        mine = [cut(q, slice(16 * rank, 16 * rank + 16)), *(cut(p, slice(16 * head, 16 * head + 16)) for p in (k, v))]
        torch.testing.assert_close(method.apply(layer, x), x @ torch.cat(mine).T, rtol=1e-3, atol=1e-4)


def test_channels_are_shared_out_to_ranks(sglang):
    packed = random_packed(16, 128, 32, 2)
    x = torch.randn(3, 128)
    parts = []
    for rank in range(2):
        config = settings(sglang, "a.down_proj")
        layer = Linear(tp_group=(rank, 2))
        method = config.get_quant_method(layer, "a.down_proj")
        method.create_weights(layer, 64, [16], 128, 16, torch.float32, weight_loader=None)
        for name in packed.layout.fields():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, packed[name])
        method.process_weights_after_loading(layer)
        parts.append(method.apply(layer, x[:, rank * 64 : rank * 64 + 64]))
    torch.testing.assert_close(sum(parts), forward(packed, x), rtol=1e-3, atol=1e-4)


def test_a_matrix_that_is_fused_on_disk_is_taken_apart(sglang):
    whole = random_packed(96, 64, 32, 2)
    config = settings(sglang, "a.gate_up_proj")
    layer = Linear(tp_group=(1, 2), output_size_per_partition=48)
    method = config.get_quant_method(layer, "a.gate_up_proj")
    method.create_weights(layer, 64, [24, 24], 64, 96, torch.float32, weight_loader=None)
    for name in whole.layout.fields():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, whole[name])
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    mine = torch.cat([cut(whole, slice(24, 48)), cut(whole, slice(72, 96))])
    torch.testing.assert_close(method.apply(layer, x), x @ mine.T, rtol=1e-3, atol=1e-4)


def test_a_tensor_that_is_too_short_is_refused_where_sglang_would_fill_it_with_zeros(sglang):
    packed = random_packed(16, 64, 32, 2)
    config = settings(sglang, "a.o_proj")
    layer = Linear()
    method = config.get_quant_method(layer, "a.o_proj")
    method.create_weights(layer, 64, [16], 64, 16, torch.float32, weight_loader=None)
    with pytest.raises(CheckpointError, match=r"a.o_proj.scales has shape \[2, 8\], must be \[2, 16\]"):
        layer.scales.weight_loader(layer.scales, packed["scales"][:, :8])

"""Which of vLLM's layers are ours, by their paths, and what is refused before anything is loaded."""

import pickle
from dataclasses import replace

import pytest
import torch

from pairquant.kernels.run.decoded_budget import VARIABLES
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError

pytest.importorskip("vllm", reason="needs vLLM")


def settings(**changes):
    from pairquant.integrations.vllm.config import PairQuantConfig

    config = PairQuantConfig(replace(CheckpointConfig(Spec(4, 32, 2)), **changes))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def bare_linear():
    from pairquant.integrations.vllm.compat import LinearBase

    layer = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    return layer


def test_layers_are_quantized_where_the_checkpoint_holds_them_packed():
    from pairquant.integrations.vllm.compat import UnquantizedLinearMethod

    config = settings(modules_to_not_convert=("a.o_proj",))
    config.quantized = dict.fromkeys(
        (
            "a.q_proj",
            "a.k_proj",
            "a.v_proj",
            "a.o_proj",
        ),
        Spec(4, 32, 2),
    )
    for prefix, plain in (("a.qkv_proj", False), ("a.o_proj", False), ("a.down_proj", True)):
        assert isinstance(config.get_quant_method(bare_linear(), prefix), UnquantizedLinearMethod) is plain
    assert config.get_quant_method(torch.nn.Identity(), "a.attn") is None


@pytest.mark.parametrize("variable", VARIABLES.values())
def test_vllms_compiler_hears_what_decides_which_decoded_weights_are_kept(variable, monkeypatch):
    import vllm.config

    keys = []
    for value in ("0", "1.5"):
        monkeypatch.setenv(variable, value)
        with vllm.config.set_current_vllm_config(whole := vllm.config.VllmConfig()):
            settings().get_quant_method(bare_linear(), "a.down_proj")
        keys.append(whole.compute_hash())
    assert keys[0] != keys[1], "the graphs of one are never taken for those of the other"


def test_without_files_the_configuration_says_which_layers_are_plain():
    from pairquant.integrations.vllm.compat import UnquantizedLinearMethod

    config = settings(modules_to_not_convert=("a.o_proj",))
    assert isinstance(config.get_quant_method(bare_linear(), "a.o_proj"), UnquantizedLinearMethod)
    assert not isinstance(config.get_quant_method(bare_linear(), "a.qkv_proj"), UnquantizedLinearMethod)


def test_layers_that_are_merged_but_quantized_in_part_are_refused():
    config = settings()
    config.quantized = dict.fromkeys(
        (
            "a.q_proj",
            "a.k_proj",
        ),
        Spec(4, 32, 2),
    )
    with pytest.raises(CheckpointError, match=r"only a.q_proj, a.k_proj is quantized"):
        config.get_quant_method(bare_linear(), "a.qkv_proj")


def test_layers_that_are_merged_but_stored_differently_are_refused_before_loading():
    config = settings()
    config.quantized = dict.fromkeys(("a.q_proj", "a.k_proj"), Spec(4, 32, 2)) | {"a.v_proj": Spec(8, 32, 2)}
    with pytest.raises(CheckpointError, match=r"a.v_proj has 8 bits.*one --override for all of them"):
        config.get_quant_method(bare_linear(), "a.qkv_proj")
    same = dict.fromkeys(("a.q_proj", "a.k_proj", "a.v_proj"), Spec(8, 64, 0))
    config.quantized = same | {"a.o_proj": Spec(4, 32, 2)}
    assert config.get_quant_method(bare_linear(), "a.qkv_proj").spec == Spec(8, 64, 0)


def test_quantized_experts_in_a_layer_that_is_not_known_are_refused():
    config = settings()
    config.quantized = dict.fromkeys(("a.mlp.experts.0.up_proj",), Spec(4, 32, 2))
    with pytest.raises(CheckpointError, match="for which there is no kernel"):
        config.get_quant_method(torch.nn.Identity(), "a.mlp.experts")
    assert config.get_quant_method(torch.nn.Identity(), "b.mlp.experts") is None


def test_what_is_fused_on_disk_is_quantized_whatever_its_parts_are_called():
    from pairquant.integrations.vllm.compat import UnquantizedLinearMethod

    config = settings()
    config.quantized = dict.fromkeys(("a.qkv_proj",), Spec(4, 32, 2))
    assert not isinstance(config.get_quant_method(bare_linear(), "a.qkv_proj"), UnquantizedLinearMethod)


def test_names_follow_the_models_mapper():
    from vllm.model_executor.models.utils import WeightsMapper

    config = settings()
    stored = "model.language_model.layers.0.o_proj"
    config.quantized, config.stored_as = {stored: Spec(4, 32, 2)}, {stored: stored}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert config.quantized == {"language_model.model.layers.0.o_proj": Spec(4, 32, 2)}
    assert config.stored_as == {"language_model.model.layers.0.o_proj": stored}


def test_experts_are_found_where_the_checkpoint_has_them_whatever_vllm_calls_their_layer():
    config = settings()
    config.quantized = dict.fromkeys(("model.layers.3.block_sparse_moe.experts.0.w1",), Spec(4, 32, 2))
    assert config._home_of_experts("model.layers.3.mlp.experts") == "model.layers.3.block_sparse_moe.experts"
    assert config._home_of_experts("model.layers.3.mlp") == "model.layers.3.mlp", "not a layer of experts"
    assert config._home_of_experts("model.layers.4.mlp.experts") == "model.layers.4.mlp.experts", "another block"


def test_a_worker_that_is_given_the_configuration_pickled_sorts_checkpoints_out_too(monkeypatch):
    config = settings()
    followed = []
    monkeypatch.setattr("pairquant.integrations.vllm.config.follow_checkpoints", followed.append)
    assert pickle.loads(pickle.dumps(config)).checkpoint == config.checkpoint
    assert len(followed) == 1

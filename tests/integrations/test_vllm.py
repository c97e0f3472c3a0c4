"""Our checkpoints in vLLM, as its users run them: each loads, and answers as the reference does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from agreement import FACTOR
from original_layout import write_original
from tiny_models import SIZES, TEXT, byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_worker import PROMPT

import pairquant
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import rotated_linears
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import Spec
from pairquant.support.errors import CheckpointError, ConfigError

pytest.importorskip("vllm", reason="needs vLLM")
WORKER = Path(__file__).parent.parent / "vllm_worker.py"
#: KL per token against the reference where vLLM runs decoded weights in float32; 2e-8 as measured.
EXACT = 1e-6


def quantized(root: Path, family: str, **options) -> Path:
    """A tiny checkpoint of ours."""
    source = save_tiny(root / f"{family}-source", family)
    config = pairquant.QuantConfig(
        preset="quick", group_size=32, rotations=2, samples=4, seq_len=32, calibration=(str(TEXT),), **options
    )
    pairquant.quantize(source, root / family, config, device="cpu")
    return root / family


def run(jobs: list[dict], root: Path) -> list[dict]:
    """What the worker made of each job."""
    file = root / f"jobs-{len(jobs)}.json"
    for i, job in enumerate(jobs):
        job["output"] = str(root / f"{file.stem}-{i}.pt")
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # vLLM has kernels of its own that it would break
    done = subprocess.run(
        [sys.executable, WORKER, file], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(job["output"]) for job in jobs]


def reference(model) -> torch.Tensor:
    """Log-probabilities, float32 [T - 1, V]."""
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, :-1].float().log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL in nats."""
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def load(path: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def allowed(expected: torch.Tensor, dense) -> float:
    """KL per token that packed layers may be from float32: that of a dense model in bfloat16, which it grows with the
    square of the noise."""
    return FACTOR**2 * divergence(expected, reference(dense))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def checkpoints(root):
    """Name → (directory, log-probabilities in float32): merged layers, biases, layers fused on disk, plain layers."""
    made = {
        "llama": quantized(root, "llama", share_rotations=True),
        "qwen2": quantized(root, "qwen2", ignore=("lm_head", "re:.*layers.0.mlp")),
        "phi3": quantized(root, "phi3"),
        "glm4": quantized(root, "glm4"),
    }
    found = {name: (path, reference(load(path))) for name, path in made.items()}
    # As the original writes it: four entries, nothing else to go by.
    config = LlamaConfig(**{**SIZES, "intermediate_size": 256})
    plain = write_original(root / "original", config, byte_tokenizer().save_pretrained)
    assert divergence(reference(plain), reference(load(root / "original"))) < 1e-6, "Transformers reads it otherwise"
    return found | {"original": (root / "original", reference(plain))}


@pytest.fixture(scope="module")
def adapted(checkpoints, root):
    """A LoRA adapter for "llama", and what the model then answers in float32."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(load(checkpoints["llama"][0]), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as trained: they start at zero
            parameter.data.normal_(std=0.1)
    model.save_pretrained(root / "adapter")
    return root / "adapter", reference(model)


@pytest.fixture(scope="module")
def noise(checkpoints, adapted):
    """Name, and "adapter" → the KL that is allowed in bfloat16."""
    from peft import PeftModel

    dense = {name: load(path, torch.bfloat16).dequantize() for name, (path, _) in checkpoints.items()}
    found = {name: allowed(expected, dense[name]) for name, (_, expected) in checkpoints.items()}
    return found | {"adapter": allowed(adapted[1], PeftModel.from_pretrained(dense["llama"], adapted[0]))}


@pytest.fixture(scope="module")
def answers(checkpoints, adapted, root):
    """(name, dtype), and "adapter" → log-probabilities from vLLM."""
    wanted = [(name, "bfloat16") for name in checkpoints] + [("qwen2", "float32")]
    jobs = [{"model": str(checkpoints[name][0]), "options": {"dtype": dtype}} for name, dtype in wanted]
    lora = {"model": str(checkpoints["llama"][0]), "options": {"dtype": "bfloat16"}, "adapter": str(adapted[0])}
    return dict(zip([*wanted, "adapter"], run([*jobs, lora], root), strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, "bfloat16") for n in ("llama", "qwen2", "phi3", "glm4", "original")), ("qwen2", "float32")],
)
def test_vllm_gives_the_reference_within_the_noise_of_its_dtype(checkpoints, noise, answers, name, dtype):
    answer = answers[name, dtype]
    assert "error" not in answer, answer
    assert divergence(checkpoints[name][1], answer["logprobs"]) < (noise[name] if dtype == "bfloat16" else EXACT)


def test_vllm_serves_lora_adapters_on_packed_layers(checkpoints, adapted, noise, answers):
    assert "error" not in answers["adapter"], answers["adapter"]
    found = answers["adapter"]["logprobs"]
    assert divergence(adapted[1], found) < noise["adapter"]
    assert divergence(checkpoints["llama"][1], found) > 10 * noise["adapter"], "the adapter changed nothing"


def test_two_ranks_and_a_compiled_graph_give_the_same(checkpoints, noise, root):
    path, expected = checkpoints["llama"]
    options = {"dtype": "bfloat16", "tensor_parallel_size": 2, "enforce_eager": False}
    (answer,) = run([{"model": str(path), "options": options}], root)
    assert "error" not in answer, answer
    assert divergence(expected, answer["logprobs"]) < noise["llama"]


def test_the_plain_layers_of_the_mixed_checkpoint_are_plain(checkpoints):
    paths = {path for path, _ in rotated_linears(load(checkpoints["qwen2"][0]))}
    assert "model.layers.1.mlp.up_proj" in paths
    assert "model.layers.0.mlp.up_proj" not in paths


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


def test_quantized_experts_are_refused():
    config = settings()
    config.quantized = dict.fromkeys(("a.mlp.experts.0.up_proj",), Spec(4, 32, 2))
    with pytest.raises(CheckpointError, match="no kernel yet"):
        config.get_quant_method(torch.nn.Identity(), "a.mlp.experts")
    assert config.get_quant_method(torch.nn.Identity(), "b.mlp.experts") is None


def test_what_is_fused_on_disk_is_quantized_whatever_its_parts_are_called():
    from pairquant.integrations.vllm.compat import UnquantizedLinearMethod

    config = settings()
    config.quantized = dict.fromkeys(("a.qkv_proj",), Spec(4, 32, 2))
    assert not isinstance(config.get_quant_method(bare_linear(), "a.qkv_proj"), UnquantizedLinearMethod)


@pytest.mark.parametrize("channels", [16, 48, 64])
def test_a_transform_of_another_width_is_refused(channels):
    from pairquant.integrations.vllm.linear import _Pending

    layer, layout = torch.nn.Module(), Spec(4, 32, 2).layout(64, 8)
    loader = _Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", layer)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 32, dtype=torch.float16), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"a.o_proj.theta has shape \[2, \d+\], must be \[2, 32\]"):
        loader(parameter, torch.zeros(2, channels, dtype=torch.float16))


def test_each_rank_takes_its_channels_of_a_transform():
    from pairquant.integrations.vllm.linear import _Pending

    layer, layout = torch.nn.Module(), Spec(4, 32, 2).layout(32, 8)
    layer.tp_rank = 1
    loader = _Pending("a.o_proj", [layout], torch.bfloat16, input_size=64).transform_loader("theta", layer)
    parameter = torch.nn.Parameter(torch.empty(1, 2, 16, dtype=torch.float16), requires_grad=False)
    theta = torch.randn(2, 32).half()
    loader(parameter, theta)
    assert torch.equal(parameter[0], theta[:, 16:])


def test_names_follow_the_models_mapper():
    from vllm.model_executor.models.utils import WeightsMapper

    config = settings()
    config.quantized = dict.fromkeys(("model.language_model.layers.0.o_proj",), Spec(4, 32, 2))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert config.quantized == {"language_model.model.layers.0.o_proj": Spec(4, 32, 2)}


def test_tensor_parallelism_that_would_split_a_group_is_refused():
    from pairquant.integrations.vllm.linear import PairQuantLinearMethod

    method = PairQuantLinearMethod(Spec(4, 64, 2), "a.down_proj")
    with pytest.raises(ConfigError, match=r"a.down_proj \(192 → 128\).*in_features 96.*tensor-parallel-size"):
        method.create_weights(torch.nn.Module(), 96, [128], 192, 128, torch.bfloat16, weight_loader=None)


def test_the_plugin_is_found_and_importing_it_loads_neither_kernels_nor_transformers():
    code = (
        "from importlib.metadata import entry_points; import sys; "
        "(own,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'pairquant']; register = own.load(); "
        "print(sorted({'torch', 'transformers', 'vllm', 'pairquant.layers.linear'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_and_running_agree_on_what_a_linear_is(checkpoints):
    """The checkpoint that the independent writer made is, to our reader, packed linears of the original's group size."""
    layers = [m for m in load(checkpoints["original"][0]).modules() if isinstance(m, RotatedLinear)]
    assert len(layers) == 14
    assert {layer.layout.group_size for layer in layers} == {128}

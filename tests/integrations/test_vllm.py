"""Our checkpoints in vLLM, as its users run them: each loads, and answers as the reference does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import FACTOR
from original_layout import write_original
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, TEXT, byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig
from vllm_worker import PROMPT

import pairquant
from pairquant.formats.table import FORMATS
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import rotated_linears

pytest.importorskip("vllm", reason="needs vLLM")
WORKER = Path(__file__).parent.parent / "vllm_worker.py"
#: KL per token against the reference where vLLM runs decoded weights in float32; 2e-8 as measured.
EXACT = 1e-6
#: Widths without a kernel, in layers that vLLM merges and in one that it does not; merged layers without rotations.
MIXED = (
    "re:.*layers.1.self_attn.[qkv]_proj=bits:5",
    "o_proj=bits:6,rotations:0",
    "re:.*layers.1.mlp.(gate|up)_proj=rotations:0",
)


#: Checkpoints whose layers are run with what comes before them, and how many norms and activations that are: in "qwen2" one
#: MLP is plain.
FUSED = (("llama", "bfloat16", (4, 2)), ("qwen2", "float32", (3, 1)))


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
        "llama": quantized(root, "llama", share_rotations=True, embedding_bits=6),
        "qwen2": quantized(root, "qwen2", ignore=("lm_head", "re:.*layers.0.mlp"), overrides=MIXED, head_bits=6),
        "phi3": quantized(root, "phi3", head_bits=4, embedding_bits=4),  # vLLM pads its 288 rows to 320
        "glm4": quantized(root, "glm4", weights="mxfp4"),
    }
    found = {name: (path, reference(load(path))) for name, path in made.items()}
    # As the original writes it: four entries, nothing else to go by.
    config = LlamaConfig(**{**SIZES, "intermediate_size": 256})
    plain = write_original(root / "original", config, byte_tokenizer().save_pretrained)
    assert divergence(reference(plain), reference(load(root / "original"))) < 1e-6, "Transformers reads it otherwise"
    return found | {"original": (root / "original", reference(plain))}


@pytest.fixture(scope="module")
def exported(root):
    """Format → (the checkpoint without transforms that it was made of, what vLLM answered)."""
    source, made = save_tiny(root / "plain-source", "qwen2"), {}
    for symmetric in (False, True):
        options = {"group_size": 32, "samples": 4, "seq_len": 32, "calibration": (str(TEXT),), "symmetric": symmetric}
        config = FORMATS["awq"].settled(pairquant.QuantConfig(preset="quick", ignore=("lm_head", "o_proj"), **options))
        pairquant.quantize(source, root / f"plain-{symmetric}", config, device="cpu")
    for to, symmetric in {"awq": False, "gptq": True, "compressed-tensors": False}.items():
        made[to] = root / f"plain-{symmetric}"
        pairquant.export(made[to], root / to, to)
    results = run([{"model": str(root / to), "options": {"dtype": "bfloat16"}} for to in made], root)
    return {to: (made[to], result) for to, result in zip(made, results, strict=True)}


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors"])
def test_other_formats_run_by_vllms_own_kernels(exported, to):
    checkpoint, result = exported[to]
    expected = reference(load(checkpoint))
    assert "error" not in result, result
    assert divergence(expected, result["logprobs"]) < allowed(expected, load(checkpoint, torch.bfloat16))


@pytest.fixture(scope="module")
def experts(root):
    """Family → a tiny model with experts, and its log-probabilities in float32; "original": as the original lays them out."""
    sizes = {**SIZES, "intermediate_size": 64, "num_experts_per_tok": 2}
    configs = {
        "qwen3-moe": Qwen3MoeConfig(**sizes, moe_intermediate_size=64, num_experts=4),
        # Biases, and gates between ups; vLLM's own loader for it passes over names that it does not know.
        "gpt-oss": GptOssConfig(**sizes, num_local_experts=4, sliding_window=32),
    }
    made = {family: quantized_experts(root, family, config) for family, config in configs.items()}
    sizes["intermediate_size"] = 128
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=128, num_experts=4)
    plain = write_original(root / "original-experts", config, byte_tokenizer().save_pretrained)
    return made | {"original": (root / "original-experts", reference(plain))}


def quantized_experts(root, family, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    source, packed = root / f"{family}-source", root / family
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    options = {"group_size": 32, "rotations": 2, "samples": 2, "seq_len": 32, "calibration": (str(TEXT),)}
    config = pairquant.QuantConfig(preset="quick", **options)
    pairquant.quantize(source, packed, config, device="cpu")
    return packed, reference(load(packed))


def test_experts_answer_as_the_reference_does(experts, root):
    jobs = [{"model": str(path), "options": {"dtype": "float32"}} for path, _ in experts.values()]
    results = run(jobs, root)
    for found, (family, (_, expected)) in zip(results, experts.items(), strict=True):
        assert divergence(expected, found["logprobs"]) < EXACT, family
    said = [line for found in results for line in found["said"]]
    assert any("decoded on loading" in line and "bfloat16 only" in line for line in said), said


def test_experts_run_from_their_codes_in_bfloat16(experts, root):
    """Every token gets all experts, so that no near tie of a router is decided otherwise than by the reference."""
    paths = []
    for family in ("qwen3-moe", "gpt-oss"):
        paths.append(root / f"{family}-all")
        shutil.copytree(experts[family][0], paths[-1])
        config = json.loads((paths[-1] / "config.json").read_text())
        (paths[-1] / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 4}))
    for path, found in zip(
        paths, run([{"model": str(p), "options": {"dtype": "bfloat16"}} for p in paths], root), strict=True
    ):
        expected = reference(load(path))
        assert "error" not in found, found
        assert divergence(expected, found["logprobs"]) < allowed(expected, load(path, torch.bfloat16)), path.name
        assert not any("decoded" in line for line in found["said"]), found["said"]


def test_an_experts_tensor_that_is_missing_is_named(experts, root):
    path, _ = experts["qwen3-moe"]
    shutil.copytree(path, root / "lacking")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_weight_theta"]
    save_file(tensors, root / "lacking" / "model.safetensors", {"format": "pt"})
    (found,) = run([{"model": str(root / "lacking"), "options": {"dtype": "float32"}}], root)
    assert "model.layers.1.mlp.experts.down_weight_theta is missing" in found["error"]


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
def rounding(root):
    """A checkpoint whose layers round what they read, coarsely, so that it shows."""
    return quantized(root, "qwen3", activations="int4")


@pytest.fixture(scope="module")
def answers(checkpoints, adapted, rounding, root):
    """(name, dtype), FUSED, "rounded", "adapter" and "compiled" → log-probabilities from vLLM, and what was logged."""
    wanted = [(name, "bfloat16") for name in checkpoints] + [("qwen2", "float32")]
    jobs = [{"model": str(checkpoints[name][0]), "options": {"dtype": dtype}} for name, dtype in wanted]
    jobs += [
        {"model": str(checkpoints[name][0]), "options": {"dtype": dtype}, "fused": True} for name, dtype, _ in FUSED
    ]
    llama = {"model": str(checkpoints["llama"][0]), "options": {"dtype": "bfloat16"}, "fused": True}
    lora = {**llama, "adapter": str(adapted[0])}
    graph = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}  # traced, but by no compiler
    compiled = {**llama, "options": {**llama["options"], **graph}}
    rounded = {"model": str(rounding), "options": {"dtype": "float32"}}
    names = [*wanted, *FUSED, "rounded", "adapter", "compiled"]
    return dict(zip(names, run([*jobs, rounded, lora, compiled], root), strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, "bfloat16") for n in ("llama", "qwen2", "phi3", "glm4", "original")), ("qwen2", "float32")],
)
def test_vllm_gives_the_reference_within_the_noise_of_its_dtype(checkpoints, noise, answers, name, dtype):
    answer = answers[name, dtype]
    assert "error" not in answer, answer
    assert divergence(checkpoints[name][1], answer["logprobs"]) < (noise[name] if dtype == "bfloat16" else EXACT)


def test_vllm_rounds_activations_as_transformers_does(rounding, answers):
    assert "error" not in answers["rounded"], answers["rounded"]
    found, expected = answers["rounded"]["logprobs"], reference(load(rounding))
    assert divergence(expected, found) < EXACT
    without = reference(load(rounding).dequantize())  # layers that read their input as it is
    assert divergence(without, found) > 100 * EXACT


@pytest.mark.parametrize(("name", "dtype", "number"), FUSED, ids=str)
def test_layers_with_what_comes_before_them_give_the_same(answers, name, dtype, number):
    """On CPUs they compute the same in the same order, so every bit is equal; the kernels of GPUs have tests of their own."""
    found = answers[name, dtype, number]
    assert "error" not in found, found
    (said,) = found["said"]
    assert said.startswith("{} norms and {} activations".format(*number))
    assert torch.equal(found["logprobs"], answers[name, dtype]["logprobs"])
    assert answers[name, dtype]["said"] == [], "no backend of CPUs is faster so"


def test_one_graph_holds_layers_with_what_comes_before_them_for_any_number_of_tokens(checkpoints, noise, answers):
    found = answers["compiled"]
    assert "error" not in found, found
    assert len(found["said"]) == 1
    assert divergence(checkpoints["llama"][1], found["logprobs"]) < noise["llama"]


def test_layers_that_may_get_adapters_stay_as_they_are(answers):
    assert answers["adapter"]["said"] == []


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

"""LoRA through PEFT on a quantized model, with nothing to call but `import pairquant`."""

import subprocess
import sys
import warnings

import pytest
import torch
from agreement import ROUNDING, distance
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

import pairquant
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import link_siblings, rotated_linears

TARGETS = ["q_proj", "down_proj"]
DTYPES = [torch.float32, torch.bfloat16]


def load(checkpoint, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def adapted(checkpoint, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return get_peft_model(load(checkpoint, dtype), LoraConfig(r=4, target_modules=TARGETS, **options))


def train(model, tokens, steps=8):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens).logits.float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_lowers_the_loss_and_leaves_the_codes_alone(tiny_checkpoint, tokens, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of layer types it does not know
        model = adapted(tiny_checkpoint, dtype, lora_dropout=0.1)
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    losses = train(model, tokens)
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = {
        name.rpartition(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == set(TARGETS)


def test_a_model_that_ran_in_inference_mode_can_still_be_trained(tiny_checkpoint, tokens):
    for dtype in DTYPES:
        model = adapted(tiny_checkpoint, dtype)
        with torch.inference_mode():
            model(tokens)
        losses = train(model, tokens, steps=2)
        assert losses[1] < losses[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_adapter_loads_by_peft_and_by_transformers(tiny_checkpoint, tokens, tmp_path, dtype):
    model = adapted(tiny_checkpoint, dtype)
    train(model, tokens, steps=3)
    expected = logits(model, tokens)
    assert distance(logits(load(tiny_checkpoint, dtype), tokens), expected) > 0.05, "the adapter changed nothing"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(tiny_checkpoint, dtype), tmp_path)
    assert distance(logits(again, tokens), expected) <= ROUNDING[dtype]
    plain = load(tiny_checkpoint, dtype)
    plain.load_adapter(str(tmp_path))  # in bfloat16 Transformers keeps the adapter in bfloat16, PEFT in float32
    assert distance(logits(plain, tokens), expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}], ids=["plain", "bias and rslora"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_merging_gives_plain_layers_that_save_and_load(tiny_checkpoint, tokens, tmp_path, dtype, options):
    model = adapted(tiny_checkpoint, dtype, **options)
    train(model, tokens, steps=3)
    expected = logits(model, tokens)
    merged = model.merge_and_unload(safe_merge=True)
    attention = merged.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear
    assert attention.q_proj.weight.dtype == dtype
    assert isinstance(attention.k_proj, RotatedLinear)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # merged weights are rounded to bfloat16
    assert distance(logits(merged, tokens), expected) < tolerance
    if not options:  # the plain LLaMA has no biases to load
        merged.save_pretrained(tmp_path / "merged")
        entries = merged.config.quantization_config.to_dict()
        assert "model.layers.1.mlp.down_proj" in entries["modules_to_not_convert"]
        assert distance(logits(load(tmp_path / "merged", dtype), tokens), logits(merged, tokens)) <= ROUNDING[dtype]


def test_all_linear_means_ours_too_also_for_a_second_adapter(tiny_checkpoint):
    model = get_peft_model(load(tiny_checkpoint), LoraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    adapters = [set(module.lora_A) for _, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapters == [{"default", "second"}] * 14


def test_merging_every_layer_saves_a_plain_model(tiny_checkpoint, tmp_path):
    model = get_peft_model(load(tiny_checkpoint), LoraConfig(r=2, target_modules="all-linear"))
    merged = model.merge_and_unload()
    assert not any(rotated_linears(merged))
    merged.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()


def test_merging_into_layers_that_round_what_they_read_is_warned_of(rounding_checkpoint):
    model = adapted(rounding_checkpoint)
    with pytest.warns(UserWarning, match="round what they read to int8"):
        merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def test_unloading_gives_the_quantized_model_back(tiny_checkpoint, tokens):
    expected = logits(load(tiny_checkpoint), tokens)
    model = adapted(tiny_checkpoint)
    train(model, tokens, steps=1)
    with model.disable_adapter():
        assert distance(logits(model, tokens), expected) <= ROUNDING[torch.float32]
    assert distance(logits(model.unload(), tokens), expected) <= ROUNDING[torch.float32]


def test_training_after_kbit_preparation_with_checkpointing(tiny_checkpoint, tokens):
    model = prepare_model_for_kbit_training(load(tiny_checkpoint, torch.bfloat16))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)).train()
    losses = train(model, tokens, steps=3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the layer's weight"),
    ],
)
def test_what_needs_a_dense_weight_is_refused(tiny_checkpoint, options, message):
    with pytest.raises(pairquant.PairQuantError, match=message):
        adapted(tiny_checkpoint, **options)


def test_merging_in_place_is_refused(tiny_checkpoint):
    with pytest.raises(pairquant.PairQuantError, match="merge_and_unload"):
        adapted(tiny_checkpoint).merge_adapter()


def test_siblings_of_a_merged_layer_stay_together(tiny_checkpoint):
    layers = load(tiny_checkpoint).model.layers[0].self_attn
    link_siblings(layers)
    layers.q_proj.leave_siblings()
    assert layers.q_proj._merged.members == [layers.q_proj]
    assert layers.k_proj._merged is layers.v_proj._merged
    assert layers.k_proj._merged.members == [layers.k_proj, layers.v_proj]


def test_importing_pairquant_after_peft_is_enough_too():
    """Here pairquant came first, and Transformers asked whether PEFT is there: neither used up the import hook."""
    code = "import peft, pairquant; print(len(peft.LoraConfig()._custom_modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"

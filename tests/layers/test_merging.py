"""Layers that read the same input, run in one launch. The kernels' layout is forced onto the CPU here, where Triton's
interpreter (or, on a GPU machine, the GPU) runs it."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import ROUNDING, distance
from packed import random_packed
from torch import nn

pytest.importorskip("triton")

from pairquant.backends.table import BY_NAME
from pairquant.core.linear import decode, forward
from pairquant.layers.linear import RotatedLinear
from pairquant.layers.model import link_siblings, prepare, rotated_linears

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


class Attention(nn.Module):
    def __init__(self, channels=128, bias=False):
        super().__init__()
        for seed, (name, rows) in enumerate((("q_proj", 64), ("k_proj", 32), ("v_proj", 40), ("o_proj", 24))):
            packed = random_packed(rows, channels, 64, 2, seed, bias and name != "k_proj")
            setattr(self, name, RotatedLinear.from_packed(packed))


def built(bias=False):
    """Linked and repacked, and the packed linears it was made of."""
    module = Attention(bias=bias)
    packed = {name: copy.deepcopy(layer.packed) for name, layer in rotated_linears(module)}
    link_siblings(module)
    module.to(DEVICE)
    for layer in (module.q_proj, module.o_proj):
        layer._merged.build(BY_NAME["triton"])
    return module, packed


def test_threads_get_what_is_theirs(monkeypatch):
    """Stubbed product, so that threads change places as often as can be."""
    module, _ = built()
    monkeypatch.setattr(type(module.q_proj._merged), "_linear", lambda self, x: x.expand(-1, sum(self.sizes)).clone())
    layers = [module.q_proj, module.k_proj, module.v_proj]
    faults = []

    def ask(value):
        for step in range(3000):
            x = torch.full((1, 1), value + 10.0 * step)
            faults.extend(layer for layer in layers if not (layer(x) == x).all())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert faults == []


@pytest.mark.parametrize("bias", [False, True])
def test_each_layer_gets_its_part(bias):
    module, packed = built(bias)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    for names in (("q_proj", "k_proj", "v_proj"), ("v_proj", "o_proj", "q_proj", "k_proj"), ("k_proj", "k_proj")):
        for name in names:
            want = forward(packed[name], x.cpu())
            got = getattr(module, name)(x).cpu()
            assert got.shape == want.shape
            assert error(got, want) < 1e-3, name


def test_siblings_share_one_launch_only_for_the_same_unchanged_input(monkeypatch):
    module, packed = built()
    calls = []
    plain = type(module.q_proj._merged)._linear
    monkeypatch.setattr(type(module.q_proj._merged), "_linear", lambda self, x: (calls.append(1), plain(self, x))[1])
    x = torch.randn(2, 128).half().to(DEVICE)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(module, name)(x)
    assert len(calls) == 1
    assert module.q_proj._merged.latest is None, "the input is kept alive"
    module.q_proj(x)
    x.mul_(2)
    assert error(module.k_proj(x).cpu(), forward(packed["k_proj"], x.cpu())) < 1e-3
    assert len(calls) == 3
    assert error(module.v_proj(x.clone()).cpu(), forward(packed["v_proj"], x.cpu())) < 1e-3


def test_what_was_computed_without_gradients_is_not_handed_out_with():
    module, packed = built()
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    with torch.no_grad():
        module.q_proj(x)
    module.k_proj(x).sum().backward()
    assert error(x.grad.cpu(), decode(packed["k_proj"]).sum(0).expand(2, -1)) < 1e-3


def test_an_adapter_beside_a_merged_layer():
    """PEFT places its weights by the layer's codes, which repacking has taken away; siblings get the same input."""
    peft = pytest.importorskip("peft")
    module, packed = built()
    module.norm = nn.LayerNorm(128, device=DEVICE)  # PEFT takes a model's device from its first parameter
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), module)
    delta = module.q_proj.get_delta_weight("default").cpu()
    assert delta.abs().max() > 0
    for want, name in ((decode(packed["q_proj"]) + delta, "q_proj"), (decode(packed["k_proj"]), "k_proj")):
        assert error(getattr(module, name)(x).detach().cpu(), x.cpu() @ want.T.detach()) < 1e-3
    module.v_proj(x)
    assert module.k_proj._merged.latest is None, "the input is kept alive"
    assert module.k_proj._merged.backend is not None
    dense = module.q_proj.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    assert error(dense(x).detach().cpu(), x.cpu() @ (decode(packed["q_proj"]) + delta).T.detach()) < 1e-3
    assert module.k_proj._merged.members == [module.k_proj, module.v_proj]
    assert error(module.k_proj(x).detach().cpu(), forward(packed["k_proj"], x.cpu())) < 1e-3


def test_stored_tensors_survive_repacking_saving_and_moving():
    module, packed = built(bias=True)
    assert module.q_proj.qweight.numel() == 0, "the stored codes are still held beside the repacked ones"
    state = module.state_dict()
    for name, linear in packed.items():
        for key, tensor in linear.tensors.items():
            assert torch.equal(state[f"{name}.{key}"].cpu(), tensor), f"{name}.{key}"
            assert state[f"{name}.{key}"].dtype == tensor.dtype
    module.to("cpu").half()
    assert module.q_proj._merged.backend is None
    for name, linear in packed.items():
        for key, tensor in linear.tensors.items():
            assert torch.equal(getattr(getattr(module, name), key), tensor)


def test_loading_into_repacked_layers():
    module, _ = built()
    other = {name: random_packed(layer.out_features, 128, 64, 2, seed=9) for name, layer in rotated_linears(module)}
    module.load_state_dict({f"{n}.{k}": t for n, p in other.items() for k, t in p.tensors.items()})
    x = torch.randn(2, 128)
    module.to("cpu")
    assert error(module.k_proj(x), forward(other["k_proj"], x)) < 1e-5


def test_what_does_not_fit_together_is_not_merged():
    module = Attention()
    module.k_proj = RotatedLinear.from_packed(random_packed(32, 128, 32, 2))
    link_siblings(module)
    assert len(module.q_proj._merged.members) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for machines without a GPU")
def test_nothing_is_repacked_on_a_cpu():
    module = Attention()
    link_siblings(module)
    prepare(module)
    assert module.q_proj._merged.backend is None


class OnCpu(nn.Module):
    """q, k and v, of rows that PyTorch's int4 product takes; only k has no bias."""

    def __init__(self):
        super().__init__()
        for seed, (name, rows) in enumerate((("q_proj", 64), ("k_proj", 32), ("v_proj", 48))):
            setattr(self, name, RotatedLinear.from_packed(random_packed(rows, 128, 64, 2, seed, bias=name != "k_proj")))


@pytest.mark.parametrize("trains", [False, True])
def test_on_a_cpu_layers_of_one_input_run_at_once_in_bfloat16(trains):
    module = OnCpu()
    alone = {name: layer(x) for name, layer in rotated_linears(module) for x in [inputs()]}
    link_siblings(module)
    x = inputs().requires_grad_(trains)
    found = {name: layer(x) for name, layer in rotated_linears(module)}
    assert module.q_proj._merged.backend is BY_NAME["cpu-int4"]
    for name, layer in rotated_linears(module):
        assert torch.equal(found[name].detach(), alone[name].detach())
        assert layer.qweight.numel(), "stored tensors stay"
    if trains:
        sum(y.float().sum() for y in found.values()).backward()
        want = sum(decode(layer.packed).sum(0) for _, layer in rotated_linears(module)).expand(5, -1)
        assert error(x.grad, want) < 2e-2


def test_on_a_cpu_another_dtype_is_served_beside_what_was_joined():
    module = OnCpu()
    link_siblings(module)
    module.q_proj(inputs())
    for name, layer in rotated_linears(module):
        x = torch.randn(3, 128)
        assert error(layer(x), forward(layer.packed, x)) < 1e-5, name
    state = module.state_dict()
    assert all(torch.equal(state[f"q_proj.{name}"], t) for name, t in module.q_proj.packed.tensors.items())


def inputs():
    return torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_layer_of_rounded_activations_compiles_before_its_first_pass():
    layer = RotatedLinear.from_packed(random_packed(32, 128, 64, activations="int8"))
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch._dynamo.reset()
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert distance(found, layer(x)) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype):
    layer = RotatedLinear.from_packed(random_packed(32, 128, 64))
    x = torch.randn(3, 128).to(dtype)
    want = layer(x)  # builds what is kept
    torch._dynamo.reset()
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert distance(found, want) <= ROUNDING[dtype]


def test_merged_layers_compile_without_a_graph_break():
    module, packed = built()

    def attention(x):
        return module.q_proj(x), module.k_proj(x), module.v_proj(x)

    x = torch.randn(2, 128).half().to(DEVICE)
    torch._dynamo.reset()
    for got, name in zip(
        torch.compile(attention, backend="aot_eager", fullgraph=True)(x), ("q_proj", "k_proj", "v_proj"), strict=True
    ):
        assert error(got.cpu(), forward(packed[name], x.cpu())) < 1e-3
    assert module.q_proj._merged.latest is None

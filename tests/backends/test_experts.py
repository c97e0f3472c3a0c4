"""What runs a block's experts: the choice and its reasons, and all that CPUs do between a token and its answer."""

import pytest
import torch
import torch.nn.functional as F
from packed import error, random_packed

from pairquant.backends.cpu_experts import CpuExperts
from pairquant.backends.experts import choose_experts, explain_experts
from pairquant.backends.triton_experts import TritonExperts
from pairquant.core.linear import decode
from pairquant.spec.experts import TRANSFORM
from pairquant.spec.linear import PackedLinear, Spec

CPU, BF16 = torch.device("cpu"), torch.bfloat16
COUNT, HIDDEN, INNER = 6, 64, 96


@pytest.mark.parametrize(
    ("bits", "dtype", "reason"),
    [
        (4, BF16, None),
        (8, BF16, "multiplies 4-bit weights, the layer has 8"),
        (4, torch.float32, "is fast in bfloat16 only; float32 takes 50 times as long"),
    ],
)
def test_the_choice_on_a_cpu(bits, dtype, reason):
    layout = Spec(bits, 32).layout(64, 96)
    explained = explain_experts([layout], CPU, dtype)
    assert choose_experts([layout], CPU, dtype) is (CpuExperts if reason is None else None)
    assert explained.backend == ("cpu-int4" if reason is None else "decoded")
    assert explained.refusals.get("cpu-int4") == reason
    assert "triton" in explained.refusals


def test_one_weight_that_is_refused_is_enough(monkeypatch):
    layouts = [Spec(bits, 32).layout(64, 96) for bits in (4, 8)]
    assert choose_experts(layouts, CPU, BF16) is None
    explained = explain_experts(layouts, CPU, BF16)
    assert explained.backend == "decoded"
    reason = "not some of these: it multiplies 4-bit weights, the layer has 8"
    assert explained.refusals["cpu-int4"] == f"runs all weights of a block's experts or none, and {reason}"
    monkeypatch.setattr("pairquant.backends.triton_kernels.triton_missing", lambda: None)
    cuda = torch.device("cuda")
    assert choose_experts(layouts, cuda, BF16) is TritonExperts
    assert choose_experts(layouts, cuda, BF16, per_expert=True) is None


@pytest.fixture(scope="module")
def linears():
    """Gate, up and down of each expert, with biases; they share their transforms."""
    found = []
    for number in range(COUNT):
        sizes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
        parts = [random_packed(*size, 32, 2, 10 * number + i, bias=True) for i, size in enumerate(sizes)]
        first = found[0] if found else parts
        sources = (first[0], first[0], first[2])
        shared = [{name: source[name] for name in TRANSFORM} for source in sources]
        found.append([PackedLinear(p.layout, {**p.tensors, **s}) for p, s in zip(parts, shared, strict=True)])
    return found


@pytest.mark.parametrize("tokens", [1, 40])
def test_every_token_gets_the_weighted_sum_of_its_experts(linears, tokens, generator):
    experts = CpuExperts.build([parts[:2] for parts in linears], [parts[2:] for parts in linears])
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(COUNT - 1, generator=generator)[:3] for _ in range(tokens)])  # the last gets none
    ids[:, 1] = torch.tensor([-1, COUNT])[torch.randint(0, 2, (tokens,), generator=generator)]  # stand for none
    weights = torch.rand(tokens, 3, generator=generator)
    wanted = torch.zeros(tokens, HIDDEN)
    for token, chosen, share in zip(range(tokens), ids, weights, strict=True):
        for number, weight in zip(chosen.tolist(), share, strict=True):
            if 0 <= number < COUNT:
                gate, up, down = linears[number]
                inner = F.silu(decode(gate) @ x[token].float() + gate.bias) * (decode(up) @ x[token].float() + up.bias)
                wanted[token] += weight * (decode(down) @ inner + down.bias)
    found = experts.run(x, ids, weights, "silu")
    assert found.dtype == BF16
    assert error(found, wanted) < 0.02
    halves = experts.run(x, ids, weights, "", between=lambda joined: F.silu(joined[:, :INNER]) * joined[:, INNER:])
    assert error(halves, wanted) < 0.02
    assert not experts.run(x, torch.full_like(ids, COUNT), weights, "silu").any()

"""How packed experts come into vLLM's layers and are cut for several ranks; kernels for GPUs run in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton")

from packed import random_packed

from pairquant.backends.triton_kernels import TritonKernels
from pairquant.core.linear import decode
from pairquant.kernels.run import launch_experts
from pairquant.spec.experts import TRANSFORM, pool_of
from pairquant.spec.linear import PackedLinear, Spec
from pairquant.support.errors import CheckpointError, ConfigError

HOME, COUNT, HIDDEN, INNER = "model.layers.0.mlp.experts", 4, 64, 128
PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
SPEC = Spec(4, 32, 2)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Those for GPUs take float16, PyTorch's for CPUs bfloat16."""
    monkeypatch.setattr(
        TritonKernels, "refusal", lambda self, layout, device, dtype: None if dtype == torch.float16 else "not here"
    )


@pytest.fixture(scope="module")
def linears():
    return made(bias=False)


@pytest.fixture(scope="module")
def biased():
    return made(bias=True)


@pytest.fixture(scope="module")
def own():
    return made(bias=True, per_expert=True)


def made(bias, per_expert=False):
    """Path → packed linear; the experts share their transforms, or each has its own."""
    found, shared = {}, {}
    for number in range(COUNT):
        for i, (part, (rows, channels)) in enumerate(PARTS.items()):
            path = f"{HOME}.{number}.{part}"
            one = random_packed(rows, channels, 32, 2, seed=10 * number + i, bias=bias)
            transform = shared.setdefault(pool_of(path, per_expert), {name: one[name] for name in TRANSFORM})
            found[path] = PackedLinear.from_tensors(path, one.layout, {**one.tensors, **transform})
    return found


def stored(linears, per_expert=False):
    """What the checkpoint holds; its paths begin otherwise than those of vLLM's model."""
    tensors = {}
    for path, linear in linears.items():
        for name, tensor in linear.tensors.items():
            full = f"{pool_of(path, per_expert)}_weight_{name}" if name in TRANSFORM else f"{path}.{name}"
            tensors[full.replace("model.", "text.", 1)] = tensor
    return tensors


class Layer(torch.nn.Module):
    """What the method asks of vLLM's layer. local: which experts, by their numbers, lie on this rank."""

    def __init__(self, tp_size=1, tp_rank=0, local=range(COUNT), has_bias=False, dtype=torch.float16):
        super().__init__()
        parallel = SimpleNamespace(tp_size=tp_size, tp_rank=tp_rank)
        sizes = {"hidden_dim": HIDDEN, "intermediate_size_per_partition": INNER // tp_size}
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, has_bias=has_bias, in_dtype=dtype, **sizes)
        self.local = list(local)
        self.activation, self.swiglu_limit = SimpleNamespace(value="silu"), None
        self.apply_router_weight_on_input = False
        places = [self.local.index(e) if e in self.local else -1 for e in range(COUNT)]
        self.expert_map = torch.tensor(places) if len(self.local) < COUNT else None

    def _map_global_expert_id_to_local_expert_id(self, number):
        return self.local.index(number) if number in self.local else -1


def loaded(linears, tensors, per_expert=False, **how):
    from pairquant.integrations.vllm.experts import experts_method

    layer = Layer(**how)
    stored_as = {path: path.replace("model.", "text.", 1) for path in linears}
    method = experts_method({path: SPEC for path in linears}, HOME, layer, stored_as, per_expert)
    inner = INNER // layer.moe_config.moe_parallel_config.tp_size
    method.create_weights(layer, len(layer.local), HIDDEN, inner, params_dtype=torch.float16)
    doors = method.arrivals.doors()
    for name, tensor in tensors.items():
        doors[name](tensor)
    method.process_weights_after_loading(layer)
    return layer, method


def product(linear, x):
    y = decode(linear) @ x.float()
    return y if linear.bias is None else y + linear.bias


def expected(linears, x, ids, weights):
    rows = []
    for t in range(len(x)):
        y = torch.zeros(HIDDEN)
        for weight, number in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up, down = (linears[f"{HOME}.{number}.{part}"] for part in PARTS)
            y += weight * product(down, torch.nn.functional.silu(product(gate, x[t])) * product(up, x[t]))
        rows.append(y)
    return torch.stack(rows)


RANKS = pytest.mark.parametrize(
    "ranks",
    [[{}], [{"tp_size": 2, "tp_rank": 0}, {"tp_size": 2, "tp_rank": 1}], [{"local": [0, 2]}, {"local": [1, 3]}]],
    ids=["one", "tensor parallel", "expert parallel"],
)


@RANKS
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "with biases"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.004), (torch.bfloat16, 0.015)], ids=["GPU", "CPU"])
def test_the_ranks_together_compute_what_the_decoded_experts_do(
    linears, biased, ranks, bias, dtype, bound, generator, monkeypatch
):
    monkeypatch.setattr(launch_experts, "token_counts", lambda count: [2])  # all are half a minute in the interpreter
    which = biased if bias else linears
    check_ranks(which, stored(which), ranks, bound, generator, has_bias=bias, dtype=dtype)


@RANKS
def test_on_cpus_experts_may_have_transforms_of_their_own(own, ranks, generator):
    how = {"per_expert": True, "has_bias": True, "dtype": torch.bfloat16}
    check_ranks(own, stored(own, per_expert=True), ranks, 0.015, generator, **how)


def check_ranks(linears, tensors, ranks, bound, generator, **how):
    """That the ranks run experts from their codes, and that their sum is what the decoded experts give."""
    from pairquant.integrations.vllm.experts import PackedExpertsMethod

    dtype = how["dtype"]
    x = torch.randn(5, HIDDEN, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(COUNT, generator=generator)[:2] for _ in range(5)]).to(torch.int32)
    weights = torch.rand(5, 2, generator=generator)
    total = torch.zeros(5, HIDDEN)
    for rank in ranks:
        layer, method = loaded(linears, tensors, **rank, **how)
        assert isinstance(method, PackedExpertsMethod)
        assert not method.arrivals.tensors, "what was loaded is kept beside what runs"
        total += method.apply(layer, x, weights, ids, None, None).float()
    want = expected(linears, x, ids, weights)
    assert (total - want).norm() < bound * want.norm()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "cpu-int4 is fast in bfloat16 only"),
        ({"activation": "situ", "dtype": torch.bfloat16}, "nothing here computes situ"),
        ({"bits": 8, "dtype": torch.bfloat16}, "cpu-int4 multiplies 4-bit weights, the layer has 8"),
        *(
            ({"tp_size": 8, "has_bias": bias, "dtype": dtype}, "16 channels inside each expert on each of 8 ranks")
            for bias, dtype in ((False, torch.float16), (True, torch.float16), (False, torch.bfloat16))
        ),
        ({"tp_size": 8}, "use --enable-expert-parallel, or another --tensor-parallel-size"),
    ],
)
def test_why_experts_are_decoded_is_said(linears, change, reason, monkeypatch, caplog):
    from pairquant.integrations.vllm import experts

    monkeypatch.setattr(experts, "DecodedExpertsMethod", lambda arrivals, moe: "decoded")
    monkeypatch.setattr(experts, "_tell_once", experts._tell_once.__wrapped__)
    layer = Layer(**{name: value for name, value in change.items() if name not in ("activation", "bits")})
    layer.activation = SimpleNamespace(value=change.get("activation", "silu"))
    specs = {path: Spec(change.get("bits", 4), 32, 2) for path in linears}
    with caplog.at_level("WARNING", logger="vllm.pairquant"):
        assert experts.experts_method(specs, HOME, layer, {path: path for path in linears}) == "decoded"
    assert f"experts ({COUNT} in a block) are decoded" in caplog.text
    assert reason in caplog.text


def test_experts_that_would_be_decoded_and_round_what_they_read_are_refused(linears):
    from pairquant.integrations.vllm.experts import experts_method

    specs = {path: Spec(8, 32, 2, activations="int8") for path in linears}
    with pytest.raises(ConfigError, match=r"round what they read to int8.*cpu-int4 multiplies 4-bit weights"):
        experts_method(specs, HOME, Layer(dtype=torch.bfloat16), {path: path for path in linears})


def test_a_tensor_that_is_missing_is_named(linears):
    tensors = stored(linears)
    del tensors["text.layers.0.mlp.experts.2.up_proj.scales"]
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.scales is missing"):
        loaded(linears, tensors)


def test_biases_that_vllm_would_not_add_are_refused(linears):
    tensors = stored(linears) | {"text.layers.0.mlp.experts.1.down_proj.bias": torch.zeros(HIDDEN)}
    with pytest.raises(CheckpointError, match=r"holds .*experts.1.down_proj.bias, but vLLM runs these experts without"):
        loaded(linears, tensors)


def test_values_that_are_not_finite_are_named(linears):
    tensors = stored(linears)
    name = "text.layers.0.mlp.experts.3.down_proj.scales"
    tensors[name] = torch.full_like(tensors[name], torch.inf)
    with pytest.raises(CheckpointError, match=r"experts.3.down_proj.scales has values that are not finite"):
        loaded(linears, tensors)


@pytest.mark.parametrize("rank", [0, 1])
def test_biases_go_to_the_ranks_that_add_them(rank):
    from pairquant.integrations.vllm.experts import DecodedExpertsMethod

    layer = Layer(local=[1, 3])
    layer.w13_bias = torch.nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    layer.w2_bias = torch.nn.Parameter(torch.zeros(2, 6), requires_grad=False)
    parallel = SimpleNamespace(tp_rank=rank)
    method = SimpleNamespace(inner=4, moe=SimpleNamespace(moe_parallel_config=parallel))
    gate, up, down = torch.arange(8.0), torch.arange(10.0, 18.0), torch.ones(6)
    for number in range(COUNT):
        for shard, bias in (("w1", gate), ("w3", up), ("w2", down)):
            DecodedExpertsMethod._load_bias(method, layer, shard, number, bias + 100 * number)
    mine = slice(4 * rank, 4 * rank + 4)
    assert torch.equal(layer.w13_bias[1], torch.cat([gate[mine], up[mine]]) + 300)
    assert torch.equal(layer.w2_bias[0], down + 100 if rank == 0 else torch.zeros(6)), "ranks are summed"


def test_gates_lie_between_ups_where_the_activation_wants_it():
    from pairquant.integrations.vllm.experts import _interleave

    joined = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 10.0, 20.0], [3.0, 4.0, 30.0, 40.0]]), requires_grad=False)
    _interleave(joined)
    assert joined.tolist() == [[1.0, 10.0, 2.0, 20.0], [3.0, 30.0, 4.0, 40.0]]


def test_on_gpus_experts_with_transforms_of_their_own_are_decoded_and_found_under_their_names(linears, monkeypatch):
    from pairquant.integrations.vllm import experts

    monkeypatch.setattr(
        experts, "DecodedExpertsMethod", lambda arrivals, moe: arrivals
    )  # vLLM's own asks for its settings
    stored_as = {path: path.replace("model.", "text.", 1) for path in linears}
    specs = {path: SPEC for path in linears}
    assert isinstance(experts.experts_method(specs, HOME, Layer(), stored_as), experts.PackedExpertsMethod)
    arrivals = experts.experts_method(specs, HOME, Layer(), stored_as, per_expert=True)
    doors = arrivals.doors()
    for path, linear in linears.items():
        for name, tensor in linear.tensors.items():
            place = f"{pool_of(path, per_expert=True)}_weight_{name}" if name in TRANSFORM else f"{path}.{name}"
            doors[place.replace("model.", "text.", 1)](tensor)
    path = f"{HOME}.2.down_proj"
    assert torch.equal(decode(arrivals.packed(path)), decode(linears[path]))

"""How packed experts come into vLLM's layers and are cut for several GPUs; the kernels run in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton")

from packed import random_packed

from pairquant.backends.triton_int4 import TritonInt4
from pairquant.core.linear import decode
from pairquant.spec.experts import TRANSFORM, pool_of
from pairquant.spec.linear import PackedLinear, Spec
from pairquant.support.errors import CheckpointError, ConfigError

HOME, COUNT, HIDDEN, INNER = "model.layers.0.mlp.experts", 4, 64, 128
PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
SPEC = Spec(4, 32, 2)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(TritonInt4, "refusal", lambda self, layout, device, dtype: None)


@pytest.fixture(scope="module")
def linears():
    """Path → packed linear; the experts share their transforms."""
    found, shared = {}, {}
    for number in range(COUNT):
        for i, (part, (rows, channels)) in enumerate(PARTS.items()):
            path = f"{HOME}.{number}.{part}"
            one = random_packed(rows, channels, 32, 2, seed=10 * number + i)
            transform = shared.setdefault(pool_of(path), {name: one[name] for name in TRANSFORM})
            found[path] = PackedLinear.from_tensors(path, one.layout, {**one.tensors, **transform})
    return found


def stored(linears):
    """What the checkpoint holds, by the names that vLLM gives the layer."""
    tensors = {}
    for path, linear in linears.items():
        own, pool = path.removeprefix(f"{HOME}."), pool_of(path).removeprefix(f"{HOME}.")
        for name, tensor in linear.tensors.items():
            tensors[f"{pool}_weight_{name}" if name in TRANSFORM else f"{own}.{name}"] = tensor
    return tensors


class Layer(torch.nn.Module):
    """What the method asks of vLLM's layer. local: which experts, by their numbers, lie on this rank."""

    def __init__(self, tp_size=1, tp_rank=0, local=range(COUNT), has_bias=False):
        super().__init__()
        parallel = SimpleNamespace(tp_size=tp_size, tp_rank=tp_rank)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, has_bias=has_bias, in_dtype=torch.float16)
        self.local, self.loaded = list(local), []
        self.activation, self.swiglu_limit = SimpleNamespace(value="silu"), None
        self.apply_router_weight_on_input = False
        places = [self.local.index(e) if e in self.local else -1 for e in range(COUNT)]
        self.expert_map = torch.tensor(places) if len(self.local) < COUNT else None

    def _map_global_expert_id_to_local_expert_id(self, number):
        return self.local.index(number) if number in self.local else -1

    def load_weights(self, weights):
        self.loaded += [name for name, _ in weights]
        return iter(())


def loaded(linears, tensors, **how):
    from pairquant.integrations.vllm.experts import experts_method

    layer = Layer(**how)
    method = experts_method({path: SPEC for path in linears}, HOME, layer)
    inner = INNER // layer.moe_config.moe_parallel_config.tp_size
    method.create_weights(layer, len(layer.local), HIDDEN, inner, params_dtype=torch.float16)
    list(layer.load_weights(tensors.items()))
    method.process_weights_after_loading(layer)
    return layer, method


def expected(linears, x, ids, weights):
    rows = []
    for t in range(len(x)):
        y = torch.zeros(HIDDEN)
        for weight, number in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up, down = (decode(linears[f"{HOME}.{number}.{part}"]) for part in PARTS)
            y += weight * (down @ (torch.nn.functional.silu(gate @ x[t].float()) * (up @ x[t].float())))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "ranks",
    [[{}], [{"tp_size": 2, "tp_rank": 0}, {"tp_size": 2, "tp_rank": 1}], [{"local": [0, 2]}, {"local": [1, 3]}]],
    ids=["one GPU", "tensor parallel", "expert parallel"],
)
def test_the_ranks_together_compute_what_the_decoded_experts_do(linears, ranks, generator):
    x = torch.randn(5, HIDDEN, generator=generator).half()
    ids = torch.stack([torch.randperm(COUNT, generator=generator)[:2] for _ in range(5)]).to(torch.int32)
    weights = torch.rand(5, 2, generator=generator)
    total = torch.zeros(5, HIDDEN)
    for how in ranks:
        layer, method = loaded(linears, stored(linears), **how)
        total += method.apply(layer, x, weights, ids, None, None).float()
    want = expected(linears, x, ids, weights)
    assert (total - want).norm() < 0.004 * want.norm()


def test_other_tensors_go_to_the_layers_own_loader(linears):
    layer, _ = loaded(linears, stored(linears) | {"something.weight": torch.zeros(1)})
    assert layer.loaded == ["something.weight"]


def test_a_tensor_that_is_missing_is_named(linears):
    tensors = stored(linears)
    del tensors["2.up_proj.scales"]
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.scales is missing"):
        loaded(linears, tensors)


def test_values_that_are_not_finite_are_named(linears):
    tensors = stored(linears)
    tensors["3.down_proj.scales"] = torch.full_like(tensors["3.down_proj.scales"], torch.inf)
    with pytest.raises(CheckpointError, match=r"experts.3.down_proj.scales has values that are not finite"):
        loaded(linears, tensors)


def test_tensor_parallelism_that_would_split_a_group_is_refused(linears):
    with pytest.raises(ConfigError, match=r"16 channels inside each expert on each of 8 GPUs.*enable-expert-parallel"):
        loaded(linears, stored(linears), tp_size=8)

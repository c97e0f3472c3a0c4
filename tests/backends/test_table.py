"""The choice among backends: who takes what, why not, and what is prepared of linears that read one input."""

from dataclasses import replace

import pytest
import torch
from packed import random_packed

from pairquant.backends import ops
from pairquant.backends.table import BACKENDS, BY_NAME, DENSE, choose, explain, prepare_all
from pairquant.core.linear import forward
from pairquant.kernels.run.decoded_budget import VARIABLES, budget
from pairquant.spec.codes import SUPPORTED_BITS
from pairquant.spec.linear import Spec
from pairquant.support.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("bits", "device", "dtype", "expected"),
    [
        (4, CPU, torch.bfloat16, "cpu-int4"),
        (4, CPU, torch.float32, "decoded"),
        (4, CPU, torch.float16, "decoded"),
        (5, CPU, torch.bfloat16, "decoded"),
        (4, CUDA, torch.bfloat16, "triton"),
        (4, CUDA, torch.float32, "triton"),
        (6, CUDA, torch.bfloat16, "triton"),
    ],
)
def test_the_first_that_takes_a_layer_runs_it(bits, device, dtype, expected, monkeypatch):
    monkeypatch.setattr("pairquant.backends.triton_kernels.triton_missing", lambda: None)
    assert choose(Spec(bits, 64, 2).layout(128, 64), device, dtype).name == expected


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")])
def test_the_last_takes_everything(bits, device):
    assert DENSE.refusal(Spec(bits, 32, 16).layout(32, 32), device, torch.float64) is None


def test_every_refusal_is_explained():
    found = explain(Spec(5, 64, 2).layout(128, 64), CPU, torch.bfloat16)
    assert found.backend == "decoded"
    assert found.refusals == {
        "triton": "runs on NVIDIA GPUs, not on cpu",
        "cpu-int8": "multiplies int8 activations, the layer's are not rounded",
        "cpu-int4": "multiplies 4-bit weights, the layer has 5",
    }
    rows = explain(Spec(4, 64, 2).layout(128, 24), CPU, torch.bfloat16).refusals["cpu-int4"]
    assert rows == "packs 16 rows together, the layer has 24"
    dtype = explain(Spec(4, 64, 2).layout(128, 64), CPU, torch.float32).refusals["cpu-int4"]
    assert dtype == "is fast in bfloat16 only; float32 takes 50 times as long"


def test_without_triton_a_gpu_runs_decoded_layers_and_says_why(monkeypatch):
    monkeypatch.setattr("pairquant.backends.triton_kernels.triton_missing", lambda: "Triton is not there")
    found = explain(Spec(4, 64, 2).layout(128, 64), CUDA, torch.bfloat16)
    assert (found.backend, found.refusals["triton"]) == ("decoded", "Triton is not there")


def run_all(prepared, x):
    return torch.cat(
        [ops.run(BY_NAME[p.backend], x, p.tensors, None, p.out_features, p.group_size) for p in prepared], -1
    )


def linears(shared):
    packed = [random_packed(rows, 128, 64, 2, seed) for seed, rows in enumerate((32, 16, 24))]
    if shared:
        transform = {name: packed[0][name] for name in ("theta", "pairs", "channel_scales")}
        packed = [p.with_tensors(**transform) for p in packed]
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_linears_of_one_input_run_side_by_side(shared, dtype):
    packed = linears(shared)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    prepared = prepare_all(packed, dtype)
    got, want = run_all(prepared, x), torch.cat([forward(p, x) for p in packed], -1)
    assert (got.float() - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert sum((p.out_features for p in prepared), ()) == (32, 16, 24)


def test_rows_that_only_fit_together_are_joined_where_the_transform_is_shared():
    """24 rows do not fill packs of 16; 72 rows of one transform do not either, 32 + 16 + 16 do."""
    packed = linears(True)
    assert prepare_all(packed, torch.bfloat16)[0].backend == "decoded"
    packed[2] = packed[2].thinned(3).with_tensors()
    packed = [*packed[:2], replace(packed[2])]
    assert packed[2].layout.out_features == 8
    assert prepare_all([*packed, packed[2]], torch.bfloat16)[0].backend == "cpu-int4"


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_setting_that_is_not_allowed_is_refused_whoever_would_run_the_layer(activations, dtype, monkeypatch):
    monkeypatch.setenv(VARIABLES["cpu"], "2GiB")
    budget.cache_clear()
    packed = random_packed(32, 128, 64, activations=activations)
    for asked in (lambda: explain(packed.layout, CPU, dtype), lambda: prepare_all([packed], dtype)):
        with pytest.raises(ConfigError, match=f"{VARIABLES['cpu']} is '2GiB'"):
            asked()
    explain(packed.layout, CUDA, dtype)


def test_a_new_backend_is_a_row():
    assert BACKENDS[-1] is DENSE
    assert set(BY_NAME) == {"triton", "cpu-int8", "cpu-int4", "decoded"}

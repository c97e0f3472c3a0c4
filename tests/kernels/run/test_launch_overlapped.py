"""The kernel in Gluon: it compiles for Hopper GPUs on any machine, and computes what `wide_kernel` does where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from pairquant.kernels.run import launch, launch_overlapped, table
from pairquant.kernels.run.table import Overlapped, Wide
from pairquant.kernels.run.tune import random_weights

TILES = [Overlapped(128, 3, 8), Overlapped(128, 3, 4), Overlapped(256, 2, 4)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_hopper = pytest.mark.skipif(not launch_overlapped.available(DEVICE), reason="needs a Hopper GPU")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from pairquant.kernels.run.gluon_overlapped import SIZES, overlapped_kernel

tokens, stages, warps, groups, shared = map(int, sys.argv[1:6])
dtype = sys.argv[6]
constants = {"BM": tokens, "STAGES": stages, "GROUPS": groups, "SHARED": bool(shared), "HAS_BIAS": True, "DEPENDENT": True}
types = dict.fromkeys(overlapped_kernel.arg_names, "constexpr") | dict.fromkeys(SIZES, "i32")
types["x"] = f"tensordesc<{dtype}[{tokens}, 64],{NVMMASharedLayout(128, 16, 2)!r}>"
types |= {"words_ptr": "*i32", "grid_ptr": "*i32", "arrivals_ptr": "*i32", "partial_ptr": "*fp32"}
types |= {"bias_ptr": "*" + dtype, "out_ptr": "*" + dtype}
places = {(overlapped_kernel.arg_names.index(name),): value for name, value in constants.items()}
source = GluonASTSource(overlapped_kernel, types, places, {(i,): [["tt.divisibility", 16]] for i in range(1, 7)})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
print("products", kernel.asm["ptx"].count("wgmma.mma_async"), "shared", kernel.metadata.shared)
"""


@pytest.mark.parametrize(
    ("tiles", "groups", "shared", "dtype"),
    [(TILES[0], 1, 1, "bf16"), (TILES[1], 4, 0, "fp16"), (TILES[2], 2, 1, "bf16")],
    ids=str,
)
def test_it_compiles_for_hopper_without_a_gpu(tiles, groups, shared, dtype):
    pytest.importorskip("triton")
    arguments = [str(n) for n in (tiles.tokens, tiles.stages, tiles.warps, groups, shared)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments, dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    words = found.stdout.split()
    assert int(words[1]) >= 8, "two halves of a block, four products of 16 channels each"
    assert int(words[3]) <= 232_448, "the shared memory that a program can have on a Hopper GPU"


def test_where_it_does_not_run_another_kernel_does(generator, monkeypatch):
    weights = random_weights((128,), 256, 128, torch.device("cpu"), bits=8)
    x = torch.randn(130, 256, generator=generator).half()
    assert not launch_overlapped.runs(x, weights)
    small = Wide(64, 128, 4, 2, 1)
    monkeypatch.setattr(Overlapped, "otherwise", small)
    assert torch.equal(launch.linear(x, weights, None, TILES[0]), launch.linear(x, weights, None, small))


def test_rounded_activations_take_the_other_kernel(monkeypatch):
    monkeypatch.setitem(table.MEASURED["sm90"], (4096, 4096), dict.fromkeys(table.TOKENS, TILES[2]))
    table._choices.cache_clear()
    try:
        assert table.choose("sm90", 4096, 4096, 300) == TILES[2]
        assert table.choose_rounded("sm90", 4096, 4096, 300, "int4", 4) == TILES[2].otherwise
    finally:
        table._choices.cache_clear()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "channels", "group", "transforms", "tokens"),
    [
        ((1032, 264, 520), 1408, 64, 3, 300),
        ((4096,), 1408, 32, 1, 257),
        ((256,), 256, 128, 1, 65),
        ((4096,), 14336, 128, 1, 256),
    ],
    ids=str,
)
def test_it_computes_what_the_other_kernel_does(sizes, channels, group, transforms, tokens, tiles, dtype, generator):
    weights = random_weights(sizes, channels, group, DEVICE, 8, transforms)
    x = torch.randn(tokens, channels, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(sum(sizes), generator=generator).to(DEVICE, dtype)
    want = launch.linear(x, weights, bias, Wide(64, 128, 4, 3, 1)).float()
    got = launch.linear(x, weights, bias, tiles)
    assert (got.float() - want).norm() < 1e-3 * want.norm()
    assert torch.equal(got, launch.linear(x, weights, bias, tiles)), "the same input gives the same bits"
    assert not weights.arrivals.any()

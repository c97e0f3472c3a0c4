"""Codes come back from PyTorch's int4 form, whatever instructions the CPU has."""

import os
import subprocess
import sys

import pytest
import torch

from pairquant.kernels.run import cpu_int4_form
from pairquant.kernels.run.cpu_int4_form import codes_of, int4_form
from pairquant.support.errors import KernelError

#: Rows and channels: less than a block, a block, blocks and every remainder that the product takes.
SHAPES = [(16, 32), (64, 96), (80, 128), (160, 32), (176, 64), (192, 192)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_rows_and_some_come_back(shape, generator):
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    form, rows = int4_form(codes), len(codes)
    for first, last in ((0, rows), (rows // 2, rows), (0, rows // 2), (rows // 3, rows // 3 + 1)):
        assert torch.equal(codes_of(form, first, last), codes[first:last])


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_they_come_back_with_other_instructions(capability):
    """PyTorch chooses its instructions once, so in a process of its own; the test above has those of this machine."""
    program = f"""if True:
        import torch
        from pairquant.kernels.run.cpu_int4_form import codes_of, int4_form
        for rows, channels in {SHAPES}:
            codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8)
            assert torch.equal(codes_of(int4_form(codes), rows // 2, rows), codes[rows // 2 :]), (rows, channels)
        print(torch.backends.cpu.get_cpu_capability().lower())
    """
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in (capability, "default"), "a CPU without AVX2 has only the plain instructions"


def test_a_form_that_mixes_blocks_is_refused(monkeypatch, generator):
    monkeypatch.setattr(cpu_int4_form, "int4_form", lambda codes: int4_form(codes.flip(0)))
    codes = torch.randint(0, 16, (192, 224), generator=generator)
    with pytest.raises(KernelError, match="packs 4-bit codes on CPUs in a way that PairQuant cannot read back"):
        codes_of(cpu_int4_form.int4_form(codes), 0, 64)
    cpu_int4_form._places.cache_clear()

"""Other people's kernels, as baselines of the kernel benchmarks: Marlin (AWQ), the original rotation, Hadamard.

    python benchmarks/kernel_peers.py [--sources .peers]

builds the three with `torch.utils.cpp_extension` for the GPU at hand, checks each against a plain torch reference on
random data and prints a line per build and per check; the exit status is 1 if anything failed. It needs a CUDA
toolkit of 12.8 or later (nvcc), ninja, jinja2 and a GPU of compute capability 8.0 or later, but no network.

How to get the sources. They belong to others and aren't part of this repository; this file only binds and calls them.
Two packages hold all three (0.4 MB in all):

    pip download --no-deps --no-binary :all: gptqmodel==7.7.0     # gptqmodel-7.7.0.tar.gz, Apache-2.0: unpack it
    pip download --no-deps paroquant==0.1.16                      # a wheel, MIT: unzip it

    .peers/marlin/      gptqmodel-7.7.0/gptqmodel_ext/marlin/: core/scalar_type.hpp (in core/), generate_kernels.py,
                        marlin_torch_fp16.cpp, gptq_marlin_fp16.cu, gptq_marlin.cu, gptq_marlin_repack.{cu,cuh},
                        awq_marlin_repack.{cu,cuh}, kernel.h, dequant.h, marlin.cuh, marlin_dtypes.cuh, marlin_mma.h,
                        marlin_scratch.cuh, marlin_template.h. vLLM's Marlin, which GPTQModel calls for AWQ checkpoints.
    .peers/hadamard/    gptqmodel-7.7.0/gptqmodel_ext/hadamard/: all files. Tri Dao's fast_hadamard_transform
                        (BSD-3-Clause); the sdist of that name on PyPI (1.1.0) lacks the CUDA files.
    .peers/rotation/    paroquant/kernels/cuda/rotation.cu and rotation.cuh

The files are compiled as they are, but for two cuts that keep the build short and leave the compiled kernels alone:
of Marlin's kernels only those for float16 activations and uint4 weights with zero points in groups of 128, of the
Hadamard transform's only those for float16. Objects are kept in ~/.cache/pairquant-peers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 128  # input channels that share a scale and a zero point
TOLERANCE = 5e-3  # relative error of a float16 kernel; a wrong permutation or angle gives about 1
UINT4 = 4 << 8 | 1 << 50  # vLLM's id of the scalar type uint4: 4 mantissa bits at bit 8; NaNs as IEEE 754, at bit 50
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ and Marlin: nibble i of a 32-bit word holds column NIBBLES[i] of eight
MARLIN_SLICES = 5  # source files over which Marlin's kernels are spread, to compile side by side


# Building


def toolkit() -> Path:
    """The CUDA toolkit's folder: one with bin/nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    candidates += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    for folder in [Path(candidate) for candidate in candidates if candidate]:
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file():
            return folder
    raise RuntimeError(f"no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in {candidates}; set CUDA_HOME")


def build_folder(name: str) -> Path:
    """Where the peer is staged and built: one folder per torch, architecture and peer."""
    major, minor = torch.cuda.get_device_capability()
    folder = Path.home() / ".cache" / "pairquant-peers" / f"torch-{torch.__version__}-sm{major}{minor}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, text: str) -> None:
    """Writes the file unless it holds the text already: ninja then leaves its object alone."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def stage(sources: Path, folder: Path, edits: dict[str, Callable[[str], str]]) -> Path:
    """Copies the C++ and CUDA files below `sources` to folder/src, edited where `edits` names them."""
    files = [path for path in sorted(sources.rglob("*")) if path.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cu"}]
    missing = [name for name in edits if not (sources / name).is_file()]
    if not files or missing:
        raise FileNotFoundError(f"{sources}: no sources ({', '.join(missing)}); see the head of {__file__}")
    for path in files:
        name = path.relative_to(sources).as_posix()
        write(folder / "src" / name, edits.get(name, str)(path.read_text()))
    return folder / "src"


def headers_of_wheels(folder: Path) -> list[str]:
    """Headers that torch's own include and a small toolkit lacks (cusparse.h, cublas_v2.h, …), in NVIDIA's wheels."""
    include, extra = toolkit() / "include", folder / "wheel-headers"
    spec = importlib.util.find_spec("nvidia")
    extra.mkdir(exist_ok=True)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for header in sorted(Path(place).glob("*/include/*.h")):
            link = extra / header.name
            if not (include / header.name).exists() and not link.exists():
                link.unlink(missing_ok=True)  # a link to a wheel that is gone
                link.symlink_to(header)
    return [str(extra)]


def compile_and_load(name: str, folder: Path, files: Sequence[Path], flags: Sequence[str]) -> None:
    """Compiles the files for the GPU at hand and loads the library, which registers its operators with torch."""
    os.environ.setdefault("MAX_JOBS", "16")
    os.environ["CUDA_HOME"] = str(toolkit())
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit())  # torch takes the parent of any `nvcc`, a wrapper in /usr/local/bin too
    target = "".join(map(str, torch.cuda.get_device_capability()))
    objects = folder / "build"
    objects.mkdir(exist_ok=True)
    (objects / "lock").unlink(missing_ok=True)  # an interrupted build leaves it, and the next would wait for ever
    cpp_extension.load(
        name=f"pairquant_peer_{name}",
        sources=[str(file) for file in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", f"-gencode=arch=compute_{target},code=sm_{target}", *flags],
        extra_include_paths=[str(folder / "src"), *headers_of_wheels(folder)],
        build_directory=str(objects),
        with_cuda=True,
        is_python_module=False,
    )


def substitute(pattern: str, replacement: str, text: str) -> str:
    """Replaces the one match of the pattern; anything else than one match is another version of the source."""
    text, count = re.subn(pattern, lambda _: replacement, text, flags=re.DOTALL)
    if count != 1:
        raise RuntimeError(f"{count} matches of {pattern!r}, expected one; is this the version that the head names?")
    return text


@functools.cache
def load_marlin(sources: Path) -> Any:
    """Builds Marlin from sources/marlin; returns the namespace torch.ops.gptqmodel_marlin_fp16."""
    sources, folder = sources / "marlin", build_folder("marlin")
    # The dispatcher names kernels of every type; those not compiled here must not be named, or the library won't load.
    kept = "kIsSupportedStage2Tile && W_TYPE == vllm::kU4 && STAGES == pipe_stages && GROUP_BLOCKS == 8"
    pattern = r"if constexpr \(kIsSupportedStage2Tile\)"
    edits = {"gptq_marlin.cu": lambda text: substitute(pattern, f"if constexpr ({kept})", text)}
    source = stage(sources, folder, edits)

    spec = importlib.util.spec_from_file_location("marlin_generate_kernels", sources / "generate_kernels.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no generate_kernels.py in {sources}")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    kernels = [
        line for line in generator.render_templates_for_combo("vllm::kU4", "fp16") if "pipe_stages, 8, false>" in line
    ]
    if not kernels:
        raise RuntimeError(f"{sources / 'generate_kernels.py'} renders no kernel for uint4 in groups of 128")
    files = [source / "marlin_torch_fp16.cpp", source / "gptq_marlin_fp16.cu"]
    files += [source / "gptq_marlin_repack.cu", source / "awq_marlin_repack.cu"]
    for index in range(MARLIN_SLICES):
        files.append(source / f"kernel_fp16_ku4_{index}.cu")
        lines = [generator.FILE_HEAD, *kernels[index::MARLIN_SLICES], generator.FILE_TAIL]
        write(files[-1], "\n".join(lines))
    # The kernels' host stubs must not be static: the dispatcher is in another file. The flags of ptxas are GPTQModel's.
    flags = ["-static-global-template-stub=false", "-Xptxas", "-O3,-dlcm=ca", "-diag-suppress=179,39,177"]
    compile_and_load("marlin", folder, files, flags)
    return torch.ops.gptqmodel_marlin_fp16


@functools.cache
def load_rotation(sources: Path) -> Any:
    """Builds ParoQuant's rotation from sources/rotation; returns torch.ops.rotation.rotate.default."""
    folder = build_folder("rotation")
    source = stage(sources / "rotation", folder, {"rotation.cu": str})
    flags = ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__"]
    flags += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    compile_and_load("rotation", folder, [source / "rotation.cu"], [*flags, "--use_fast_math"])  # as ParoQuant has it
    return torch.ops.rotation.rotate.default


@functools.cache
def load_hadamard(sources: Path) -> Any:
    """Builds the Hadamard transform from sources/hadamard; returns the namespace torch.ops.gptqmodel_hadamard."""
    folder = build_folder("hadamard")
    branches = r"    \} else if \(ITYPE == at::ScalarType::BFloat16\).*?(?=    \} else \{)"
    source = stage(sources / "hadamard", folder, {"hadamard.cpp": lambda text: substitute(branches, "", text)})
    text = (source / "fast_hadamard_transform_cuda.cu").read_text()
    instance = re.compile(r"^template void \w+<(.+?)>\(HadamardParamsBase.*;$", re.MULTILINE)
    kept = [match[0] for match in instance.finditer(text) if match[1] == "at::Half"]
    if len(kept) != 5:
        raise RuntimeError(f"{len(kept)} float16 transforms, expected five; is this the version that the head names?")
    files = [source / "hadamard.cpp"]
    for index, line in enumerate(kept):
        files.append(source / f"hadamard_fp16_{index}.cu")
        write(files[-1], instance.sub("", text) + line + "\n")
    compile_and_load("hadamard", folder, files, ["-diag-suppress=179,39,177"])
    return torch.ops.gptqmodel_hadamard


def registered(namespace: str, operator: str, loader: str) -> Any:
    """torch.ops.<namespace>.<operator>.default, or an error that says how to load it."""
    if not hasattr(getattr(torch.ops, namespace), operator):
        raise RuntimeError(f"torch.ops.{namespace}.{operator} is not registered: call {loader} first")
    return getattr(getattr(torch.ops, namespace), operator).default


# Calling


def require(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """An error unless the tensor is on a GPU, of that dtype and shape."""
    if not tensor.is_cuda or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: {given}, expected {dtype} {shape} on a CUDA device")


def pack_columns(columns: Tensor) -> Tensor:
    """uint8 [R, N] of values under 16 → int32 [R, N/8], eight columns a word in AWQ's order."""
    columns = columns.reshape(columns.shape[0], -1, 8)
    words = torch.zeros(columns.shape[:2], dtype=torch.int32, device=columns.device)
    for nibble, column in enumerate(NIBBLES):
        words |= columns[:, :, column].to(torch.int32) << 4 * nibble
    return words


def permute_columns(columns: Tensor) -> Tensor:
    """[R, N] → [R, N], each 64 columns transposed as an 8×8 block: the order of Marlin's scales and zero points."""
    return columns.reshape(columns.shape[0], -1, 8, 8).transpose(-1, -2).reshape(columns.shape).contiguous()


@functools.cache
def marlin_scratch(device: torch.device) -> Tensor:
    """float32 buffer in which Marlin reduces partial sums, large enough for every M; one per device."""
    sizes = registered("gptqmodel_marlin_fp16", "marlin_scratch_sizes", "load_marlin")
    elements, _ = sizes(torch.empty(1, GROUP, dtype=torch.float16, device=device), 64, GROUP, True, False)
    return torch.empty(elements, dtype=torch.float32, device=device)


class MarlinLinear:
    """A linear layer with 4-bit weights (codes − zeros) · scales in groups of 128, computed by Marlin as for AWQ.

    Everything but the output is allocated at construction, and a call doesn't wait for the GPU: it can be captured in
    a CUDA graph. All layers of a device share the buffer of partial sums, so they must run one after another.
    """

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        """codes: uint8 [N, C], zeros: uint8 [N, C/128], both under 16; scales: float16 [N, C/128]; all on a GPU.

        N must be a multiple of 64, C of 128, and at least 256. Call `load_marlin` before.
        """
        outputs, inputs = codes.shape
        if outputs % 64 or inputs % GROUP or inputs == GROUP:
            raise ValueError(f"N = {outputs} must be a multiple of 64, C = {inputs} of {GROUP} and more than {GROUP}")
        require(codes, "codes", torch.uint8, (outputs, inputs))
        require(zeros, "zeros", torch.uint8, (outputs, inputs // GROUP))
        require(scales, "scales", torch.float16, (outputs, inputs // GROUP))
        repack = registered("gptqmodel_marlin_fp16", "awq_marlin_repack", "load_marlin")
        self.gemm = registered("gptqmodel_marlin_fp16", "gptq_marlin_gemm_fp16", "load_marlin")
        self.inputs, self.outputs = inputs, outputs
        self.weight = repack(pack_columns(codes.t()), inputs, outputs, 4)  # int32 [C/16, 2N]
        self.scales = permute_columns(scales.t())  # float16 [C/128, N]
        self.zeros = pack_columns(permute_columns(zeros.t()))  # int32 [C/128, N/8]
        multiprocessors = torch.cuda.get_device_properties(codes.device).multi_processor_count
        self.workspace = torch.zeros(max(multiprocessors, 128), dtype=torch.int32, device=codes.device)  # locks
        self.scratch = marlin_scratch(codes.device)
        self.order = torch.empty(0, dtype=torch.int32, device=codes.device)  # no activation order

    def __call__(self, x: Tensor) -> Tensor:
        """x: float16 [M, C], rows contiguous → float16 [M, N]."""
        return self.gemm(
            x,
            None,  # c, the output
            self.weight,
            None,  # b_bias
            self.scales,
            None,  # global_scale
            self.zeros,
            self.order,  # g_idx
            self.order,  # perm
            self.workspace,
            UINT4,  # b_q_type_id
            x.shape[0],
            self.outputs,
            self.inputs,
            True,  # is_k_full
            False,  # use_atomic_add
            True,  # use_fp32_reduce
            False,  # is_zp_float
            self.scratch,  # c_tmp
            None,  # a_tmp
        )


class OriginalRotation:
    """ParoQuant's rotation of activations: channels scaled, then rotated in pairs, K times, within groups."""

    def __init__(self, theta: Tensor, pairs: Tensor, channel_scales: Tensor, group_size: int = 128) -> None:
        """theta: float16 [K, C/2]; pairs: int16 [K, C], indices in the group; channel_scales: float16 [1, C].

        K must be 8 or 1, the group size 128 or 64. All on a GPU. Call `load_rotation` before.
        """
        rotations, channels = pairs.shape
        if rotations not in {1, 8} or group_size not in {64, 128} or channels % group_size:
            raise ValueError(f"K = {rotations} must be 1 or 8, the groups of {group_size} of 64 or 128 of {channels}")
        require(theta, "theta", torch.float16, (rotations, channels // 2))
        require(pairs, "pairs", torch.int16, (rotations, channels))
        require(channel_scales, "channel_scales", torch.float16, (1, channels))
        self.rotate = registered("rotation", "rotate", "load_rotation")
        self.theta, self.pairs = theta.contiguous(), pairs.contiguous()
        self.channel_scales, self.group_size = channel_scales.contiguous(), group_size

    def __call__(self, x: Tensor) -> Tensor:
        """x: float16 [M, C], contiguous → float16 [M, C]."""
        return self.rotate(x, self.pairs, self.theta, self.channel_scales, self.group_size)


@functools.cache
def hadamard_operator(channels: int) -> Any:
    """The operator for that length: a power of two up to 32768, or 12, 20, 28 or 40 times one of 4 … 1024."""
    for factor, suffix in [(1, ""), (12, "_12N"), (20, "_20N"), (28, "_28N"), (40, "_40N")]:
        power = channels // factor
        smallest, largest = (8, 32768) if factor == 1 else (4, 1024)
        if channels % factor == 0 and power & (power - 1) == 0 and smallest <= power <= largest:
            return registered("gptqmodel_hadamard", f"fast_hadamard_transform{suffix}", "load_hadamard")
    raise ValueError(f"no Hadamard transform of length {channels} in the package")


def hadamard(x: Tensor) -> Tensor:
    """x: float16 [M, C], contiguous → float16 [M, C]: the transform of whole rows, with scale 1/√C.

    Call `load_hadamard` before. For a C that isn't a power of two, the Hadamard matrix is the package's own.
    """
    return hadamard_operator(x.shape[1])(x, x.shape[1] ** -0.5)


# Checking


def relative_error(output: Tensor, reference: Tensor) -> float:
    """‖output − reference‖ / ‖reference‖, in float64."""
    return float((output.double() - reference.double()).norm() / reference.double().norm())


def rotation_reference(x: Tensor, theta: Tensor, pairs: Tensor, channel_scales: Tensor) -> Tensor:
    """The rotation in float64, by its definition; arguments as of `OriginalRotation` and its call."""
    y = x.double() * channel_scales.double()
    offsets = torch.arange(0, x.shape[1], GROUP, device=x.device)[:, None]
    for angles, indices in zip(theta.double(), pairs.long(), strict=True):
        i, j = (indices.view(-1, GROUP) + offsets).view(-1, 2).unbind(1)
        first, second = y[:, i], y[:, j]
        y[:, i] = angles.cos() * first + angles.sin() * second
        y[:, j] = angles.cos() * second - angles.sin() * first
    return y


def hadamard_reference(x: Tensor) -> Tensor:
    """The transform in float64, in Sylvester's order, with scale 1/√C; C must be a power of two."""
    rows, channels = x.shape
    y, step = x.double(), 1
    while step < channels:
        y = y.view(rows, -1, 2, step)
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), dim=2)
        step *= 2
    return y.reshape(rows, channels) * channels**-0.5


def replayed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function's output on x when captured in a CUDA graph and replayed."""
    given = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(given)
    given.copy_(x)
    graph.replay()
    return output.clone()


def check_marlin(report: Callable[[str, float], None]) -> None:
    for inputs, outputs in [(4096, 6144), (2560, 2560), (14336, 4096)]:
        codes = torch.randint(16, (outputs, inputs), device="cuda", dtype=torch.uint8)
        zeros = torch.randint(16, (outputs, inputs // GROUP), device="cuda", dtype=torch.uint8)
        scales = (torch.rand(outputs, inputs // GROUP, device="cuda") * 0.01 + 0.005).half()
        linear = MarlinLinear(codes, zeros, scales)
        weight = codes.double() - zeros.double().repeat_interleave(GROUP, 1)
        weight *= scales.double().repeat_interleave(GROUP, 1)
        for rows in [1, 16, 64, 300]:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
            reference, shape = x.double() @ weight.t(), f"M = {rows}, C = {inputs}, N = {outputs}"
            report(f"marlin {shape}", relative_error(linear(x), reference))
            report(f"marlin {shape}, in a graph", relative_error(replayed(linear, x), reference))


def check_rotation(report: Callable[[str, float], None]) -> None:
    for channels in [4096, 2560, 14336]:
        theta = torch.randn(8, channels // 2, device="cuda").half()
        pairs = torch.rand(8, channels // GROUP, GROUP, device="cuda").argsort(-1).view(8, channels).short()
        channel_scales = (torch.rand(1, channels, device="cuda") + 0.5).half()
        rotation = OriginalRotation(theta, pairs, channel_scales)
        for rows in [1, 16, 300]:
            x = torch.randn(rows, channels, device="cuda", dtype=torch.float16)
            reference = rotation_reference(x, theta, pairs, channel_scales)
            report(f"rotation M = {rows}, C = {channels}", relative_error(rotation(x), reference))
        report(f"rotation C = {channels}, in a graph", relative_error(replayed(rotation, x), reference))


def check_hadamard(report: Callable[[str, float], None]) -> None:
    for channels in [4096, 2560, 14336]:
        one = torch.eye(channels, device="cuda", dtype=torch.float16)
        matrix = hadamard(one).double()
        report(f"hadamard C = {channels}, H Hᵀ", relative_error(matrix @ matrix.t(), one))
        sizes = float((matrix.abs() * channels**0.5 - 1).abs().max())
        report(f"hadamard C = {channels}, |entries| (largest error)", sizes)
        for rows in [1, 16, 300]:
            x = torch.randn(rows, channels, device="cuda", dtype=torch.float16)
            power_of_two = channels & (channels - 1) == 0
            reference = hadamard_reference(x) if power_of_two else x.double() @ matrix
            report(f"hadamard M = {rows}, C = {channels}", relative_error(hadamard(x), reference))
        report(f"hadamard C = {channels}, in a graph", relative_error(replayed(hadamard, x), reference))


def last_lines(error: BaseException) -> str:
    """The compiler's lines that say "error", if any, and the traceback's last 15 lines."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    told = [line for line in lines[:-15] if re.search(r"\berror\b|undefined", line)]
    return "\n".join(f"    {line[:400]}" for line in told[:15] + lines[-15:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path(".peers"), help="folder with marlin, rotation, hadamard")
    sources = parser.parse_args().sources.resolve()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    torch.manual_seed(0)
    torch.cuda.init()
    failures = 0

    def timed(load: Callable[[Path], Any]) -> float:
        start = time.perf_counter()
        load(sources)
        return time.perf_counter() - start

    def report(what: str, error: float) -> None:
        nonlocal failures
        failed = not error < TOLERANCE  # NaN fails
        failures += failed
        print(f"{'FAILED' if failed else 'ok':6} {what}: relative error {error:.2e}", flush=True)

    peers: dict[str, tuple[Callable[[Path], Any], Callable[[Callable[[str, float], None]], None]]] = {
        "marlin": (load_marlin, check_marlin),
        "rotation": (load_rotation, check_rotation),
        "hadamard": (load_hadamard, check_hadamard),
    }
    with ThreadPoolExecutor(len(peers)) as pool:  # side by side: each spends its time in ninja
        builds = {name: pool.submit(timed, load) for name, (load, _) in peers.items()}
    for name, (_, check) in peers.items():
        try:
            print(f"ok     {name}: built in {builds[name].result():.1f} s", flush=True)
            check(report)
        except Exception as error:
            failures += 1
            print(f"FAILED {name}\n{last_lines(error)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

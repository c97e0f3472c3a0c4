"""Loss against step for several transforms of one linear layer with outliers: the paper's figure, on the embedded model.

    python benchmarks/bench_transforms.py MODEL [--linear model.layers.0.mlp.down_proj] [--steps 150] [--output …]

The loss is the relative quadratic error of the layer's output on the calibration text, weights rounded to 4 bits in
groups of 64. Compared: nothing, channel scales, 8 independent rotations, both, both with the most different pairs
first, any orthogonal matrix per group (trained through the matrix exponential), and a random Hadamard matrix per group.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pairquant.checkpoint.read import ModelFiles
from pairquant.core.rotation import givens_positions, rotation_matrix
from pairquant.models.blocks import find_blocks
from pairquant.optimize.calibration import calibrate
from pairquant.optimize.search import Problem, loss_and_gradients, select_for
from pairquant.optimize.streams import Places, Streams
from pairquant.spec.linear import Spec
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import Recipe
from pairquant.support.windows import window_prefix

G = 64
CONFIG = QuantConfig(group_size=G, samples=16, seq_len=1024, recipe=Recipe())
#: Parameters → the matrices diag(a) R and Rᵀ diag(1/a), both [groups, G, G].
Build = Callable[[], tuple[Tensor, Tensor]]


def problem_of(name: str, path: str) -> Problem:
    """The layer's weight and the second moments of its inputs in the original model."""
    files = ModelFiles.find(name)
    model, cpu = files.model(torch.float32), torch.device("cpu")
    blocks = find_blocks(model)
    index = next(i for i, block in enumerate(blocks) if path in block.sites)
    tokenizer = files.tokenizer()
    prefix = window_prefix(tokenizer)
    tokens = calibrate(tokenizer, CONFIG.calibration, CONFIG.samples, CONFIG.seq_len, 0, prefix=prefix).tokens
    with torch.no_grad():
        streams = Streams.start(model, blocks, tokens, False, Places(cpu, cpu, torch.float32), print)
        for before in range(index):
            streams.advance(blocks[before], before)
        moments, _ = streams.observe(blocks[index], index).checked(blocks[index].sites)
    hessian = next(m.hessian for m in moments if path in m.readers)
    return Problem(blocks[index].sites[path].weight, hessian, 0, CONFIG.spec)


def scaled(matrix: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    a = log_scale.exp().view(-1, G)
    return matrix * a[:, :, None], matrix.mT / a[:, None, :]


def givens(problem: Problem, selection: str, scale: bool, rotations: int = 8) -> tuple[list[Tensor], Build]:
    chosen = select_for(problem.weight, problem.seed, Spec(4, G, rotations), selection)
    theta = torch.zeros(chosen.free.shape, requires_grad=True)
    log_scale = torch.zeros(problem.channels, requires_grad=True)
    positions = givens_positions(chosen.pairs, G)
    trained = ([theta] if rotations else []) + ([log_scale] if scale else [])
    return trained, lambda: scaled(rotation_matrix(theta * chosen.free, chosen.pairs, G, positions), log_scale)


def orthogonal(problem: Problem, scale: bool) -> tuple[list[Tensor], Build]:
    skew = torch.zeros(problem.channels // G, G, G, requires_grad=True)
    log_scale = torch.zeros(problem.channels, requires_grad=True)
    trained = [skew, *([log_scale] if scale else [])]
    return trained, lambda: scaled(torch.linalg.matrix_exp(skew - skew.mT), log_scale)


def hadamard(problem: Problem) -> tuple[list[Tensor], Build]:
    """Sylvester's matrix with random signs, nothing trained."""
    matrix = torch.ones(1, 1)
    while len(matrix) < G:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (problem.channels // G, G, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [], lambda: scaled(signs * matrix / math.sqrt(G), torch.zeros(problem.channels))


def curve(problem: Problem, trained: list[Tensor], build: Build, steps: int) -> list[float]:
    """Relative error before each step, by the recipe's optimizer and rates."""
    recipe, norm = CONFIG.recipe, (problem.weighted(problem.weight) * problem.weight).sum()
    optimizer = torch.optim.AdamW(
        trained or [torch.zeros(1)], lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0
    )
    losses = []
    for step in range(steps if trained else 1):
        into, out_of = build()
        with torch.no_grad():
            loss, grad_into, grad_out_of = loss_and_gradients(problem, into.detach(), out_of.detach())
        losses.append(float(loss / norm))
        if trained:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (0.05 + 0.95 * cosine)
            optimizer.zero_grad()
            torch.autograd.backward((into, out_of), (grad_into / norm, grad_out_of / norm))
            optimizer.step()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--linear", default="model.layers.0.mlp.down_proj")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/transforms-cpu.json"))
    options = parser.parse_args()
    problem = problem_of(options.model, options.linear)
    methods = {
        "channel scales": givens(problem, "random", scale=True, rotations=0),
        "8 rotations": givens(problem, "random", scale=False),
        "8 rotations and scales": givens(problem, "random", scale=True),
        "8 rotations and scales, most different pairs": givens(problem, "magnitude", scale=True),
        "any orthogonal matrix": orthogonal(problem, scale=False),
        "any orthogonal matrix and scales": orthogonal(problem, scale=True),
        "random Hadamard": hadamard(problem),
    }
    results = {"linear": options.linear, "steps": options.steps, "torch": torch.__version__, "curves": {}}
    for name, (trained, build) in methods.items():
        losses = curve(problem, trained, build, options.steps)
        results["curves"][name] = [round(loss, 6) for loss in losses]
        print(f"{name:46} first {losses[0]:.5f}  best {min(losses):.5f}", flush=True)
    options.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

"""Block-wise training: the quantized block, on what the quantized model hands it, is to answer as the original does.

`train_block` is the paper's recipe (section 4): transforms first, then weights and quantizers. `refit_block` trains
what is continuous in a block that has been rounded by any other means.

A stage never touches the block: its weights are computed from what is trained (see `stages`) and handed to
the block's forward pass for its duration. They are computed once a step; gradients gather on them over the step's
micro-batches, then go back to what is trained, so that no graph is longer than one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.blocks import Block
from ..models.calls import Call
from ..spec.linear import PackedLinear
from ..spec.options import QuantConfig
from ..spec.recipe import Refit, Training
from ..support.errors import ConfigError
from .descent import Descent, leaves_of, pass_on
from .ranks import ALONE, Ranks
from .stages import BlockTransforms, Groups, Layouts, RefitStage, Stage, TransformStage, WeightStage
from .substituted import Substituted, Weights

Report = Callable[[dict], None]


@dataclass
class BlockData:
    """What a block is trained on, as lists of micro-batches: floating [B, T, H], all of one B, on any device.

    inputs: hidden states that enter the block in the quantized model; targets: the original block's outputs on the
    original model's hidden states; validation_*: the same for held-out windows, may be empty.
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    validation_inputs: list[Tensor]
    validation_targets: list[Tensor]

    @property
    def held_out(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and targets that choose the best epoch: the validation ones, or, where there are none, those of training."""
        if self.validation_inputs:
            return self.validation_inputs, self.validation_targets
        return self.inputs, self.targets

    def micro_batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the samples with these numbers: int64 [B] → two [B, T, H]."""
        size = len(self.inputs[0])
        places = [divmod(sample, size) for sample in samples.tolist()]
        inputs, targets = (torch.stack([states[i][row] for i, row in places]) for states in (self.inputs, self.targets))
        return inputs, targets


def _silent(_: dict) -> None:
    pass


@dataclass
class BlockTask:
    """What to train: a block, on data.

    call, validation_call: what the block is called with besides hidden states, on the text and on held-out windows;
    layouts: of its linears, by path; groups: the linears (full paths) that share one transform, singletons included;
    seeds: for pair selection, by the first path of each group; report: called with stage, epoch, loss (mean over the epoch's steps; None before training) and validation
    (what chooses the epoch, see `BlockData.held_out`).
    """

    block: Block
    call: Call
    data: BlockData
    layouts: Layouts
    groups: Groups
    seeds: Mapping[str, int]
    config: QuantConfig
    report: Report = _silent
    ranks: Ranks = ALONE
    validation_call: Call | None = None

    @property
    def judging_call(self) -> Call:
        """What the block is called with on the windows of `BlockData.held_out`."""
        return self.validation_call if self.data.validation_inputs and self.validation_call is not None else self.call


@torch.no_grad()
def train_block(task: BlockTask, starts: list[float]) -> dict[str, PackedLinear]:
    """Return both stages of `recipe.training`: the packed linears by path, on the block's device; the block stays as it is.

    starts: for each group, what its inverse channel scales start from.
    """
    block, config = task.block, task.config
    training = config.recipe.training or Training()
    block.module.requires_grad_(False).eval()
    transforms = BlockTransforms.untrained(block, task.groups, task.layouts, task.seeds, starts, config.pair_selection)
    first = TransformStage(block, task.groups, task.layouts, transforms, config.recipe, training.transform_rate)
    fit(first, 1, task, training)
    second = WeightStage(block, task.groups, task.layouts, transforms.build(), training)
    fit(second, 2, task, replace(training, epochs=training.weight_epochs))
    return second.packed()


@torch.no_grad()
def refit_block(
    task: BlockTask, packed: Mapping[str, PackedLinear], kept_as: torch.dtype = torch.float32
) -> dict[str, PackedLinear]:
    """Train scales, angles and norms by `recipe.refit`: new packed linears with the same codes, on the block's device.

    The block keeps its weights but for the norms', with values that `kept_as`, the dtype of the checkpoint, can hold.
    """
    block, recipe = task.block, task.config.recipe
    device = next(block.module.parameters()).device
    return refit(RefitStage(block, task.groups, dict(packed), recipe, recipe.refit or Refit(), kept_as, device), task)


@torch.no_grad()
def refit(stage: RefitStage, task: BlockTask) -> dict[str, PackedLinear]:
    """Train a stage by `recipe.refit`, give the block the trained norm weights, and return the packed linears."""
    block, rates = task.block, task.config.recipe.refit or Refit()
    block.module.requires_grad_(False).eval()
    fit(stage, 3, task, rates.training)
    for name, norm in stage.norms.items():
        parameter = block.module.get_parameter(name.removeprefix(f"{block.path}."))
        parameter.copy_(stage.as_kept(norm))
    return stage.packed()


def fit(stage: Stage, number: int, task: BlockTask, how: Training) -> None:
    """Train `stage.trained` for `how.epochs` and leave the values of the best epoch, the start counting as epoch 0.

    Several ranks hold equally many windows each; gradients and losses are averaged over them.
    """
    if not how.epochs or not stage.trained:
        return
    data, ranks, report = task.data, task.ranks, task.report
    per_step = _micro_batches_per_step(max(1, how.batch // ranks.size), len(data.inputs[0]))
    objective = _Objective(task, task.call, how.loss)
    judge = _Objective(task, task.judging_call, how.loss)
    descent = Descent(stage.trained, how, how.epochs * math.ceil(len(data.inputs) / per_step))
    generator = torch.Generator().manual_seed(task.config.seed)  # on the CPU: the same order on every device
    best = ranks.mean(judge.mean(stage.weights(), *data.held_out), judge.device)
    kept = descent.values()
    report({"stage": number, "epoch": 0, "loss": None, "validation": best})
    for epoch in range(1, how.epochs + 1):
        order = torch.randperm(len(data.inputs) * len(data.inputs[0]), generator=generator)
        losses = []
        for chosen in order.view(len(data.inputs), -1).split(per_step):
            losses.append(_gradients(stage, objective, data, chosen))
            ranks.average(descent.gradients)
            descent.step()
        measured = ranks.mean(judge.mean(stage.weights(), *data.held_out), judge.device)
        if measured < best:
            best, kept = measured, descent.values()
        loss = torch.cat(losses).mean().item()
        report({"stage": number, "epoch": epoch, "loss": loss, "validation": measured})
    descent.end(kept)


@torch.enable_grad()
def _gradients(stage: Stage, objective: _Objective, data: BlockData, chosen: Tensor) -> Tensor:
    """Return gradients of one step's mean loss on what is trained; returns the losses of the micro-batches `chosen` [n, B]."""
    weights = stage.weights()
    leaves = leaves_of(weights)
    losses = []
    for samples in chosen:
        loss = objective.of(leaves, *data.micro_batch(samples), samples)
        (loss / len(chosen)).backward()
        losses.append(loss.detach())
    pass_on(weights, leaves)
    return torch.stack(losses)


class _Objective:
    """The mean loss, over elements, of a block that computes with other weights than its own."""

    def __init__(self, task: BlockTask, call: Call, loss: str):
        self.runner = Substituted(task.block, call, task.layouts)
        self.loss = F.smooth_l1_loss if loss == "smooth_l1" else F.mse_loss
        self.device = self.runner.device

    def of(self, weights: Weights, inputs: Tensor, targets: Tensor, windows: Tensor) -> Tensor:
        """inputs, targets: [B, T, H] of the windows with these numbers, int64 [B] → float32 scalar."""
        outputs = self.runner.of(weights, inputs, windows)
        return self.loss(outputs.float(), targets.to(self.device, torch.float32))

    def mean(self, weights: Weights, inputs: list[Tensor], targets: list[Tensor]) -> float:
        """Return the mean loss over micro-batches of one size, without gradients."""
        numbers = torch.arange(sum(map(len, inputs))).split([len(hidden) for hidden in inputs])
        losses = [self.of(weights, *batch) for batch in zip(inputs, targets, numbers, strict=True)]
        return torch.stack(losses).mean().item()


def _micro_batches_per_step(batch: int, size: int) -> int:
    if batch < size:
        raise ConfigError(
            f"batch is {batch}, but micro-batches hold {size} samples: raise batch, or use longer windows"
        )
    return math.ceil(batch / size)

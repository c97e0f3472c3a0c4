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
from torch import Tensor, nn
from torch.func import functional_call

from ..models.blocks import Block, Call
from ..spec.linear import PackedLinear
from ..spec.options import QuantConfig
from ..spec.recipe import Refit, Training
from ..support.errors import ConfigError
from .ranks import ALONE, Ranks
from .stages import BlockTransforms, Groups, Layouts, RefitStage, Stage, TransformStage, WeightStage

Report = Callable[[dict], None]
Weights = dict[str, Tensor]


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

    call: what the block is called with besides hidden states; layouts: of its linears, by path; groups: the linears
    (full paths) that share one transform, singletons included; seeds: for pair selection, by the first path of each
    group; report: called with stage, epoch, loss (mean over the epoch's steps; None before training) and validation
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
    block, refit = task.block, task.config.recipe.refit or Refit()
    block.module.requires_grad_(False).eval()
    device = next(block.module.parameters()).device
    moved = {path: linear.to(device) for path, linear in packed.items()}
    stage = RefitStage(block, task.groups, moved, task.config.recipe, refit, kept_as)
    optimizer = Training(epochs=refit.epochs, batch=refit.batch, final_rate=refit.final_rate, weight_decay=0.0)
    fit(stage, 3, task, optimizer)
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
    objective = _Objective(task.block, task.call, how.loss)
    tensors = [tensor.requires_grad_() for tensor, _ in stage.trained]
    by_rate: dict[float, list[Tensor]] = {}
    for tensor, rate in stage.trained:  # a block of 128 experts has 400 weights: few groups take few launches
        by_rate.setdefault(rate, []).append(tensor)
    optimizer = torch.optim.AdamW(
        [{"params": alike, "lr": rate} for rate, alike in by_rate.items()],
        betas=(how.beta1, how.beta2),
        eps=how.eps,
        weight_decay=how.weight_decay,
        fused=True,
    )
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _cosine(how.final_rate, how.epochs * math.ceil(len(data.inputs) / per_step))
    )
    generator = torch.Generator().manual_seed(task.config.seed)  # on the CPU: the same order on every device
    best = ranks.mean(objective.mean(stage.weights(), *data.held_out), objective.device)
    kept = [tensor.detach().clone() for tensor in tensors]
    report({"stage": number, "epoch": 0, "loss": None, "validation": best})
    for epoch in range(1, how.epochs + 1):
        order = torch.randperm(len(data.inputs) * len(data.inputs[0]), generator=generator)
        losses = []
        for chosen in order.view(len(data.inputs), -1).split(per_step):
            losses.append(_gradients(stage, objective, data, chosen))
            ranks.average([tensor.grad for tensor in tensors if tensor.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        measured = ranks.mean(objective.mean(stage.weights(), *data.held_out), objective.device)
        if measured < best:
            best, kept = measured, [tensor.detach().clone() for tensor in tensors]
        loss = torch.cat(losses).mean().item()
        report({"stage": number, "epoch": epoch, "loss": loss, "validation": measured})
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.requires_grad_(False).copy_(value)


@torch.enable_grad()
def _gradients(stage: Stage, objective: _Objective, data: BlockData, chosen: Tensor) -> Tensor:
    """Return gradients of one step's mean loss on what is trained; returns the losses of the micro-batches `chosen` [n, B]."""
    weights = stage.weights()
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    losses = []
    for samples in chosen:
        loss = objective.of(leaves, *data.micro_batch(samples))
        (loss / len(chosen)).backward()
        losses.append(loss.detach())
    used = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([weights[name] for name in used], [leaves[name].grad for name in used])
    return torch.stack(losses)


class _Objective(nn.Module):
    """The mean loss, over elements, of a block that computes with other weights than its own."""

    def __init__(self, block: Block, call: Call, loss: str):
        super().__init__()
        self.block, self.path, self.call = block.module, block.path, call
        self.loss = F.smooth_l1_loss if loss == "smooth_l1" else F.mse_loss
        first = next(block.module.parameters())
        self.device = first.device
        self.low_precision = first.is_cuda or first.dtype == torch.bfloat16
        self.norms = self._norms_in_float32() if self.device.type == "cpu" else {}

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets: [B, T, H] → float32 scalar. bfloat16 within the block only: what is trained is float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            outputs = self.call.run(self.block, inputs.to(self.device, torch.float32))
        return self.loss(outputs.float(), targets.to(self.device, torch.float32))

    def of(self, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        named = {f"block{name.removeprefix(self.path)}": self._operand(weight) for name, weight in weights.items()}
        return functional_call(self, self.norms | named, (inputs, targets))

    def _norms_in_float32(self) -> Weights:
        """Return copies of the parameters of LayerNorms: on CPUs they take float32 inputs, which autocast leaves, only with these."""
        return {
            f"block.{path}.{name}": parameter.float()
            for path, module in self.block.named_modules()
            if isinstance(module, nn.LayerNorm)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype != torch.float32
        }

    def _operand(self, weight: Tensor) -> Tensor:
        """Return a weight as the block takes it: those of experts, [E, …], in bfloat16 where the others are turned into it.

        Autocast leaves grouped products as they are. Transformers turns their other operand into the dtype of the weights.
        """
        return weight.to(torch.bfloat16) if self.low_precision and weight.dim() == 3 else weight

    def mean(self, weights: Weights, inputs: list[Tensor], targets: list[Tensor]) -> float:
        """Return the mean loss over micro-batches of one size, without gradients."""
        losses = [self.of(weights, hidden, target) for hidden, target in zip(inputs, targets, strict=True)]
        return torch.stack(losses).mean().item()


def _micro_batches_per_step(batch: int, size: int) -> int:
    if batch < size:
        raise ConfigError(
            f"batch is {batch}, but micro-batches hold {size} samples: raise batch, or use longer windows"
        )
    return math.ceil(batch / size)


def _cosine(final: float, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate before each step: from 1 to `final` along half a cosine."""
    return lambda step: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))

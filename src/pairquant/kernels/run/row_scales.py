"""Tell whether the weights of a linear may be rounded to 8 bits in units of one scale for each row.

Many tokens are multiplied fastest that way. But a group whose scale is far below the largest one of its row is rounded
coarsely, and its error matters as much as any other's: a transform makes weights small where inputs are large.
"""

from __future__ import annotations

import torch

from ...core.activations import MIN_SCALE, rounded
from ...core.linear import rotated_weight
from ...spec.linear import PackedLinear

#: The largest error that the scales of rows may add, as `error` measures it. 4-bit layers of SmolLM2, with and without
#: channel scales and rotations, have 0.007 to 0.015 for int8 and 0.026 to 0.027 for fp8, whose steps shrink with the weight;
#: rounding to 4 bits itself changes their outputs by 0.04 to 0.10.
LARGEST_ERROR = 0.03
#: At most about so many rows are looked at, spread over all.
ROWS = 512
#: Said once, of the first such layer.
WARNING = (
    "the scales of a layer's groups differ so much that its weight is not rounded to 8 bits with one scale for each row. Such "
    "layers are multiplied group by group: exactly, but slower for many tokens."
)


def suffice(linear: PackedLinear, activations: str) -> bool:
    """Tell whether scales of rows change the weight little enough; activations: "int8" or "fp8", what it is rounded to.

    While torch.compile traces the answer is no, as it depends on the values of tensors.
    """
    return not torch.compiler.is_compiling() and error(linear, activations) <= LARGEST_ERROR


def error(linear: PackedLinear, activations: str) -> float:
    """Return the relative error that scales of rows add to the output, if all groups contribute to it equally.

    It is the root of the mean, over groups and rows, of the squared error of a group's weights over their squared norm.
    """
    weight = rotated_weight(linear.thinned(-(-linear.layout.out_features // ROWS)))
    groups = weight.unflatten(-1, (-1, linear.layout.group_size))
    added = (rounded(weight, activations, linear.layout.group_size) - weight).view_as(groups).square().sum(-1)
    return float((added / groups.square().sum(-1).clamp(min=MIN_SCALE)).mean().sqrt())

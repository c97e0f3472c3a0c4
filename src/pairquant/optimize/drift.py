"""Corrects drift: the inputs of a block in the quantized model differ from the original's, and its weights make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rounding import damped_cholesky, proxy_terms, ratio
from .moments import Moments
from .ranks import Ranks

#: Share of the mean diagonal of H added before solving for the drift correction.
DRIFT_DAMPING = 0.01
#: Most that a drift correction may change a layer's output, as a relative squared error.
MAX_DRIFT = 0.01


def drift_targets(weights: dict[str, Tensor], moments: Moments, drift: float, ranks: Ranks) -> dict[str, Tensor]:
    """Return the weights to approximate, for those that read one input: W + drift · D, D = W (X₀ᵀX - XᵀX)(XᵀX + damping)⁻¹.

    weights: by path, this rank's rows.

    W + D is the least-squares solution of X₀ Wᵀ = X (W + D)ᵀ: on the quantized model's input X it gives the output that
    the original gives on its own input X₀. Applied in full, the corrections of successive blocks amplify each other and
    diverge (docs/decisions.md); a quarter of each helps. None may change the output by more than `MAX_DRIFT`.
    """
    if not drift or moments.cross is None:
        return weights
    targets = {}
    difference = (moments.cross - moments.hessian).double()
    factor = damped_cholesky(moments.hessian, DRIFT_DAMPING)
    for path, weight in weights.items():
        change = drift * torch.cholesky_solve((weight.double() @ difference).T, factor).T.float()
        targets[path] = weight + change * _allowed(weight, change, moments, ranks)
    return targets


def drift_matrix(weight: Tensor, moments: Moments, drift: float, ranks: Ranks) -> Tensor:
    """Return A, float32 [C, C], with W + W A the target of `drift_targets`. weight: W, this rank's rows."""
    assert moments.cross is not None, "the recipe compares"
    difference = (moments.cross - moments.hessian).double()
    factor = damped_cholesky(moments.hessian, DRIFT_DAMPING)
    matrix = drift * torch.cholesky_solve(difference.T, factor).T.float()
    return matrix * _allowed(weight, weight @ matrix, moments, ranks)


def _allowed(weight: Tensor, change: Tensor, moments: Moments, ranks: Ranks) -> float:
    """Return the part of a change that `MAX_DRIFT` allows, at most 1."""
    terms = proxy_terms(weight, weight + change, moments.hessian)
    ranks.add(terms)
    return min(1.0, (MAX_DRIFT / max(ratio(terms), 1e-30)) ** 0.5)

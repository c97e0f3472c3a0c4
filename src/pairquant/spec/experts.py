"""Experts: the many small weights of one block whose transforms are stored once, as the original stores them.

The weights of expert e lie under `HOME.e.PART` (`….mlp.experts.3.gate_proj`), each with codes of its own. All weights
of a block that read the block's input share one transform, `HOME.gate_up_weight_*`, and all that read the inner
activations another, `HOME.down_weight_*`. With a transform for each expert, which the original does not know, these are
`HOME.e.gate_up_weight_*` and `HOME.e.down_weight_*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .linear import LinearLayout

#: Where the weight of an expert lies: home, number and part.
EXPERT = re.compile(r"(?P<home>.*)\.(?P<number>\d+)\.(?P<part>[^.]+)")
#: Names of the part that reads the inner activations; every other part reads the block's input.
DOWN = ("down_proj", "w2")
#: The tensors of a transform.
TRANSFORM = ("theta", "pairs", "channel_scales")


def pool_of(path: str, per_expert: bool = False) -> str:
    """Return what the transform of an expert's weight is named by: "….experts.gate_up" or "….experts.down".

    per_expert: with a transform for each expert, "….experts.3.gate_up" or "….experts.3.down".
    """
    found = EXPERT.fullmatch(path)
    assert found is not None, f"{path} is no expert's weight"
    home = f"{found['home']}.{found['number']}" if per_expert else found["home"]
    return f"{home}.{'down' if found['part'] in DOWN else 'gate_up'}"


def shared_name(path: str, name: str, per_expert: bool = False) -> str | None:
    """Return where the tensor `name` of the linear at `path` lies if linears share it; None if it could not be shared.

    per_expert: whether each expert has a transform of its own.
    """
    return f"{pool_of(path, per_expert)}_weight_{name}" if name in TRANSFORM and EXPERT.fullmatch(path) else None


def block_layouts(layouts: Mapping[str, LinearLayout], paths: Iterable[str]) -> dict[str, frozenset[LinearLayout]]:
    """Return path → the different layouts of all weights of the same block's experts, which are run in one way.

    layouts: by path; paths: those of experts' weights.
    """
    homes: dict[str, set[LinearLayout]] = {}
    home_of = {path: pool_of(path).rpartition(".")[0] for path in paths}
    for path, home in home_of.items():
        homes.setdefault(home, set()).add(layouts[path])
    return {path: frozenset(homes[home]) for path, home in home_of.items()}


def bits_per_weight(layouts: Mapping[str, LinearLayout], pooled: Mapping[str, str]) -> float:
    """Return the stored bits of linears, by path, over the number of their weights.

    pooled: path → the pool of an expert's weight; a transform that experts share counts once.
    """
    counted: set[str] = set()
    bits = weights = 0
    for path, layout in layouts.items():
        bits += layout.stored_bits()
        weights += layout.in_features * layout.out_features
        if (pool := pooled.get(path)) is not None:
            if pool in counted:
                bits -= layout.transform_bits()
            counted.add(pool)
    return bits / weights

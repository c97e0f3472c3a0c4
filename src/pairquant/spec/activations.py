"""The formats that the input of a quantized layer can be rounded to, at run time, in the rotated basis.

All are symmetric, without zero points, and dynamic: the scale of a span of values is computed from the values themselves,
so that nothing about the activations is stored but the name of the format.
"""

from __future__ import annotations

from dataclasses import dataclass

from .mx import E2M1_MAX, MX_BLOCK

#: The largest number that float8_e4m3fn holds.
E4M3_MAX = 448.0
#: What tables say of models whose activations are not rounded.
UNROUNDED = "not rounded"


@dataclass(frozen=True)
class ActivationFormat:
    """One format. bits: of a value, without its share of the scale; largest: the largest value before the scale.

    span: which values share a scale: "token", all channels of a token; "group", a token's channels of one group of the
    layer; "block", `MX_BLOCK` channels of a token.
    """

    bits: int
    largest: float
    span: str

    def channels(self, in_features: int, group_size: int) -> int:
        """Return how many channels share a scale in a layer of this size."""
        return {"token": in_features, "group": group_size, "block": MX_BLOCK}[self.span]


#: The formats by name. int8, int4: whole numbers; fp8: float8 with 4 bits of exponent, 3 of mantissa; mxfp4: E2M1 elements
#: with scales that are powers of two.
FORMATS: dict[str, ActivationFormat] = {
    "int8": ActivationFormat(8, 127.0, "token"),
    "fp8": ActivationFormat(8, E4M3_MAX, "token"),
    "int4": ActivationFormat(4, 7.0, "group"),
    "mxfp4": ActivationFormat(4, E2M1_MAX, "block"),
}
#: The names, in the order in which `LinearLayout.numbers` counts them, from 1; 0 is none. Only ever add at the end.
NAMES = tuple(FORMATS)

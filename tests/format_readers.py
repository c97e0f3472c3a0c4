"""Independent readers of other formats: what their programs make of the tensors of one weight, float32 [N, C]."""

import numpy as np
import pytest
import torch

from pairquant.formats.table import FORMATS


def bit_stream(words, bits):
    """The codes in rows of words, least significant bits first, one after the other: by big whole numbers."""
    rows = []
    for row in words.numpy().astype(np.uint32):
        number = int.from_bytes(row.astype("<u4").tobytes(), "little")
        rows.append([number >> bits * i & 2**bits - 1 for i in range(len(row) * 32 // bits)])
    return torch.tensor(rows)


def read_awq(tensors, config, packed):
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # where AutoAWQ finds columns 0 to 7 of a word

    def codes(words):
        nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
        return nibbles[..., order].flatten(1)

    spread = lambda t: t.repeat_interleave(config["group_size"], 0)  # noqa: E731
    q, z = codes(tensors["qweight"]), codes(tensors["qzeros"])
    return ((q - spread(z)) * spread(tensors["scales"].float())).T


def read_gptq(tensors, config, packed):
    bits = config["bits"]
    q = bit_stream(tensors["qweight"].T.contiguous(), bits)
    more = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    z = (bit_stream(tensors["qzeros"], bits) + more).T
    group = tensors["g_idx"].long()
    return (q - z[:, group]) * tensors["scales"].float().T[:, group]


def read_compressed(tensors, config, packed):
    how = config["config_groups"]["group_0"]["weights"]
    bits, half = how["num_bits"], 2 ** (how["num_bits"] - 1)
    q = bit_stream(tensors["weight_packed"], bits) - half
    assert tensors["weight_shape"].tolist() == list(q.shape)
    scale = tensors["weight_scale"].float()
    z = torch.zeros(scale.shape)
    if not how["symmetric"]:
        z = bit_stream(tensors["weight_zero_point"].T.contiguous(), bits).T - half
    spread = lambda t: t.repeat_interleave(how["group_size"], 1)  # noqa: E731
    return (q - spread(z)) * spread(scale)


def read_mlx(tensors, config, packed):
    q = bit_stream(tensors["weight"].view(torch.int32), config["bits"])
    spread = lambda t: t.float().repeat_interleave(config["group_size"], 1)  # noqa: E731
    return q * spread(tensors["scales"]) + spread(tensors["biases"])


def read_gguf(tensors, config, packed):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[FORMATS["gguf"].type_of(packed.layout)]
    return torch.from_numpy(gguf.quants.dequantize(tensors["weight"].numpy(), kind))


READERS = {
    "awq": read_awq, "gptq": read_gptq, "compressed-tensors": read_compressed, "mlx": read_mlx, "gguf": read_gguf,
}  # fmt: skip

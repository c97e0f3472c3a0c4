"""A tiny checkpoint, and `MUTATIONS` of it, a hypothesis strategy: each has one thing wrong and says what readers must make
of that. `examination.Bench` tries them on both readers.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from packed import random_packed
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from pairquant.core.linear import decode
from pairquant.spec.checkpoint import CheckpointConfig
from pairquant.spec.linear import TENSOR_NAMES, PackedLinear, Spec

WEIGHTS, INDEX, REPORT = "model.safetensors", "model.safetensors.index.json", "pairquant.json"
GROUP, ROTATIONS = 32, 2


class Draft:
    """The files of a checkpoint, to be changed and then written. A `Path` stands for a symbolic link to it."""

    def __init__(self, files: dict[str, bytes | Path]):
        self.files = dict(files)

    def json(self, name: str = "config.json") -> Any:
        return json.loads(self.files[name])

    def put_json(self, content: Any, name: str = "config.json") -> None:
        self.files[name] = json.dumps(content).encode()

    def tensors(self, name: str = WEIGHTS) -> dict[str, Tensor]:
        return tensors_of_bytes(self.files[name])

    def put_tensors(self, tensors: dict[str, Tensor], name: str = WEIGHTS) -> None:
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self.files[name] = bytes_of_tensors(tensors, {"format": "pt"})

    def header(self, name: str = WEIGHTS) -> dict[str, Any]:
        return json.loads(split(self.files[name])[0])

    def put_header(self, header: bytes, name: str = WEIGHTS) -> None:
        self.files[name] = struct.pack("<Q", len(header)) + header + split(self.files[name])[1]

    def write(self, directory: Path) -> Path:
        directory.mkdir()
        for name, content in self.files.items():
            if isinstance(content, Path):
                (directory / name).symlink_to(content)
            else:
                (directory / name).write_bytes(content)
        return directory


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + length], content[8 + length :]


@dataclass(frozen=True)
class Mutation:
    """change: what is done to the draft; the rest says what the readers must make of it.

    inspect, transformers: "same" (must read as if nothing had happened), "refused", "loads" (must read; the logits may
    be others, but finite), or "either" ("refused" or "loads"). foreign: Transformers may fail with an error of its own,
    or never asks us; sharded: the draft has an index and two shards.
    """

    kind: str
    what: str
    change: Callable[[Draft], Any]
    inspect: str
    transformers: str
    foreign: bool = False
    sharded: bool = False

    def __repr__(self) -> str:
        return f"{self.kind}: {self.what if len(self.what) < 300 else self.what[:300] + '…'}"


# ---------------------------------------------------------------------------------------------------------------------
# The undamaged checkpoint


def tiny_checkpoint() -> dict[str, Tensor]:
    """One block of Qwen2 (biases at q, k, v) with random weights, packed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    tensors = {}
    for seed, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            bias = module.bias is not None
            packed = random_packed(module.out_features, module.in_features, GROUP, ROTATIONS, seed, bias)
            tensors |= {f"{path}.{name}": tensor for name, tensor in packed.tensors.items()}
        else:
            tensors |= {
                f"{path}.{name}": parameter.detach().clone()
                for name, parameter in module.named_parameters(recurse=False)
            }
    return tensors


def tiny_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip


UNDAMAGED = tiny_checkpoint()
PACKED_PATHS = sorted({name.removesuffix(".qweight") for name in UNDAMAGED if name.endswith(".qweight")})
PACKED = sorted(name for name in UNDAMAGED if name.rpartition(".")[0] in PACKED_PATHS)
PLAIN = sorted(UNDAMAGED.keys() - set(PACKED))


def undamaged(sharded: bool) -> Draft:
    """As the writer leaves it."""
    config = tiny_config()
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], torch.float32
    entries = json.loads(config.to_json_string()) | {"model_type": "qwen2"}
    entries["quantization_config"] = CheckpointConfig(
        Spec(4, GROUP, ROTATIONS), modules_to_not_convert=("lm_head",), provenance={"tool": "pairquant", "seed": 0}
    ).to_dict()
    draft = Draft({})
    draft.put_json(entries)
    draft.put_json({"eos_token_id": 2, "max_length": 32}, "generation_config.json")
    draft.put_json({"linears": {path: {"error": 0.01} for path in PACKED_PATHS}, "seconds": 1.0}, REPORT)
    if not sharded:
        draft.put_tensors(UNDAMAGED)
        return draft
    names = sorted(UNDAMAGED)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in halves.items():
        draft.put_tensors({name: UNDAMAGED[name] for name in members}, file)
    homes = {name: file for file, members in halves.items() for name in members}
    draft.put_json({"metadata": {"total_size": 1}, "weight_map": homes}, INDEX)
    return draft


# ---------------------------------------------------------------------------------------------------------------------
# Values

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.text(max_size=12),
    st.just("x" * 100_000),
)
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)  # fmt: skip
#: JSON that `json.dumps` would not write.
RAW = st.one_of(
    st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "tru", "'x'", "\\u0000", ""]),
    st.sampled_from([10, 480, 900, 2000, 100_000]).map(lambda depth: "[" * depth + "]" * depth),
    st.sampled_from([10, 480, 900, 2000, 100_000]).map(lambda depth: '{"a":' * depth + "0" + "}" * depth),
)


def dumps_with(content: Any, place: tuple[str, ...], raw: str) -> bytes:
    """JSON in which the value at `place` is the text `raw`."""
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = "@raw@"
    return json.dumps(content).replace('"@raw@"', raw).encode("utf-8", "surrogatepass")


def noise(draw: Any, content: bytes) -> tuple[str, bytes]:
    """Damage that knows nothing of the format: cut, flipped, inserted, not UTF-8."""
    place = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "flip", "insert", "not UTF-8", "byte order mark", "zeros"]))
    changed = {
        "cut": lambda: content[:place],
        "flip": lambda: (
            content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
        ),
        "insert": lambda: content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:],
        "not UTF-8": lambda: content[:place] + b"\xff\xfe\xed\xa0\x80" + content[place:],
        "byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "zeros": lambda: content[:place] + b"\0" * 64 + content[place:],
    }[how]()
    return f"{how} at {place}", changed


# ---------------------------------------------------------------------------------------------------------------------
# config.json and the other JSON files


@st.composite
def config_bytes(draw) -> Mutation:
    what, content = noise(draw, undamaged(False).files["config.json"])
    return Mutation("config.json, bytes", what, _put("config.json", content), "either", "either", foreign=True)


@st.composite
def config_whole(draw) -> Mutation:
    text = draw(st.one_of(JUNK.map(json.dumps), RAW))
    return Mutation(
        "config.json, replaced",
        text,
        _put("config.json", text.encode("utf-8", "surrogatepass")),
        "refused",
        "refused",
        True,
    )


@st.composite
def config_duplicate(draw) -> Mutation:
    """A key twice: the last one counts for every JSON reader of Python."""
    key = draw(st.sampled_from(["bits", "group_size", "krot"]))
    value, first = draw(st.integers(-1, 200)), draw(st.booleans())

    def change(draft: Draft) -> None:
        content = draft.json()
        right = content["quantization_config"].pop(key)
        text = json.dumps(content)
        both = [(value, right), (right, value)][not first]
        inserted = "".join(f'"{key}": {v}, ' for v in both)
        draft.files["config.json"] = text.replace(
            '"quantization_config": {', '"quantization_config": {' + inserted
        ).encode()

    right = {"bits": 4, "group_size": GROUP, "krot": ROTATIONS}[key]
    outcome = "same" if first or value == right else "refused"
    return Mutation(
        "config.json, key twice", f"{key} {value}, {'first' if first else 'last'}", change, outcome, outcome
    )


REQUIRED = {"bits": 4, "group_size": GROUP, "krot": ROTATIONS}


@st.composite
def quantization_entry(draw) -> Mutation:
    """An entry that is ours: a wrong value is named, whoever reads it."""
    key = draw(st.sampled_from([*REQUIRED, "zero_point", "modules_to_not_convert", "shared_rotations", "provenance"]))
    value = draw(JUNK | st.sampled_from([2, 3, 4, 8, 32, 64, 128, 0, 1, 4.0, "4", True, ["lm_head"], [["a", "b"]], {}]))
    if key in REQUIRED:
        same = type(value) is int and value == REQUIRED[key]
        outcome = "same" if same else "refused"
    else:
        strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
        fits = {
            "zero_point": isinstance(value, bool),
            "modules_to_not_convert": strings,
            "shared_rotations": isinstance(value, list)
            and all(isinstance(group, list) and all(isinstance(item, str) for item in group) for group in value),
            "provenance": isinstance(value, dict),
        }[key]
        outcome = "same" if fits or value is None else "refused"

    def change(draft: Draft) -> None:
        content = draft.json()
        content["quantization_config"][key] = value
        draft.put_json(content)

    return Mutation("quantization_config, value", f"{key} = {value!r}", change, outcome, outcome)


@st.composite
def quantization_raw(draw) -> Mutation:
    """Text that may be no JSON, or a value that no writer writes: Transformers parses it first."""
    key, raw = (
        draw(st.sampled_from([*REQUIRED, "provenance", "modules_to_not_convert", "shared_rotations", "x"])),
        draw(RAW),
    )
    return Mutation(
        "quantization_config, text",
        f"{key}: {raw}",
        lambda draft: draft.files.update({"config.json": dumps_with(draft.json(), ("quantization_config", key), raw)}),
        "either",
        "either",
        foreign=True,
    )


@st.composite
def quantization_missing(draw) -> Mutation:
    key = draw(st.sampled_from([*REQUIRED, "modules_to_not_convert", "provenance", "dynamic"]))
    outcome = "refused" if key in REQUIRED else "same"

    def change(draft: Draft) -> None:
        content = draft.json()
        del content["quantization_config"][key]
        draft.put_json(content)

    return Mutation("quantization_config, entry missing", key, change, outcome, outcome)


@st.composite
def quantization_foreign(draw) -> Mutation:
    """Entries of others. Those that Transformers itself understands (`load_in_4bit`) may lead it elsewhere."""
    key, value = draw(st.text(max_size=12) | st.sampled_from(["sym", "desc_act", "version", "dequantize"])), draw(JUNK)
    ours = {*REQUIRED, "quant_method", "zero_point", "modules_to_not_convert", "shared_rotations", "provenance", "self"}
    key = key if key not in ours else key + "_"

    def change(draft: Draft) -> None:
        content = draft.json()
        content["quantization_config"][key] = value
        draft.put_json(content)

    return Mutation("quantization_config, foreign entry", f"{key!r} = {value!r}", change, "same", "same")


@st.composite
def quantization_whole(draw) -> Mutation:
    """No quantization_config, another method, or something else in its place: Transformers then never asks us."""
    method = draw(st.sampled_from(["paroquant2", "", "PAROQUANT"]) | JUNK.filter(lambda v: v != "paroquant"))
    replaced = draw(st.booleans())

    def change(draft: Draft) -> None:
        content = draft.json()
        if replaced:
            content["quantization_config"] = method
        else:
            content["quantization_config"]["quant_method"] = method
        draft.put_json(content)

    what = f"{'quantization_config' if replaced else 'quant_method'} = {method!r}"
    return Mutation("quantization_config, not ours", what, change, "refused", "either", foreign=True)


@st.composite
def model_entry(draw) -> Mutation:
    """An entry that is Transformers' own. By it `inspect` knows which tensors there must be."""
    known = [key for key in undamaged(False).json() if key not in ("quantization_config", "num_hidden_layers")]
    key = draw(
        st.sampled_from([*known, "num_hidden_layers", "torch_dtype", "sliding_window", "layer_types", "text_config"])
    )
    # Transformers builds every layer that it is told of before it asks anybody: kept to a number that it survives.
    value = draw(st.integers(-2, 40) if key == "num_hidden_layers" else JUNK | st.integers(1, 2**40))
    return Mutation(
        "config.json, model's entry", f"{key} = {value!r}", _set_entry(key, value), "either", "either", foreign=True
    )


@st.composite
def foreign_code(draw) -> Mutation:
    """Code beside the weights, asked for by the configuration: never run, as nobody said that it may be."""
    classes = draw(
        st.sampled_from(["canary.Config", "canary--x.Config", "../canary.Config", "somebody/repo--canary.Config"])
    )
    model_type = draw(st.sampled_from(["qwen2", "canary"]))

    def change(draft: Draft) -> None:
        content = draft.json() | {"model_type": model_type}
        content["auto_map"] = {"AutoConfig": classes, "AutoModelForCausalLM": classes}
        draft.put_json(content)
        draft.files["canary.py"] = b"import os, pathlib; pathlib.Path(os.environ['CANARY']).touch()"

    return Mutation("config.json, foreign code", f"{model_type}, {classes}", change, "same", "either", foreign=True)


@st.composite
def other_json(draw) -> Mutation:
    """generation_config.json is Transformers' own; pairquant.json is read by `inspect` alone."""
    name = draw(st.sampled_from(["generation_config.json", REPORT]))
    original = undamaged(False).files[name]
    what, content = draw(
        st.one_of(
            st.builds(lambda v: (repr(v), json.dumps(v).encode()), JUNK),
            st.builds(lambda v: (f"linears = {v!r}", json.dumps({"linears": v, "seconds": v}).encode()), JUNK),
            st.builds(lambda v: (f"one = {v!r}", json.dumps({"linears": {PACKED_PATHS[0]: v}}).encode()), JUNK),
            st.builds(
                lambda v: (f"error = {v!r}", json.dumps({"linears": {PACKED_PATHS[0]: {"error": v}}}).encode()), JUNK
            ),
            st.builds(lambda v: (f"training = {v!r}", json.dumps({"end_to_end_kl": v}).encode()), JUNK),
            st.builds(lambda v: (v, v.encode()), RAW),
            st.composite(noise)(original),
        )
    )
    report = name == REPORT
    return Mutation(
        name,
        what,
        _put(name, content),
        "either" if report else "same",
        "same" if report else "either",
        foreign=not report,
    )


# ---------------------------------------------------------------------------------------------------------------------
# safetensors files


@st.composite
def header_length(draw) -> Mutation:
    right = len(split(undamaged(False).files[WEIGHTS])[0])
    length = draw(
        st.sampled_from([0, 1, 2, right - 8, right - 1, right + 1, right + 8, 2**31, 2**60, 2**63, 2**64 - 1])
        | st.integers(0, 2**64 - 1)
    )

    def change(draft: Draft) -> None:
        draft.files[WEIGHTS] = struct.pack("<Q", length) + draft.files[WEIGHTS][8:]

    outcome = "same" if length == right else "refused"
    return Mutation("safetensors, header length", str(length), change, outcome, outcome)


@st.composite
def header_bytes(draw) -> Mutation:
    """A name may change in this way: then a tensor is missing, or one too many."""
    what, header = noise(draw, split(undamaged(False).files[WEIGHTS])[0])
    return Mutation("safetensors, header bytes", what, lambda d: d.put_header(header), "either", "either")


@st.composite
def header_whole(draw) -> Mutation:
    text = draw(st.one_of(JUNK.map(json.dumps), RAW))
    return Mutation(
        "safetensors, header replaced",
        text,
        lambda d: d.put_header(text.encode("utf-8", "surrogatepass")),
        "refused",
        "refused",
    )


NUMBERS = st.sampled_from([-1, 0, 1, 3, 2**31, 2**60, 2**63, 2**64, 10**30, 1.5, "8", None, True])


@st.composite
def header_entry(draw) -> Mutation:
    """One tensor's entry: every way of lying about dtype, shape and place. safetensors wants them to fill the file."""
    name = draw(st.sampled_from(sorted(UNDAMAGED)))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", "entry"]))
    entry = undamaged(False).header()[name]
    value = draw(
        {
            "dtype": st.sampled_from(
                ["F32", "F16", "BF16", "I32", "I16", "F8_E4M3", "U64", "C64", "BOOL", "f16", "", 7, None]
            ),
            "shape": st.lists(NUMBERS, max_size=4)
            | st.just(entry["shape"][::-1])
            | st.just([1, *entry["shape"]])
            | JUNK,
            "data_offsets": st.lists(NUMBERS, max_size=3)
            | st.builds(
                lambda a, b: [entry["data_offsets"][0] + a, entry["data_offsets"][1] + b], *2 * (st.integers(-64, 64),)
            )
            | st.just([0, 2**62]),
            "extra": JUNK,
            "entry": JUNK,
        }[key]
    )

    def change(draft: Draft) -> None:
        header = draft.header()
        if key == "entry":
            header[name] = value
        else:
            header[name][key] = value
        draft.put_header(json.dumps(header).encode())

    # safetensors may refuse fields that it does not know
    outcome = "same" if key not in ("extra", "entry") and value == entry[key] else "either"
    return Mutation("safetensors, header entry", f"{name}.{key} = {value!r}", change, outcome, outcome)


@st.composite
def header_duplicate(draw) -> Mutation:
    """A tensor named twice, with the same place or another's."""
    name, other = (draw(st.sampled_from(sorted(UNDAMAGED))) for _ in range(2))

    def change(draft: Draft) -> None:
        header = draft.header()
        draft.put_header(("{" + f'"{name}": {json.dumps(header[other])}, ' + json.dumps(header)[1:]).encode())

    return Mutation("safetensors, name twice", f"{name} as {other}", change, "either", "either")


@st.composite
def header_metadata(draw) -> Mutation:
    value = draw(JUNK | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    return Mutation(
        "safetensors, metadata",
        repr(value),
        lambda d: d.put_header(json.dumps(d.header() | {"__metadata__": value}).encode()),
        "either",
        "either",
        foreign=True,
    )


@st.composite
def file_length(draw) -> Mutation:
    size = len(undamaged(False).files[WEIGHTS])
    keep = draw(st.sampled_from([0, 7, 8, 9, size - 1]) | st.integers(0, size - 1))
    more = draw(st.sampled_from([0, 0, 1, 4096]))
    return Mutation(
        "safetensors, length of file",
        f"{size + more if more else keep} of {size} bytes",
        lambda d: d.files.update({WEIGHTS: d.files[WEIGHTS] + b"\0" * more if more else d.files[WEIGHTS][:keep]}),
        "refused",
        "refused",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files of the directory


class _Bomb:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return exec, ("import os, pathlib; pathlib.Path(os.environ['CANARY']).touch()",)


PICKLE = pickle.dumps({"model.norm.weight": _Bomb()})
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "training_args.bin", "scheduler.pkl")


@st.composite
def pickles_beside(draw) -> Mutation:
    """Pickles beside the weights are nobody's business; in place of the weights they are refused."""
    names, alone = draw(st.sets(st.sampled_from(PICKLES), min_size=1)), draw(st.booleans())

    def change(draft: Draft) -> None:
        draft.files |= dict.fromkeys(names, PICKLE)
        if alone:
            del draft.files[WEIGHTS]
            draft.files["pytorch_model.bin"] = PICKLE

    outcome = "refused" if alone else "same"
    what = f"{sorted(names)}{' instead of the weights' if alone else ''}"
    return Mutation("files, pickles", what, change, outcome, outcome)


@st.composite
def weights_file(draw) -> Mutation:
    """The weights' file is no file, or a link. Hub caches are made of links: those are followed."""
    how = draw(
        st.sampled_from(
            ["absent", "link", "dangling link", "link to itself", "link to a directory", "link to a device"]
        )
    )

    def change(draft: Draft) -> None:
        content = draft.files.pop(WEIGHTS)
        if how == "link":
            draft.files["blob"], draft.files[WEIGHTS] = content, Path("blob")
        elif how != "absent":
            targets = {
                "dangling link": "nowhere",
                "link to itself": WEIGHTS,
                "link to a directory": ".",
                "link to a device": "/dev/zero",
            }
            draft.files[WEIGHTS] = Path(targets[how])

    outcome = "same" if how == "link" else "refused"
    # Where there is no file at all, Transformers says so itself.
    return Mutation("files, weights", how, change, outcome, outcome, foreign=how not in ("link",))


OUTSIDE = ("../outside.safetensors", "/etc/hostname", "../../x", ".", "..", "x/../../outside.safetensors")


@st.composite
def index_home(draw) -> Mutation:
    """Shards elsewhere: nowhere, in place of a pickle, or outside the directory, where an undamaged file lies."""
    name, every = draw(st.sampled_from(sorted(UNDAMAGED))), draw(st.booleans())
    home = draw(
        st.sampled_from([*OUTSIDE, "model-00003-of-00003.safetensors", "canary.bin", "a\0b.safetensors", ""]) | JUNK
    )

    def change(draft: Draft) -> None:
        content = draft.json(INDEX)
        draft.files["canary.bin"] = PICKLE
        names = content["weight_map"] if every else [name]
        content["weight_map"] |= dict.fromkeys(names, home)
        draft.put_json(content, INDEX)

    what = f"{'every tensor' if every else name} in {home!r}"
    return Mutation(
        "index of shards, elsewhere", what, change, "refused", "refused", foreign=home not in OUTSIDE[:1], sharded=True
    )


@st.composite
def index_damaged(draw) -> Mutation:
    """An index that says too little, or nonsense. Transformers reads it first; it loads all of a shard that is named."""
    name = draw(st.sampled_from(sorted(UNDAMAGED)))
    how = draw(
        st.sampled_from(
            ["entry missing", "entry exchanged", "weight_map", "bytes", "text", "shard missing", "metadata"]
        )
    )
    value = draw(JUNK)
    damage = noise(draw, undamaged(True).files[INDEX])[1] if how == "bytes" else draw(RAW).encode()

    def change(draft: Draft) -> None:
        content = draft.json(INDEX)
        homes = content["weight_map"]
        if how == "entry missing":
            del homes[name]
        elif how == "entry exchanged":
            homes[name] = next(home for home in homes.values() if home != homes[name])
        elif how == "weight_map":
            content["weight_map"] = value
        elif how == "metadata":
            del content["metadata"]
        elif how == "shard missing":
            del draft.files[homes[name]]
        draft.put_json(content, INDEX)
        if how in ("bytes", "text"):
            draft.files[INDEX] = damage

    inspect = {"entry missing": "same", "metadata": "same", "bytes": "either"}.get(how, "refused")
    transformers = {"entry missing": "same", "entry exchanged": "same", "shard missing": "refused"}.get(how, "either")
    foreign = how in ("weight_map", "bytes", "text", "metadata")
    return Mutation("index of shards, damaged", f"{how}, {name}", change, inspect, transformers, foreign, sharded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def _tensor_change(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        tensors = draft.tensors()
        changed = change(tensors.pop(name))
        draft.put_tensors(tensors if changed is None else tensors | {name: changed})

    return apply


def _with(tensor: Tensor, place: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[place % tensor.numel()] = value
    return tensor


def _names(*tensors: str) -> st.SearchStrategy[str]:
    return st.sampled_from([name for name in PACKED if name.rpartition(".")[2] in tensors])


PLACES = st.integers(0, 2**20)


@st.composite
def forbidden_value(draw) -> Mutation:
    """Values that a packed tensor must not hold."""
    kind = draw(st.sampled_from(["pair outside", "pair twice", "not finite", "zero channel scale"]))
    place = draw(PLACES)
    if kind == "pair outside":
        name, value = draw(_names("pairs")), draw(st.sampled_from([-1, GROUP, GROUP + 1, 127, 32767, -32768]))
        change = _tensor_change(name, lambda t: _with(t, place, value))
    elif kind == "pair twice":
        name, other, value = draw(_names("pairs")), draw(st.integers(1, GROUP - 1)), 0

        def copy_neighbour(t: Tensor) -> Tensor:
            there = place % t.numel()
            return _with(t, there, t.view(-1)[there // GROUP * GROUP + (there + other) % GROUP].item())

        change = _tensor_change(name, copy_neighbour)
    elif kind == "not finite":
        name = draw(_names("scales", "theta", "channel_scales", "bias"))
        value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        change = _tensor_change(name, lambda t: _with(t, place, value))
    else:
        name, value = draw(_names("channel_scales")), draw(st.sampled_from([0.0, -0.0]))
        change = _tensor_change(name, lambda t: _with(t, place, value))
    return Mutation("packed, forbidden value", f"{kind}, {name}[{place}] = {value}", change, "refused", "refused")


@st.composite
def allowed_value(draw) -> Mutation:
    """Values that nobody can tell from right ones: they load, and the model says something finite."""
    name, seed = draw(st.sampled_from(PACKED)), draw(st.integers(0, 2**31))
    stored = name.rpartition(".")[2]

    def change(t: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if stored == "pairs":
            return torch.rand(t.numel() // GROUP, GROUP, generator=g).argsort(-1).to(t.dtype).view(t.shape)
        if not t.is_floating_point():
            return torch.randint(-(2**31), 2**31, t.shape, generator=g).to(t.dtype)
        bits = torch.randint(-(2**15), 2**15, t.shape, generator=g).to(torch.int16).view(torch.float16)
        bits = torch.where(bits.isfinite(), bits, 1)
        return torch.where(bits == 0, 1, bits) if stored == "channel_scales" else bits

    return Mutation("packed, allowed value", f"{name}, seed {seed}", _tensor_change(name, change), "loads", "loads")


@st.composite
def wrong_shape(draw) -> Mutation:
    name = draw(st.sampled_from(sorted(UNDAMAGED)))
    how = draw(
        st.sampled_from(
            ["row less", "row more", "column less", "columns doubled", "turned", "dimension", "flat", "none", "scalar"]
        )
    )
    before = UNDAMAGED[name]
    after = {
        "row less": lambda t: t[:-1],
        "row more": lambda t: torch.cat([t, t[:1]]),
        "column less": lambda t: t[..., :-1],
        "columns doubled": lambda t: torch.cat([t, t], -1),
        "turned": lambda t: t.mT if t.dim() > 1 else t[None],
        "dimension": lambda t: t[None],
        "flat": lambda t: t.reshape(-1),
        "none": lambda t: t[:0],
        "scalar": lambda t: t.reshape(-1)[0],
    }[how]
    if after(before).shape == before.shape:  # turning a square changes values, and in embeddings nobody can tell
        outcomes = ("either", "either") if how == "turned" else ("same", "same")
    else:
        outcomes = ("refused" if name in PACKED else "either", "refused")  # only the model knows plain shapes
    return Mutation("tensor, shape", f"{name}, {how}", _tensor_change(name, after), *outcomes)


@st.composite
def wrong_dtype(draw) -> Mutation:
    name = draw(st.sampled_from(sorted(UNDAMAGED)))
    before = UNDAMAGED[name].dtype
    others = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int16,
        torch.int64,
        torch.uint8,
        torch.float64,
    )
    dtype = draw(st.sampled_from([d for d in others if d != before]))
    if name in PACKED:
        inspect = transformers = "refused"
    else:
        inspect, transformers = "loads", "loads" if dtype.is_floating_point else "refused"
    return Mutation(
        "tensor, dtype", f"{name} as {dtype}", _tensor_change(name, lambda t: t.to(dtype)), inspect, transformers
    )


@st.composite
def missing_tensors(draw) -> Mutation:
    names = draw(st.sets(st.sampled_from(sorted(UNDAMAGED)), min_size=1, max_size=3))

    def change(draft: Draft) -> None:
        draft.put_tensors({name: tensor for name, tensor in draft.tensors().items() if name not in names})

    return Mutation("tensor, missing", ", ".join(sorted(names)), change, "refused", "refused")


@st.composite
def extra_tensor(draw) -> Mutation:
    """Names that the model does not have, and packed tensors where there is nothing to be packed."""
    path = draw(
        st.sampled_from(
            [*PACKED_PATHS, "lm_head", "model.norm", "model.embed_tokens", "model.layers.7.mlp.up_proj", "x", ""]
        )
    )
    stored = draw(st.sampled_from([*TENSOR_NAMES, "weight", "extra", "rotary_emb.inv_freq"]))
    name = f"{path}.{stored}"
    tensor = UNDAMAGED.get(f"{PACKED_PATHS[0]}.{stored}", torch.zeros(3))
    if name in UNDAMAGED:
        name, stored = name + "_", "extra"
    odd = stored in TENSOR_NAMES and not (stored == "bias" and path not in PACKED_PATHS)
    refused = odd or (stored == "weight" and path in PACKED_PATHS)
    inspect = "either" if stored == "bias" and path in PACKED_PATHS else "refused" if refused else "same"
    return Mutation(
        "tensor, too many", name, lambda d: d.put_tensors(d.tensors() | {name: tensor}), inspect, "refused" if refused else "same"
    )  # fmt: skip


@st.composite
def renamed_tensor(draw) -> Mutation:
    name, other = (draw(st.sampled_from(sorted(UNDAMAGED))) for _ in range(2))
    new = draw(
        st.sampled_from(
            ["", "x", "../x", "a\0b", name + "2", name.upper(), name.replace(".layers.0", ".layers.1"), other]
        )
    )

    def change(draft: Draft) -> None:
        tensors = draft.tensors()
        first, second = tensors.pop(name), tensors.pop(new, None)
        tensors[new] = first
        if second is not None:
            tensors[name] = second  # exchanged
        draft.put_tensors(tensors)

    exchanged = new in UNDAMAGED
    transformers = "same" if new == name else "either" if exchanged else "refused"
    return Mutation("tensor, renamed", f"{name} → {new!r}", change, "same" if new == name else "either", transformers)


@st.composite
def plain_or_packed(draw) -> Mutation:
    """A plain weight where a packed one was, and the other way round: the tensors decide, whatever the config says."""
    if draw(st.booleans()):
        path = draw(st.sampled_from(PACKED_PATHS))
        dense = decode(_packed_linear(path))

        def unpack(draft: Draft) -> None:
            tensors = {n: t for n, t in draft.tensors().items() if n == f"{path}.bias" or n.rpartition(".")[0] != path}
            draft.put_tensors(tensors | {f"{path}.weight": dense})

        # `inspect` sees a bias of a linear that is not packed: as plain as any other.
        return Mutation("plain for packed", path, unpack, "loads", "same")
    path = draw(st.sampled_from(["lm_head", "model.norm", "model.embed_tokens"]))
    fits = draw(st.booleans())
    packed = random_packed(64, 64 if fits else 96, GROUP, ROTATIONS)

    def pack(draft: Draft) -> None:
        tensors = draft.tensors()
        del tensors[f"{path}.weight"]
        draft.put_tensors(tensors | {f"{path}.{name}": tensor for name, tensor in packed.tensors.items()})

    transformers = "loads" if fits and path != "model.norm" else "refused"
    return Mutation("packed for plain", f"{path}, {'right' if fits else 'wrong'} size", pack, "loads", transformers)


@st.composite
def plain_value(draw) -> Mutation:
    """NaN and infinity in embeddings, norms and output."""
    name, place = draw(st.sampled_from(PLAIN)), draw(PLACES)
    value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    change = _tensor_change(name, lambda t: _with(t, place, value))
    return Mutation("plain, not finite", f"{name}[{place}] = {value}", change, "refused", "refused")


def _packed_linear(path: str) -> PackedLinear:
    tensors = {name: UNDAMAGED[f"{path}.{name}"] for name in TENSOR_NAMES if f"{path}.{name}" in UNDAMAGED}
    spec = Spec(4, GROUP, ROTATIONS)
    layout = spec.layout(tensors["qweight"].shape[0], tensors["scales"].shape[1], "bias" in tensors)
    return PackedLinear.from_tensors(path, layout, tensors)


def _put(name: str, content: bytes) -> Callable[[Draft], None]:
    return lambda draft: draft.files.update({name: content})


def _set_entry(key: str, value: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.put_json(draft.json() | {key: value})


KINDS = (
    config_bytes, config_whole, config_duplicate, quantization_entry, quantization_raw, quantization_missing,
    quantization_foreign, quantization_whole, model_entry, foreign_code, other_json,
    header_length, header_bytes, header_whole, header_entry, header_duplicate, header_metadata, file_length,
    pickles_beside, weights_file, index_home, index_damaged,
    forbidden_value, allowed_value, wrong_shape, wrong_dtype, missing_tensors, extra_tensor, renamed_tensor,
    plain_or_packed, plain_value,
)  # fmt: skip
MUTATIONS: st.SearchStrategy[Mutation] = st.sampled_from(KINDS).flatmap(lambda kind: kind())

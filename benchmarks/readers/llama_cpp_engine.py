#!/usr/bin/env python3
"""llama.cpp through llama-cpp-python: its logits of a GGUF file, its speed, and what its own quantizer makes of one.

    python llama_cpp_engine.py logits FILE --tokens tokens.json --out logits.safetensors
    python llama_cpp_engine.py speed FILE [--prompt 64] [--new 64] [--threads 2]
    python llama_cpp_engine.py quantize FILE --to Q4_1 --out FILE [--importance importance.npz]

tokens.json holds a list of lists of token ids; "logits" of the output is float32, [rows, tokens, vocabulary]. importance.npz
holds the mean square of each input channel by the name of a tensor, as llama-imatrix gathers them.

Environment (a compiler and cmake; ten minutes on two cores):

    pip install llama-cpp-python==0.3.36 safetensors
"""

import argparse
import ctypes
import json
import resource
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama
from safetensors.numpy import save_file

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_M": 15}


def logits(options):
    rows = json.loads(Path(options.tokens).read_text())
    model = Llama(
        options.file, n_ctx=max(map(len, rows)) + 1, logits_all=True, verbose=False, n_threads=options.threads
    )
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(np.array(model.scores[: len(row)], dtype=np.float32))
    save_file({"logits": np.stack(found)}, options.out)


def speed(options):
    model = Llama(options.file, n_ctx=options.prompt + options.new + 8, verbose=False, n_threads=options.threads)
    tokens = [(7 * i) % 1000 + 10 for i in range(options.prompt)]
    best = {"prompt": float("inf"), "new": float("inf")}
    for _ in range(options.repeats):
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        read = time.perf_counter()
        for i in range(options.new):
            model.eval([tokens[i % len(tokens)]])
        end = time.perf_counter()
        best = {"prompt": min(best["prompt"], read - start), "new": min(best["new"], end - read)}
    print(
        json.dumps(
            {
                "prompt_tokens_per_s": round(options.prompt / best["prompt"], 1),
                "new_tokens_per_s": round(options.new / best["new"], 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "threads": options.threads,
                "llama_cpp_python": llama_cpp.__version__,
            }
        )
    )


def quantize(options):
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = TYPES[options.to], options.threads
    if options.importance:
        named = np.load(options.importance)
        held = {name: np.ascontiguousarray(named[name], dtype=np.float32) for name in named.files}
        entries = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()
        for entry, (name, values) in zip(entries, held.items(), strict=False):  # the last stays empty and ends the list
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        how.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(options.file.encode(), options.out.encode(), ctypes.byref(how))
    if failed:
        raise SystemExit(f"llama.cpp's quantizer returned {failed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("logits", "speed", "quantize"))
    parser.add_argument("file")
    parser.add_argument("--tokens")
    parser.add_argument("--out")
    parser.add_argument("--to", choices=TYPES)
    parser.add_argument("--importance")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    {"logits": logits, "speed": speed, "quantize": quantize}[options.what](options)


if __name__ == "__main__":
    main()

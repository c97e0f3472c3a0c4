#!/usr/bin/env python3
"""vLLM's log-probabilities of a model directory: python vllm_engine.py DIRECTORY --tokens tokens.json --out logits.safetensors

tokens.json holds a list of lists of token ids; "logits" of the output has one row less for each, as vLLM says nothing of what
follows the last token.
"""

import argparse
import json
import os
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer need not be installed
}


def table(answer):
    """float32 [T - 1, V]."""
    places = [{token: entry.logprob for token, entry in place.items()} for place in answer.prompt_logprobs[1:]]
    return [[place[token] for token in range(len(place))] for place in places]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    rows = json.loads(Path(options.tokens).read_text())
    llm = LLM(
        options.directory, dtype=options.dtype, enforce_eager=True, max_model_len=512, max_num_seqs=2, max_logprobs=-1
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    answers = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    save_file({"logits": torch.tensor([table(answer) for answer in answers])}, options.out)


if __name__ == "__main__":
    main()

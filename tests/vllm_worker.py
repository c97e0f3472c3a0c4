"""Runs checkpoints through vLLM in a process of its own, in which other tests' settings and its own do not meet.

python vllm_worker.py JOBS.json: a list of {"model", "output", "options", "adapter", "fused"}; adapter: a LoRA adapter's
directory or absent; fused: whether layers compute what comes before them, on CPUs too, or absent, as users run them. For each,
`output` gets either {"logprobs": float32 [T - 1, V]}, the log-probabilities of the next token at every place of PROMPT, and
"said", what our plugin logged; or {"error": text}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

PROMPT = [5, 80, 41, 200, 7, 19, 101, 150, 33, 64, 90, 12, 240, 8, 77, 120]
#: Engine in this process, on whichever cores there are, with a small cache.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def logprobs(model: str, options: dict, adapter: str | None):
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enforce_eager": True, "enable_lora": adapter is not None, **options}
    llm = LLM(model, max_model_len=64, max_num_seqs=4, max_logprobs=-1, **options)
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False, lora_request=request)
    rows = [{token: entry.logprob for token, entry in place.items()} for place in answer.prompt_logprobs[1:]]
    llm.llm_engine.engine_core.shutdown()
    return torch.tensor([[row[token] for token in range(len(row))] for row in rows])


def set_fusing(fused: bool | None) -> None:
    """See above; backends of CPUs have no kernels for it, so they do not ask for it, but compute the same."""
    from pairquant.backends.table import BACKENDS

    os.environ.pop("PAIRQUANT_FUSE", None)
    if fused is not None:
        os.environ["PAIRQUANT_FUSE"] = str(int(fused))
    for backend in BACKENDS:
        if fused:
            backend.fuses = lambda *_: True
        else:
            backend.__dict__.pop("fuses", None)


def listen() -> list[str]:
    """Return the list of what will be logged about layers that compute what comes before them, and about experts."""
    from pairquant.integrations.vllm import experts, fusion

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    heard = logging.Logger("heard", logging.INFO)  # what vLLM does to loggers below its own does not matter to it
    heard.addHandler(handler)
    fusion.LOGGER = experts.LOGGER = heard
    return said


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            set_fusing(job.get("fused"))
            said = listen()
            result = {"logprobs": logprobs(job["model"], job["options"], job.get("adapter")), "said": said}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        torch.save(result, job["output"])


if __name__ == "__main__":
    main()

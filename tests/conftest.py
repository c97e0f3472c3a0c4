"""Shared fixtures. No test reaches the network: Hugging Face libraries are told so before anything imports them."""

import os

import pytest
import torch
from hypothesis import settings

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

# Without a GPU, the Triton kernels run in Triton's interpreter; it must be told before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run and every machine; no example database beside the sources; no wall time.
settings.register_profile("pairquant", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("pairquant")


@pytest.fixture
def generator() -> torch.Generator:
    """Freshly seeded: what a test draws does not depend on the tests before it."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per word: "a7" → 7, "b7" → 1007, "c7" → 2007; so a token tells the source and place it came from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"{letter}{n}": 1000 * place + n for place, letter in enumerate("abc") for n in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"[UNK]": 3000}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")

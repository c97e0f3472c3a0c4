"""torch.compile and static caches, without graph breaks."""

import pytest
import torch
from agreement import ROUNDING, Agreement, distance
from transformers import AutoModelForCausalLM
from transformers.generation import CompileConfig

import pairquant  # noqa: F401

DTYPES = [torch.float32, torch.bfloat16]


def load(checkpoint, dtype):
    torch._dynamo.reset()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warm", [True, False], ids=["after a forward", "before any forward"])
@torch.no_grad()
def test_the_whole_forward_is_one_graph(tiny_checkpoint, tokens, dtype, warm):
    expected = load(tiny_checkpoint, dtype)(tokens).logits
    model = load(tiny_checkpoint, dtype)
    if warm:
        model(tokens)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert distance(compiled(tokens).logits, expected) <= ROUNDING[dtype]


@torch.no_grad()
def test_compiled_before_any_forward_equals_compiled_after(tiny_checkpoint, tokens, tmp_path, monkeypatch):
    """The default compiler; the second call no longer makes what is kept.

    With a cache of its own: PyTorch's does not tell AVX-512 from a run that is told to do without it.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = load(tiny_checkpoint, torch.bfloat16)
    layer = model.model.layers[0].mlp
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = load(tiny_checkpoint, torch.bfloat16).model.layers[0].mlp(x)
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        assert (compiled(x) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_flow_through_a_compiled_model(tiny_checkpoint, tokens, dtype):
    def gradient(forward, model):
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        forward(inputs_embeds=embeddings, labels=tokens).loss.backward()
        return embeddings.grad.float()

    model = load(tiny_checkpoint, dtype)
    expected = gradient(model.forward, model)
    compiled = gradient(torch.compile(model.forward, backend="aot_eager", fullgraph=True), model)
    assert (compiled - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_compiles_with_a_static_cache(tiny_checkpoint, tokens, dtype):
    plain = load(tiny_checkpoint, dtype).generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True  # Transformers' own switch for compiling on CPUs
    model = load(tiny_checkpoint, dtype)
    torch._dynamo.utils.counters.clear()
    generated = model.generate(
        tokens[:1, :8], max_new_tokens=8, do_sample=False, cache_implementation="static", compile_config=compile_config
    )
    if dtype == torch.float32:
        assert torch.equal(generated, plain)
    else:  # a random model has near ties, which another order of sums decides otherwise
        prompt, answer = generated[0].split([8, 8])
        Agreement(tiny_checkpoint).check_greedy([prompt.tolist()], [answer.tolist()], same=0.5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]

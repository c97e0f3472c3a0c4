"""The backends, which run quantized layers. They form a list in order of preference; the last one accepts every layer.

`base` defines what a backend is, `table` holds the list and chooses from it, and `ops` has the operator that torch.compile
sees. Each other file is one backend. The choice is made in `table` alone: layers, vLLM, `inspect --backends` and `tune`
ask it.
"""

"""Who runs a quantized layer on a device: a list in order of preference, the last of which takes everything.

`base` says what a backend is, `table` has the list and the choice, `ops` the operators that torch.compile sees. Each
other file is one backend. Layers, vLLM, `inspect --backends` and `tune` ask the list; nothing else decides.
"""

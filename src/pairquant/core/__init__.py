"""The algorithm in plain PyTorch, on any device, without I/O: the reference for every kernel.

Read in the order of a weight's life: `pairs`, `rotation`, `quantizer`, `rounding`, `packing`, and `linear`, which
tells the whole story on one page.
"""

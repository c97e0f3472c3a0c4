"""The kernels: `run` has those of quantized layers, `fit` those of fitting and rounding; `availability` finds Triton.

Importing this package compiles nothing and touches no GPU. `backends` decides which kernel of `run` a layer uses, and the
launchers in `fit` decide between their kernels and PyTorch.
"""

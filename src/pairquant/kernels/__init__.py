"""Kernels, and what they need around them: `run` has those of quantized layers, `fit` those of fitting and rounding.

Importing compiles nothing and touches no GPU. Who uses which kernel is decided in `backends` and in `fit`.
"""

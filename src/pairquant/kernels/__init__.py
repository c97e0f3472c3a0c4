"""Kernels: the operators `pairquant::…` (`ops`), and what they run on each device.

`weights` repacks checkpoints for them, `table` chooses tiles, `launch` starts the Triton kernels of `triton_rotate`,
`triton_linear` and `triton_decode`, `cpu` has the rest. Importing compiles nothing and touches no GPU.
"""

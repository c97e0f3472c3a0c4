"""The algorithm in plain PyTorch, for any device, without I/O. Every kernel is tested against it.

Read the files in the order in which a weight passes through them: `pairs`, `rotation`, `grid`, `rounding` (with `range`),
`packing`. Then read `linear`, which puts all steps together on one page.
"""

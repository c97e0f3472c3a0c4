"""The kernels that run quantized layers, and the layout of their weights in memory."""

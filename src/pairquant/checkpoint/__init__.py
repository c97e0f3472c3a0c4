"""Models on disk: sources to quantize, packed checkpoints, and how both are read and written."""

"""The structure of models: their decoder blocks, the weights in them, and what the linears read."""

"""How models are built: their decoder blocks, and what the linears in them read."""

"""How transforms are found: calibration text, a block's inputs, the quadratic proxy, and the walk over the blocks."""

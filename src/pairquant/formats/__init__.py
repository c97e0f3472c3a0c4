"""The formats of other programs that know no rotations: how each stores a weight, and what it writes into config.json."""

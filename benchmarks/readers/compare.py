#!/usr/bin/env python3
"""Distances of logits from every tensor of a reference file: python compare.py LOGITS REFERENCE"""

import sys

from safetensors.torch import load_file

got = load_file(sys.argv[1])["logits"].double()
for name, wanted in sorted(load_file(sys.argv[2]).items()):
    wanted = wanted.double()
    print(
        f"{name}: relative error {(got - wanted).norm() / wanted.norm():.2e}, largest {(got - wanted).abs().max():.2e}, "
        f"same first choice {(got.argmax(-1) == wanted.argmax(-1)).double().mean():.3f}"
    )

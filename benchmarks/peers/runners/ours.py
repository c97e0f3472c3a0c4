"""This project's presets, given the same tokens as the peers. `paper` chooses its best epoch on the held-out windows.

Where activations are rounded, the folder of the plain model says how (see rounding.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain import Job, Outcome, Stopwatch, linears_of, run

#: To see that a preset works.
QUICK = {
    "quick": ["steps=2"],
    "fast": ["steps=2"],
    "best": ["steps=2", "refit.epochs=1"],
    "paper": ["training.epochs=1", "training.weight_epochs=1"],
}


def config_of(job: Job) -> Any:
    from pairquant.spec.options import QuantConfig
    from pairquant.spec.recipe import recipe_with

    preset = job.options["preset"]
    changes = [*job.options.get("changes", ()), *(QUICK.get(preset, ()) if job.quick else ())]
    recipe = recipe_with(preset, changes)
    rotations = job.options.get("rotations", QuantConfig.rotations)
    return QuantConfig(
        preset=preset, recipe=recipe, bits=job.bits, group_size=job.group_size, rotations=rotations,
        activations=job.options.get("activations"),
    )  # fmt: skip


def quantize(job: Job) -> Outcome:
    import rounding

    from pairquant.models.planning import plan_model
    from pairquant.models.rounded_inputs import roundings_of
    from pairquant.optimize.walk import Walk
    from pairquant.spec.activations import UNROUNDED
    from pairquant.spec.linear import bits_per_weight

    config, device = config_of(job), torch.device(job.device)
    model = job.load(torch.float32).to(device)
    tokens = job.windows if config.recipe.needs_text else None
    training = config.recipe.training
    held_out = job.held_out[: training.validation_samples] if training else None
    with Stopwatch(job.device) as watch:
        plan, blocks = plan_model(model, config)
        walk = Walk(model, blocks, plan, config, device, tokens, held_out)
        packed = {path: p for result in walk.run() for path, p in result.packed.items()}
    if config.activations is not None:
        sites = {path: site for block in blocks for path, site in block.sites.items()}
        rounding.write(Path(job.output), roundings_of(sites, packed, device))
    weights = {path: linear.weight.detach() for path, linear in linears_of(model).items()}
    return Outcome(
        weights,
        watch.seconds,
        bits_per_weight(p.layout for p in packed.values()),
        job.group_size,
        others={name: value for name, value in model.state_dict().items() if value.ndim == 1},
        activations=config.activations or UNROUNDED,
    )


if __name__ == "__main__":
    run(quantize, ["pairquant"])

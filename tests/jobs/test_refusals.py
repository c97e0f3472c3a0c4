"""What is refused before any work."""

from dataclasses import replace

from tiny_models import save_tiny

from pairquant.jobs.opened import Opened
from pairquant.jobs.refusals import needed_bytes
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import EndToEnd


def test_a_last_training_needs_one_more_copy_of_what_is_packed_on_the_disk(tmp_path):
    config = QuantConfig(group_size=32)
    opened = Opened.of(save_tiny(tmp_path / "source"), config)
    packed = sum(layout.stored_bits() for layout in opened.plan.layouts.values()) // 8
    training = replace(config, recipe=replace(config.recipe, end_to_end=EndToEnd()))
    assert needed_bytes(replace(opened, config=training)) - needed_bytes(opened) == packed
    assert needed_bytes(opened) > 2 * packed

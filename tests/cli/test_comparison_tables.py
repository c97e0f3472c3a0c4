"""Tables of several models side by side: names that differ, the gap to the closest, columns only of what was measured."""

from pairquant.cli.app import console
from pairquant.cli.comparison_tables import show
from pairquant.evaluation.results import Comparison


def row(name, kl=None, **more):
    """What `pairquant compare --json` holds of one model."""
    text = {"tokens": 630, "perplexity": 20.0, "kl": kl, "top1": None if kl is None else 0.9}
    return {
        "name": name, "size_bytes": 10**9, "quantized_in_s": None, "speed": None,
        "evaluation": {"model": name, "bits_per_weight": 4.6, "texts": {"wiki.txt": text}}, **more,
    }  # fmt: skip


def shown(*rows, ahead_of=None):
    """The lines that are printed, their words by the first of them in the last table where that stands."""
    ranking = {"model": rows[1]["name"], "ahead_of": ahead_of or {}}
    with console.capture() as captured:
        show(Comparison.from_dict({"rows": list(rows), "closest": {"wiki.txt": ranking}}))
    return {words[0]: words for line in captured.get().splitlines() if (words := line.split())}


def test_models_of_one_last_name_are_told_apart():
    assert {"big", "a/model", "b/model"} <= shown(row("big"), row("a/model", 0.1), row("b/model", 0.2)).keys()


def test_the_gap_to_the_closest_has_half_its_interval():
    gap = {"b": {"kl": 0.1234, "interval": (0.1, 0.15)}, "c": {"kl": 0.5, "interval": None}}
    told = shown(row("o"), *(row(name, 0.1) for name in "abc"), ahead_of=gap)
    assert told["a"][-1] == "closest"
    assert told["b"][-3:] == ["+0.1234", "±", "0.0250"]
    assert told["c"][-1] == "+0.5000"
    assert told["o"][:2] == ["o", "20.000"]
    assert not any(word.startswith("+") for word in told["o"])


def test_activations_have_a_column_where_some_model_rounds_them():
    def told(*formats):
        rows = [row(name, None if name == "o" else 0.1) for name in "oab"]
        for each, activations in zip(rows, formats, strict=True):
            each["evaluation"]["activations"] = activations
        with console.capture() as captured:
            show(Comparison.from_dict({"rows": rows}))
        return captured.get()

    assert "activa-" in told("not rounded", "int8", "not rounded")
    assert "int8" in told("not rounded", "int8", "not rounded")
    assert "activa-" not in told("not rounded", "not rounded", None)


def test_speeds_have_columns_only_when_they_were_measured():
    def speed(name, prefill, decode):
        batch = {"batch": 1, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "first_token_s": 0.1}
        return {"name": name, "dtype": "bfloat16", "rows": [batch]}

    def told(*rows):
        with console.capture() as captured:
            show(Comparison.from_dict({"rows": list(rows)}))
        return captured.get()

    fast = told(
        row("o", speed=speed("o", 1234.5, 20.0)), row("a", 0.1, speed=speed("a", 999.0, 41.0), quantized_in_s=61.0)
    )
    assert "prefill" in fast
    assert "1,234.5/s" in fast
    assert "41.0/s" in fast
    assert "prefill" not in told(row("o"), row("a", 0.1))

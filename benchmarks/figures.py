"""Draw docs/images/*.svg from benchmarks/results.   python benchmarks/figures.py  (needs the extra `report` and Chromium)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kaleido
from bench_peers import rows_of
from peers.table import PEERS, Peer
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from pairquant.report.style import LOGARITHMIC, template

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
#: Our recipes; others' recipes in our code; others.
OURS, OUR_CODE, OTHERS = "#d1495b", "#eec1c7", "#b4bbc7"
#: Of others' tools, where several are in one figure.
SYMBOLS = ("circle-open", "square-open", "diamond-open", "triangle-up-open", "cross-open", "x-open", "star-open")
METHODS = {"fp16": "#8d99ae", "AWQ-Marlin": "#e0a030", "original": "#b8b8b8", "pairquant": OURS}
#: From few channels to many.
SHADES = ("#f2c1c7", "#e68f9b", "#d1495b", "#a13546", "#6e2430")
TRANSFORMS = ("#e0a030", "#8d99ae", "#d1495b", "#e68f9b", "#9bb8a0", "#3f7d5a", "#b8b8b8")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    kernels = json.loads((RESULTS / "kernels-h200.json").read_text())
    write("peers", peers(), 960, 400)
    write("kernels", blocks(kernels["blocks"]), 960, 360)
    write("rotation", rotations(kernels["rotate"]), 860, 340)
    write("sizes", sizes(), 860, 400)
    write("transforms", transforms(json.loads((RESULTS / "transforms-cpu.json").read_text())), 860, 360)


def write(name: str, figure: go.Figure, width: int, height: int) -> None:
    margin = {"l": 8, "r": 16, "t": 40, "b": 8}
    figure.update_layout(template=template("light"), paper_bgcolor="white", margin=margin)
    options = {"format": "svg", "width": width, "height": height}
    kaleido.write_fig_sync(figure, IMAGES / f"{name}.svg", options, kopts={"mathjax": False})


def panels(titles: list[str], **options: Any) -> go.Figure:
    """Side by side."""
    return make_subplots(1, len(titles), subplot_titles=titles, **options)


def peers() -> go.Figure:
    """KL of every quantizer that was run, the closest above, and the time it took."""
    rows = rows_of(RESULTS / "peers-h100.jsonl", "SmolLM2-135M-Instruct")
    figure = panels(["4 bits", "3 bits"], horizontal_spacing=0.28)
    for column, bits in enumerate((4, 3), 1):
        found = [(row, peer) for peer in PEERS if "reason" not in (row := rows.get((peer.name, bits), {"reason": ""}))]
        found.sort(key=lambda pair: pair[0]["wikitext2-test"]["kl"])
        values = [row["wikitext2-test"]["kl"] for row, _ in found]
        figure.add_bar(
            x=values,
            y=[name_of(peer) for _, peer in found],
            orientation="h",
            text=[f"{kl:.3f}, {row['seconds']:.0f} s" for kl, (row, _) in zip(values, found, strict=True)],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [color_of(peer) for _, peer in found]},
            row=1,
            col=column,
        )
        figure.update_xaxes(title="KL, nats per token", range=[0, 1.3 * max(values)], col=column)
        figure.update_yaxes(autorange="reversed", ticksuffix=" ", col=column)
    return figure.update_layout(showlegend=False, bargap=0.3)


def sizes() -> go.Figure:
    """KL against bits per weight, everything stored counted: one width for all, plans, the last training, and others' tools."""
    plans = [row for row in lines("mixed-h200.jsonl") if row["preset"] == "fast"]
    trained = [row for row in lines("end-to-end-h100.jsonl") if row["end_to_end"] == "more=192,epochs=3"]
    found = {
        "one width for all, fast": [
            *(row for row in plans if row["plan"].startswith("uniform")),
            *(
                row
                for row in lines("quality-h200.jsonl")
                if row["recipe"] in ("fast:bits=5", "fast:bits=6", "fast:bits=8")
            ),
        ],
        "by plan, fast": [row for row in plans if row["plan"].startswith("mixed") and "rotations" in row["candidates"]],
        "best, then trained as a whole": [row for row in trained if "smol" in row["model"]],
    }
    figure = go.Figure()
    for color, (name, rows) in zip(("#e68f9b", OURS, "#6e2430"), found.items(), strict=True):
        best = {round(row["bits_per_weight"], 1): row for row in sorted(rows, key=kl, reverse=True)}
        points = sorted(best.values(), key=lambda row: row["bits_per_weight"])
        figure.add_scatter(
            x=[row["bits_per_weight"] for row in points],
            y=[kl(row) for row in points],
            name=name,
            mode="lines+markers" if len(points) > 2 else "markers",
            marker={"size": 8, "color": color},
        )
    rows = rows_of(RESULTS / "peers-h100.jsonl", "SmolLM2-135M-Instruct")
    measured = [
        (name_of(peer), mine)
        for peer in PEERS
        if peer.runner != "ours"
        and (mine := [row for bits in (3, 4) if "wikitext2-test" in (row := rows.get((peer.name, bits), {}))])
    ]
    for (name, mine), symbol in zip(measured, SYMBOLS, strict=False):
        figure.add_scatter(
            x=[row["bits_per_weight"] for row in mine],
            y=[kl(row) for row in mine],
            name=name,
            mode="markers",
            marker={"size": 9, "color": "#6b7280", "symbol": symbol},
        )
    figure.update_xaxes(title="bits per weight, everything stored counted")
    figure.update_yaxes(LOGARITHMIC, title="KL on WikiText-2, nats per token")
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def kl(row: dict[str, Any]) -> float:
    return row["wikitext2-test"]["kl"]


def name_of(peer: Peer) -> str:
    alone = [other.label for other in PEERS].count(peer.label) == 1
    return peer.label.replace("`", "") if alone else f"{peer.label} {peer.method}"


def color_of(peer: Peer) -> str:
    if peer.name in ("quick", "fast", "fast-scales", "best"):
        return OURS
    return OUR_CODE if peer.runner == "ours" else OTHERS


def blocks(results: dict[str, Any]) -> go.Figure:
    """Time of one block's linears against the number of tokens."""
    figure = panels(list(results), horizontal_spacing=0.07)
    for column, result in enumerate(results.values(), 1):
        for method, color in METHODS.items():
            figure.add_scatter(
                x=[int(tokens) for tokens in result["total"]],
                y=[row[method] for row in result["total"].values()],
                name="original ParoQuant" if method == "original" else method,
                line={"color": color, "width": 3 if method == "pairquant" else 1.6},
                mode="lines",
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", tickvals=[1, 4, 16, 64, 256, 2048], title="tokens")
    figure.update_yaxes(LOGARITHMIC)
    figure.update_yaxes(title="µs, linears of one block", col=1)
    return figure.update_layout(legend=BELOW)


def rotations(rows: list[dict[str, Any]]) -> go.Figure:
    """Speed-up of `rotate` over the fast Hadamard transform and over the original's kernel."""
    rivals = {"hadamard": "the fast Hadamard transform", "original": "the original's kernel"}
    figure = panels([f"speed-up over {title}" for title in rivals.values()], shared_yaxes=True, horizontal_spacing=0.04)
    for column, rival in enumerate(rivals, 1):
        for color, channels in zip(SHADES, sorted({row["channels"] for row in rows}), strict=True):
            mine = [row for row in rows if row["channels"] == channels]
            figure.add_scatter(
                x=[row["tokens"] for row in mine],
                y=[row[rival] / row["rotate"] for row in mine],
                name=f"{channels} channels",
                line={"color": color, "width": 2},
                mode="lines",
                showlegend=column == 1,
                row=1,
                col=column,
            )
        figure.add_hline(1, line={"color": "#888888", "width": 1}, row=1, col=column)
    figure.update_xaxes(type="log", tickvals=[1, 16, 256, 4096], title="tokens")
    figure.update_yaxes(type="log", tickvals=[0.25, 0.5, 1, 2, 4], ticktext=["¼", "½", "1", "2", "4"])
    return figure.update_layout(legend=BELOW)


def transforms(results: dict[str, Any]) -> go.Figure:
    """Loss against step for several transforms of one layer."""
    figure = go.Figure()
    for color, (name, losses) in zip(TRANSFORMS, results["curves"].items(), strict=True):
        constant = len(losses) == 1
        bold = name == "8 rotations and scales"
        figure.add_scatter(
            y=[1000 * loss for loss in (losses * results["steps"] if constant else losses)],
            name=name,
            line={"color": color, "width": 3 if bold else 1.6},
            mode="lines",
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="relative error of the output, ‰", rangemode="tozero")
    right = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    return figure.update_layout(title={"text": results["linear"], "x": 0.01, "font": {"size": 14}}, legend=right)


BELOW = {"orientation": "h", "x": 0, "y": -0.24, "yanchor": "top"}


if __name__ == "__main__":
    main()

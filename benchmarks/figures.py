"""Draw docs/images/*.svg from benchmarks/results/*.json.   python benchmarks/figures.py  (needs matplotlib)"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COLORS = {"round to nearest": "#b8b8b8", "GPTQ": "#8d99ae", "PairQuant": "#d1495b"}


METHODS = {"fp16": "#8d99ae", "AWQ-Marlin": "#e0a030", "original": "#b8b8b8", "pairquant": "#d1495b"}


def main() -> None:
    plt.rcParams |= {"font.size": 11, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
    (ROOT / "docs/images").mkdir(exist_ok=True)
    quality()
    kernels = json.loads((ROOT / "benchmarks/results/kernels-h200.json").read_text())
    blocks(kernels["blocks"])
    rotations(kernels["rotate"])
    transforms(json.loads((ROOT / "benchmarks/results/transforms-cpu.json").read_text()))


def blocks(results: dict) -> None:
    """Time of one block's linears against the number of tokens."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.3), facecolor="white")
    for axis, (model, result) in zip(axes, results.items(), strict=True):
        tokens = [int(t) for t in result["total"]]
        for method, color in METHODS.items():
            label = "original ParoQuant" if method == "original" else method
            width = 2.4 if method == "pairquant" else 1.4
            axis.plot(tokens, [r[method] for r in result["total"].values()], color=color, label=label, linewidth=width)
        axis.set(title=model, xscale="log", yscale="log", xlabel="tokens", xticks=[1, 4, 16, 64, 256, 2048])
        axis.set_xticklabels(["1", "4", "16", "64", "256", "2048"])
        axis.minorticks_off()
    axes[0].set_ylabel("µs, linears of one block")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/kernels.svg", metadata={"Date": None})


def rotations(rows: list[dict]) -> None:
    """Speed-up of `rotate` over the fast Hadamard transform and over the original's kernel."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3), facecolor="white", sharey=True)
    shades = ["#f2c1c7", "#e68f9b", "#d1495b", "#a13546", "#6e2430"]
    for axis, (peer, title) in zip(
        axes, (("hadamard", "fast Hadamard transform"), ("original", "the original's kernel")), strict=True
    ):
        for color, channels in zip(shades, sorted({row["channels"] for row in rows}), strict=True):
            mine = [row for row in rows if row["channels"] == channels]
            speedup = [row[peer] / row["rotate"] for row in mine]
            axis.plot([row["tokens"] for row in mine], speedup, color=color, label=f"{channels} channels")
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.set(title=f"speed-up over {title}", xscale="log", yscale="log", xlabel="tokens")
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
        axis.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/rotation.svg", metadata={"Date": None})


def transforms(results: dict) -> None:
    """Loss against step for several transforms of one layer."""
    figure, axis = plt.subplots(figsize=(7.4, 3.6), facecolor="white")
    shades = ["#e0a030", "#8d99ae", "#d1495b", "#e68f9b", "#9bb8a0", "#3f7d5a", "#b8b8b8"]
    for color, (name, losses) in zip(shades, results["curves"].items(), strict=True):
        losses = losses if len(losses) > 1 else losses * results["steps"]
        bold = name == "8 rotations and scales"
        axis.plot([1e3 * loss for loss in losses], color=color, label=name, linewidth=2.4 if bold else 1.4)
    axis.set(title=results["linear"], xlabel="step", ylabel="relative error of the output, ‰", ylim=(0, None))
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/transforms.svg", metadata={"Date": None})


def quality() -> None:
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.7), facecolor="white")
    for axis, bits in zip(axes, (4, 3), strict=True):
        shown = [row for row in rows if row["bits"] == bits and row["method"] in COLORS]
        values = [row["wikitext2-test"]["kl"] for row in shown]
        bars = axis.barh([r["method"] for r in shown], values, color=[COLORS[r["method"]] for r in shown], height=0.62)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
        axis.set(title=f"{bits} bits", xlim=(0, max(values) * 1.18), xlabel="KL from the original, nats per token")
        axis.invert_yaxis()
        axis.tick_params(left=False)
    figure.suptitle("SmolLM2-135M-Instruct, WikiText-2 test: shorter is closer to the original", fontsize=11)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

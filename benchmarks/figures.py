"""Draw docs/images/quality.svg from benchmarks/results/quality.json.   python benchmarks/figures.py  (needs matplotlib)"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COLORS = {"round to nearest": "#b8b8b8", "GPTQ": "#8d99ae", "PairQuant": "#d1495b"}


def main() -> None:
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    plt.rcParams |= {"font.size": 11, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
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
    (ROOT / "docs/images").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs/images/quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# The main job on an embedded real model, on a CPU, in minutes: `make demo`.
#
# Shortened against the defaults, and against the results in README.md: preset `quick` (25 fitting steps instead of
# 150), 16 windows of 512 tokens of calibration text instead of 128 of 2048, and 4096 tokens of evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

mkdir -p demo
if [ ! -f demo/original/config.json ]; then
  echo "Unpacking SmolLM2-135M-Instruct from its GGUF file (once; quantize reads .gguf files directly, too) …"
  python benchmarks/embedded_model.py demo/original
fi
say pairquant quantize demo/original --output demo/nearest --preset rtn --group-size 64 --overwrite >demo/nearest.log
tail -n 7 demo/nearest.log
say pairquant quantize demo/original --output demo/pairquant --preset quick --group-size 64 --samples 16 --seq-len 512 --overwrite
echo; echo "Rounded to nearest, against the original (GSM8K test problems):"
pairquant eval demo/nearest --reference demo/original --seq-len 1024 --max-tokens 4096 --json demo/nearest.json
echo; echo "PairQuant, against the original:"
say pairquant eval demo/pairquant --reference demo/original --seq-len 1024 --max-tokens 4096 --json demo/pairquant.json
say pairquant inspect demo/pairquant --linear model.layers.12.mlp.down_proj
say pairquant chat demo/pairquant --prompt "What is the capital of France?" --max-new-tokens 40
python - <<'P'
import json

MOST = 0.6  # of the divergence by rounding to nearest
kl = {name: next(iter(json.load(open(f"demo/{name}.json"))["texts"].values()))["kl"] for name in ("nearest", "pairquant")}
print(f"\nDivergence from the original: {kl['pairquant']:.3f} nats per token, rounded to nearest {kl['nearest']:.3f}.")
if kl["pairquant"] >= MOST * kl["nearest"]:
    raise SystemExit(
        f"The demo failed: PairQuant's divergence should be below {MOST} of that by rounding to nearest and is "
        f"{kl['pairquant'] / kl['nearest']:.2f} of it. Please report this with the machine's CPU and the output above."
    )
P
echo "The demo took $((SECONDS / 60)) min $((SECONDS % 60)) s."

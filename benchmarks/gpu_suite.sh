#!/usr/bin/env bash
# What only a GPU can tell, in under 9 minutes: does every product agree with float64, how fast are
# products, searches and the quickstart, how much memory does it take. Tables come last.
#     benchmarks/gpu_suite.sh
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
out=$(mktemp -d)
failed=0
timeout 120 python3 train.py --config configs/quickstart.yaml --output_dir "$out/quickstart" \
    --log.progress false >"$out/quickstart.txt" 2>&1 || failed=1
timeout 200 python3 benchmarks/matmul.py >"$out/matmul.md" 2>&1 || failed=1
timeout 200 python3 benchmarks/search.py --blocks 1048576 >"$out/search.md" 2>&1 || failed=1
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv
for part in quickstart.txt matmul.md search.md; do
    printf '\n== %s\n' "$part"
    tail -n 60 "$out/$part"
done
exit $failed

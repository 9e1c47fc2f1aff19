#!/usr/bin/env bash
# Runs the benchmarks that need a GPU, in two halves of under 9 minutes each: the limits of the parts
# add up to 535 and 500 s.
#
#     benchmarks/gpu_suite.sh             # or PYTHON=... benchmarks/gpu_suite.sh
#     benchmarks/gpu_suite.sh kernels     # compares the kernels in kernels/ with XLA's path
#     SMALL=1 benchmarks/gpu_suite.sh     # the same parts at tiny sizes, on a CPU too
#
# It needs jax[cuda13], flax, optax, orbax-checkpoint, jaxtyping, safetensors, tqdm and transformers,
# jsonargparse (quickstart), and torch with CUDA, peft and bitsandbytes (the peers). If they cannot
# be installed, unpack their wheels into a folder and set PYTHONPATH to it. If a part fails or
# reaches its limit, the suite fails, but the other parts still run.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TQDM_DISABLE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The parts share compiled programs and autotuning results.
export JAX_COMPILATION_CACHE_DIR=$out/cache
small=${SMALL:-}
failed=()
parts=()

part() { # name, limit in seconds, command; with SMALL set, the arguments after "--small" instead
    local name=$1 limit=$2 usual=() tiny=() now=usual word
    shift 2
    for word in "$@"; do
        if [ "$word" = --small ]; then now=tiny; else eval "$now+=(\"\$word\")"; fi
    done
    [ -n "$small" ] && usual=("${usual[0]}" "${tiny[@]}")
    parts+=("$name")
    local start=$SECONDS code=0
    timeout "$limit" "$python" "${usual[@]}" >"$out/$name.txt" 2>"$out/$name.err" || code=$?
    local took="$((SECONDS - start)) of $limit s"
    [ $code = 0 ] || failed+=("$name ($code)")
    echo "$name: exit code $code, $took" | tee -a "$out/$name.txt" >&2
}

case ${1:-steps} in
steps)
    part matmul 90 benchmarks/matmul.py --peer bitsandbytes --repeats 5 \
        --small --peer bitsandbytes --repeats 2 --tokens 1 16 --shapes 64x64 128x64
    part attention 25 benchmarks/attention.py \
        --small --tokens 64 --heads 2 --features 16 --repeats 2
    part search 50 benchmarks/search.py --formats nf4 int4 --blocks 1048576 --peer_blocks 65536 \
        --small --formats nf4 --blocks 2048 --peer_blocks 512 --turns 1
    part whole_model 40 benchmarks/whole_model.py --size 7b --small --size tiny
    part peak 45 benchmarks/peak.py --size 7b --batch 1 --length 512 --small --size tiny
    part train_step 215 benchmarks/train_step.py --size 7b --peer peft --repeats 5 \
        --small --size tiny --dtype bfloat16 --peer peft --repeats 2
    # With ICQ, as in earlier results: joint calibration would measure ICQ too, and take longer.
    part quickstart 70 train.py --config configs/quickstart.yaml --output_dir "$out/quickstart" \
        --log.progress false --quant.calibration icq \
        --small --config configs/quickstart.yaml --output_dir "$out/quickstart" --log.progress false \
        --quant.calibration icq --train.steps 4 --train.eval_every 4 --train.save_every 4 --evaluate.max_questions 50
    ;;
kernels)
    # Two processes: a crash ends its process, and Mosaic's kernels take seconds to compile.
    part triton 150 benchmarks/kernels.py --implementations triton --record "$out/measured.json" \
        --rows 1 16 2048 --shapes 4096x4096 11008x4096 --repeats 3 --blocks 1048576 \
        --small --implementations triton --rows 1 16 --shapes 64x64 --more-formats \
        --search-formats nf4 --blocks 1024 --repeats 2 --record "$out/measured.json"
    part mosaic 290 benchmarks/kernels.py --implementations mosaic --record "$out/measured.json" \
        --shapes 4096x4096 11008x4096 --more-formats --search-formats --repeats 3 \
        --small --implementations mosaic --rows 1 16 --shapes 64x64 --more-formats \
        --search-formats --repeats 2 --record "$out/measured.json"
    part decode 60 benchmarks/decode.py --size 7b --small --size tiny --slots 16 --repeats 2
    ;;
*)
    echo "$0: '$1': expected steps or kernels" >&2
    exit 2
    ;;
esac

if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
fi
for name in "${parts[@]}"; do
    printf '\n== %s\n' "$name"
    tail -n 60 "$out/$name.txt"
    case " ${failed[*]-} " in *" $name "*) tail -n 15 "$out/$name.err" ;; esac
done
[ -f "$out/measured.json" ] && printf '\n== kernels/measured.json\n' && cat "$out/measured.json"
printf '\n%s parts, %s failed: %s\n' "${#parts[@]}" "${#failed[@]}" "${failed[*]-}"
[ ${#failed[@]} = 0 ]

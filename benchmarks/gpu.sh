#!/usr/bin/env bash
# What needs a CUDA device, each part in one call of under ten minutes:
#
#   benchmarks/gpu.sh tests [PYTEST'S OPTIONS]    # graphs against eager, CUDA against the CPU, host syncs
#   benchmarks/gpu.sh speed ALGO ...              # rates, times of graph replays, kernels; one or two in a call,
#                                                 # more with --variants graphs, without eager and compiled runs
#   benchmarks/gpu.sh train ALGO TASK [SEEDS]     # one cell of the table; again on the same machine: goes on;
#                                                 OUT=benchmarks/results puts it into the table
#
# Results are files below $OUT, or runs/gpu. $SECONDS_LIMIT bounds tests and training. Training then stops at a
# checkpoint, with exit status 143; the same call goes on, with SAC's and DDPG's replay (but not Humanoid's 15 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
part=${1:-}
shift || true
case $part in
tests | speed | train)
    command -v nvidia-smi > /dev/null || { echo "gpu.sh: error: there is no NVIDIA GPU here" >&2; exit 2; }
    mkdir -p "$out"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
    ;;&
tests)
    SECONDS_LIMIT=${SECONDS_LIMIT:-480} \
        "$python" -m pytest -o addopts='-m "not slow"' tests/test_cuda.py \
        --durations=20 --junitxml="$out/tests_cuda.xml" "$@"
    ;;
speed)
    "$python" benchmarks/speed.py --device cuda --no-peers --repeats 1 --output "$out/speed" --algos "${1:?which algorithms?}" "${@:2}"
    ;;
train)
    flags=(--device cuda)
    case $1 in sac | ddpg)
        flags+=(--checkpoint-seconds 240) # a signal saves as well
        [[ $2 == Humanoid* ]] || flags+=(--save-replay)
        ;;
    esac
    timeout --foreground --preserve-status --kill-after 30 "${SECONDS_LIMIT:-540}" "$python" benchmarks/run.py \
        --algos "$1" --env-ids "$2" --num-seeds "${3:-5}" --results "$out" -- "${flags[@]}"
    ;;
tests | speed | train) ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

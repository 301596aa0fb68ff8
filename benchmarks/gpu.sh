#!/usr/bin/env bash
# What needs a CUDA device, each part in one call of under ten minutes:
#
#   benchmarks/gpu.sh tests [ALGO ...]            # graphs against eager, CUDA against the CPU, host syncs
#   benchmarks/gpu.sh speed ALGO ...              # rates, times of graph replays, kernels; one in a call, or several
#                                                 # with --variants graphs eager, without compiled runs
#   benchmarks/gpu.sh train ALGO TASK [SEEDS]     # one cell of the table; again on the same machine: goes on;
#                                                 OUT=benchmarks/results puts it into the table
#
# Results are files below $OUT, or runs/gpu. $SECONDS_LIMIT bounds each part; training stops there at a checkpoint, with
# exit status 143, and the same call goes on, with SAC's and DDPG's replay (but not Humanoid's 15 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
part=${1:-}
shift || true
case $part in
tests | speed | train)
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: error: torch finds no CUDA device here" >&2
        exit 2
    }
    mkdir -p "$out"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv" || true
    ;;&
tests)
    # A process per script, side by side: a recording that fails leaves the generator and the stream of its process in a
    # state in which all later tests of that process fail too. Output goes to files at once: a process that is killed leaves no report.
    limit=${SECONDS_LIMIT:-480} status=0 pids=()
    [ $# -gt 0 ] || set -- ppo_continuous trpo a2c reinforce sac ddpg
    for algo in "$@"; do
        SECONDS_LIMIT=$((limit - 90)) timeout --kill-after 10 "$limit" "$python" -u -m pytest \
            -o addopts='-m "not slow"' -o faulthandler_timeout=120 -v -rP --tb=short --durations=10 \
            tests/test_cuda.py -k "$algo" > "$out/tests_$algo.txt" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    for algo in "$@"; do tail -n 30 "$out/tests_$algo.txt"; done
    exit $status
    ;;
speed)
    timeout --foreground "${SECONDS_LIMIT:-540}" "$python" benchmarks/speed.py --device cuda --no-peers --repeats 1 \
        --output "$out/speed" --algos "${1:?which algorithms?}" "${@:2}" | tee -a "$out/speed.txt"
    ;;
train)
    flags=(--device cuda)
    case $1 in sac | ddpg)
        flags+=(--checkpoint-seconds 240) # a signal saves as well
        [[ $2 == Humanoid* ]] || flags+=(--save-replay)
        ;;
    esac
    status=0
    timeout --foreground --preserve-status --kill-after 30 "${SECONDS_LIMIT:-540}" "$python" benchmarks/run.py \
        --algos "$1" --env-ids "$2" --num-seeds "${3:-5}" --results "$out" -- "${flags[@]}" || status=$?
    # What a run that was cut off has reported, for a machine that does not stay
    [ $status = 0 ] || tar czf "$out/runs_$1_$2.tgz" --exclude='*.pt' -C runs/benchmark "$1/$2" || true
    exit $status
    ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

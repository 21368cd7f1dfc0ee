#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU tests, files side by side and the large ones in parts: much of their time is compilation
# and start of engines, and one GPU of 80 GB holds them all. Those that start engines go first.
#
#   tools/test_gpu.sh                            every file of tests/gpu
#   tools/test_gpu.sh tests/gpu/test_lists.py    only these
#
# PYTHON chooses the interpreter, LIMIT the seconds for all (480), JOBS the processes at a time (as
# many as cores), OUT the folder of the logs (build/gpu). Ends with 1 when a file fails, is stopped
# at the limit, or holds no test.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
limit=${LIMIT:-480}
jobs=${JOBS:-$(nproc)}
mkdir -p "$out"
# Sixteen processes must not have as many threads each as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA GPU is seen by $python: every test would be skipped" >&2
  exit 1
}
files=("$@")
if [ ${#files[@]} -eq 0 ]; then
  files=(tests/gpu/test_*.py)
fi
late=()
declare -A pids=()
begin=$SECONDS
failed=0
start() { # name of the log, test file, part of it; waits for a place
  while [ ${#pids[@]} -ge "$jobs" ]; do reap; done
  local left=$((limit > SECONDS - begin ? limit - SECONDS + begin : 1))
  GPU_TEST_SHARD=$3 timeout -k 10 "$left" "$python" -m pytest -x -q --no-header -p no:cacheprovider \
    --durations=6 -m gpu "$2" >"$out/$1.log" 2>&1 &
  pids[$1]=$!
}
reap() { # says how those ended that have, so that a failure is seen at once
  local name code
  sleep 0.5
  for name in "${!pids[@]}"; do
    if kill -0 "${pids[$name]}" 2>/dev/null; then
      continue
    fi
    wait "${pids[$name]}"
    code=$?
    unset "pids[$name]"
    if [ $code -eq 0 ]; then
      echo "ok    $name: $(tail -n 1 "$out/$name.log")"
    else
      failed=1
      echo "FAIL  $name (exit code $code), end of $out/$name.log:"
      tail -n 60 "$out/$name.log"
    fi
  done
}
for file in "${files[@]}"; do
  name=$(basename "$file" .py)
  case $name in
    # Many shapes, each with kernels of its own to compile (tests/gpu/conftest.py).
    test_kernels | test_lists | test_decode | test_code_steps) late+=("$file") ;;
    *) start "$name" "$file" 1/1 ;;
  esac
done
for file in ${late[@]+"${late[@]}"}; do
  for part in 1 2 3; do start "$(basename "$file" .py)_$part" "$file" $part/3; done
done
while [ ${#pids[@]} -gt 0 ]; do reap; done
echo "GPU tests took $((SECONDS - begin)) s"
exit $failed

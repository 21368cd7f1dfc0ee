#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The GPU tests, all files side by side and the large ones in parts: much of their time is compilation
# and start of engines, and one GPU of 80 GB holds them all.
#
#   tools/test_gpu.sh                            every file of tests/gpu
#   tools/test_gpu.sh tests/gpu/test_lists.py    only these
#
# PYTHON chooses the interpreter, LIMIT the seconds for all (480), OUT the folder of the logs
# (build/gpu). Ends with 1 when a file fails, is stopped at the limit, or holds no test.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
limit=${LIMIT:-480}
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
declare -A pids
begin=$SECONDS
start() { # name of the log, test file, part of it
  GPU_TEST_SHARD=$3 timeout -k 10 "$limit" "$python" -m pytest -x -q --no-header -p no:cacheprovider \
    --durations=6 -m gpu "$2" >"$out/$1.log" 2>&1 &
  pids[$1]=$!
}
for file in "${files[@]}"; do
  name=$(basename "$file" .py)
  case $name in
    # Many shapes, each with kernels of its own to compile (tests/gpu/conftest.py).
    test_kernels | test_lists | test_decode | test_code_steps)
      for part in 1 2 3; do start "${name}_$part" "$file" $part/3; done
      ;;
    *) start "$name" "$file" 1/1 ;;
  esac
done
failed=0
# In the order in which they end, so that a failure is seen at once.
while [ ${#pids[@]} -gt 0 ]; do
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
  sleep 0.5
done
echo "GPU tests took $((SECONDS - begin)) s"
exit $failed

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything about the kernels on one GPU: build, test, time. Logs and rows go to $OUT (or build/gpu),
# rows to benchmarks/results, too.
#
#   tools/gpu_kernels.sh                  build if needed, tests/gpu (without whole engines), benchmarks
#   tools/gpu_kernels.sh --sweep          also other launch shapes of score and attend
#   tools/gpu_kernels.sh --sanitize       also compute-sanitizer on tests/gpu/test_sanitize.py
#   tools/gpu_kernels.sh --only-sanitize  that alone
#
# Needs PyTorch with CUDA, Triton, pydantic and pytest; vLLM is not needed. PYTHON chooses the
# interpreter, KCACHE_COMMIT names the commit in the rows where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
sweep= sanitize= rest=1
for argument in "$@"; do
  case $argument in
    --sweep) sweep=sweep ;;
    --sanitize) sanitize=1 ;;
    --only-sanitize) sanitize=1 rest= ;;
    *)
      echo "unknown argument $argument; accepted: --sweep, --sanitize, --only-sanitize" >&2
      exit 2
      ;;
  esac
done
mkdir -p "$out"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
failed=0

step() { # name, limit in seconds, command: the log goes to $out/name.log
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok    $name ($((SECONDS - begin)) s)"
  else
    echo "FAIL  $name ($((SECONDS - begin)) s), end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
    failed=1
    return 1
  fi
}

"$python" - <<'PY' || exit 1
import pydantic, torch, triton  # pydantic: vllm_kcache.config
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
if [ ! -e vllm_kcache/_C.abi3.so ] || [ -n "$(find csrc -newer vllm_kcache/_C.abi3.so -name '*.c*')" ]; then
  step build 120 env KCACHE_CUDA_ARCHS="${KCACHE_CUDA_ARCHS:-90}" "$python" csrc/build.py
fi

if [ -n "$rest" ]; then
  OUT=$out PYTHON=$python LIMIT=240 \
    tools/test_gpu.sh tests/gpu/test_{kernels,lists,decode,codes,code_steps,hot_cache,sanitize}.py || failed=1
fi

if [ -n "$sanitize" ]; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  tests=("$python" -m pytest -x -q --no-header -p no:cacheprovider -m gpu tests/gpu/test_sanitize.py)
  if [ -z "$sanitizer" ]; then
    echo "FAIL  sanitize: compute-sanitizer is neither in PATH nor in /usr/local/cuda*/bin"
    failed=1
  else
    # Compiles what the two runs below only load.
    step sanitize_compile 150 "${tests[@]}"
    # Children (the compiler, should it run) are not followed. PyTorch's own look around the machine
    # makes calls that fail, and is not what is checked.
    common=(--error-exitcode 9 --target-processes application-only --report-api-errors no
      --show-backtrace device)
    # Without PyTorch's cache each tensor is an allocation, and reading past its end is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitize_memcheck 240 "$sanitizer" --tool memcheck \
      "${common[@]}" "${tests[@]}" &
    memcheck=$!
    step sanitize_racecheck 240 "$sanitizer" --tool racecheck "${common[@]}" "${tests[@]}" &
    racecheck=$!
    wait $memcheck || failed=1
    wait $racecheck || failed=1
    grep -h "SUMMARY" "$out"/sanitize_*check.log
  fi
fi
if [ -z "$rest" ]; then
  exit $failed
fi

OUT=$out PYTHON=$python tools/bench_gpu.sh "${sweep:-ops}" || failed=1
exit $failed

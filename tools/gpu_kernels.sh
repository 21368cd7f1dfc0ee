#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything about the kernels on one GPU: build, test, time. Logs and rows go to $OUT (or build/gpu).
#
#   tools/gpu_kernels.sh             build if needed, tests/gpu (without whole engines), benchmarks
#   tools/gpu_kernels.sh --sweep     also other launch shapes of score and attend
#   tools/gpu_kernels.sh --sanitize  also compute-sanitizer on the tests of the operations
#
# Needs PyTorch with CUDA, Triton, pydantic and pytest; vLLM is not needed. PYTHON chooses the
# interpreter, COMMIT names the commit in the rows where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
sweep= sanitize=
for argument in "$@"; do
  case $argument in
    --sweep) sweep=--sweep ;;
    --sanitize) sanitize=1 ;;
    *) echo "unknown argument $argument; accepted: --sweep, --sanitize" >&2; exit 2 ;;
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
  fi
}

"$python" - <<'PY' || exit 1
import pydantic, torch, triton  # pydantic: vllm_kcache.config
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
if [ ! -e vllm_kcache/_C.abi3.so ] || [ -n "$(find csrc -newer vllm_kcache/_C.abi3.so -name '*.c*')" ]; then
  step build 120 env KCACHE_CUDA_ARCHS="${KCACHE_CUDA_ARCHS:-90}" "$python" csrc/build.py
fi

# Independent files side by side: most of their time is compilation.
begin=$SECONDS
for file in test_ops test_decode test_hot_cache; do
  timeout 240 "$python" -m pytest -q -x --no-header -p no:cacheprovider -m gpu "tests/gpu/$file.py" \
    >"$out/$file.log" 2>&1 &
  declare "pid_$file=$!"
done
for file in test_ops test_decode test_hot_cache; do
  pid=pid_$file
  if wait "${!pid}"; then
    echo "ok    $file: $(tail -n 1 "$out/$file.log")"
  else
    echo "FAIL  $file, end of $out/$file.log:"
    tail -n 40 "$out/$file.log"
    failed=1
  fi
done
echo "tests took $((SECONDS - begin)) s"

if [ -n "$sanitize" ]; then
  for tool in memcheck racecheck; do
    step "sanitize_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x --no-header -p no:cacheprovider -m gpu tests/gpu/test_ops.py \
      -k "test_select and best or test_fetch"
  done
fi

for bench in score select fetch attend overlap write; do
  flags=
  case $bench in score | attend) flags=$sweep ;; esac
  # shellcheck disable=SC2086
  step "bench_$bench" 150 "$python" -m "benchmarks.bench_$bench" --results "$out" $flags
done
for bench in score select fetch attend overlap write; do
  grep -v -i warning "$out/bench_$bench.log" | tail -n 70
done
exit $failed

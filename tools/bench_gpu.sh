#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU shows, by name: figures of operations and whole engines, accuracy, loads.
#
#   tools/bench_gpu.sh                              operations and an engine, in short
#   tools/bench_gpu.sh drafts small                 one after the other
#   tools/bench_gpu.sh drafts small -- mixed gemma  behind --: side by side, when the others have
#                                                   ended; for what is counted and not timed
#   tools/bench_gpu.sh --list                       the names, and what each runs
#
# Rows go to benchmarks/results and, with the logs, to OUT (build/gpu). PYTHON chooses the
# interpreter, LIMIT the seconds for all (3600), HOST_GIB the host memory of engines that take all
# there is (112). Ends with 1 when one fails or is stopped at the limit.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
limit=${LIMIT:-3600}
host=${HOST_GIB:-112}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1

shapes=benchmarks/shapes
smollm=models/SmolLM2-135M-Instruct
replay="--mode replay --mass-threshold 0.002 --output 48 --resume"
decode="engine.decode $shapes/llama-3-8b $replay"
hybrid="$replay --repeats 1 --profile --context 32768 130000 --requests 0 1 --max-requests 192 \
--max-num-batched-tokens 8192 --host-memory-gib $host --engines kcache-4 stock stock-fp8"
both='--settings [{},{"kv_cache_dtype":"fp8"}]'
# Of a GPU that others are on: their memory grows and shrinks while vLLM would measure its own.
cache='"gpu_memory_utilization":0.1,"kv_cache_memory_bytes":8589934592'
part="{$cache}"
ops=$(for op in write write_rows score score_codes select fetch attend overlap layer; do echo "ops.$op"; done)
declare -A runs=(
  [ops]="$ops"
  [short]="$ops
engine.decode $shapes/llama-3-8b --context 32768 --top-n 16 --repeats 1 --label short
engine.prefill $shapes/llama-3-8b --layers 16 --prompts 16384 --repeats 2 --label short"
  [sweep]="$(sed -E 's/^ops.(score|score_codes|attend)$/& --sweep/' <<<"$ops")"
  [layer]="ops.layer"
  [drafts]="$decode --context 32768 --requests 26 --max-requests 26 --repeats 2 --host-memory-gib 62 --drafts 3 0 --profile --engines kcache-4 stock"
  [small]="$decode --context 4224 8192 --requests 1 4 --max-requests 4 --repeats 3 --engines kcache-4 stock stock-fp8"
  [large]="$decode --context 16384 32768 130000 --requests 1 26 0 --max-requests 192 --repeats 1 --host-memory-gib $host --engines kcache-4 stock stock-fp8"
  [grid]="engine.decode $shapes/llama-3-8b --preset grid --host-memory-gib $host"
  [7b]="engine.decode $shapes/llama-2-7b $replay --repeats 1 --context 16384 --requests 0 1 --host-memory-gib $host --engines kcache-4 stock stock-fp8"
  [prefill]="engine.prefill $shapes/llama-3-8b --engines stock kcache --prompts 16 16384 65536 --hit 32768 --repeats 2 --max-requests 2 --utilization 0.5"
  [server]="engine.server $shapes/llama-3-8b --engines kcache stock stock-fp8 --kcache-config {\"host_memory_gib\":$host}"
  [gpt-oss]="engine.decode $shapes/gpt-oss-20b $hybrid"
  [gemma-27b]="engine.decode $shapes/gemma-3-27b $hybrid"
  [qwen]="engine.decode $shapes/qwen3.5-27b $hybrid --v-block-tokens 8"
  [mixed]="engine.mixed_load --minutes 15 --k-bits 4"
  [mixed-16]="engine.mixed_load --minutes 15 --k-bits 16"
  [mixed-drafts]="engine.mixed_load --minutes 15 --k-bits 4 --drafts 3"
  [accuracy]="accuracy sweep $smollm --lengths 2048 4096 8000 $both --engine $part"
  [gemma]="accuracy sweep models/gemma-3-270m --lengths 4096 16384 32000 $both --engine $part"
  [ruler]="accuracy.tasks $smollm --tasks offline_ruler --length 8000 --limit 100 --settings {} --model-args {\"max_model_len\":8192,$cache}"
  [acceptance]="accuracy.acceptance $smollm --settings {\"k_bits\":4} --engine $part"
)

if [ "${1:-}" = --list ]; then
  for name in $(printf '%s\n' "${!runs[@]}" | sort); do
    printf '%s\n' "${runs[$name]}" | sed "s/^/$name\t/"
  done
  exit
fi
[ $# -gt 0 ] || set -- short
for name in "$@"; do
  if [ "$name" != -- ] && [ -z "${runs[$name]+set}" ]; then
    echo "unknown name $name; accepted: $(printf '%s\n' "${!runs[@]}" | sort | xargs)" >&2
    exit 2
  fi
done
mkdir -p "$out"
if [ "$out" -ef benchmarks/results ]; then
  echo "OUT=$out: the rows themselves are there; name another folder" >&2
  exit 2
fi
failed=0

declare -A before
for file in benchmarks/results/*.jsonl; do before[$file]=$(wc -l <"$file"); done
bring() { # the rows since the start
  local file
  for file in benchmarks/results/*.jsonl; do
    tail -n +$((${before[$file]:-0} + 1)) "$file" >"$out/${file##*/}"
    [ -s "$out/${file##*/}" ] || rm "$out/${file##*/}"
  done
}
trap bring EXIT

run() { # name: its commands, one after the other; 1 when one fails
  local name=$1 number=0 code=0 ended begin line log
  while read -r line; do
    log=$out/$name.$((number += 1)).log begin=$SECONDS
    # Words, but no file names: JSON has brackets.
    set -f
    # shellcheck disable=SC2086
    timeout -k 10 $((limit > SECONDS ? limit - SECONDS : 1)) "$python" -m benchmarks.$line \
      >"$log" 2>&1 </dev/null
    ended=$?
    set +f
    if [ $ended -eq 0 ]; then
      echo "ok    $name, $line ($((SECONDS - begin)) s)"
      grep -v -i warning "$log" | tail -n 70
    else
      code=1
      echo "FAIL  $name, $line (exit code $ended, $((SECONDS - begin)) s), end of $log:"
      tail -n 40 "$log"
    fi
    bring
  done <<<"${runs[$name]}"
  return $code
}

pids=()
beside=
for name in "$@"; do
  if [ "$name" = -- ]; then
    beside=1
  elif [ -z "$beside" ]; then
    run "$name" || failed=1
  else
    run "$name" &
    pids+=($!)
  fi
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed

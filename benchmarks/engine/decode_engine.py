# SPDX-License-Identifier: Apache-2.0
"""One engine of benchmarks/engine/decode.py, in a process of its own: starts it, times its steps.

python -m benchmarks.engine.decode_engine OPTIONS    # JSON, see `measure`
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.engine import drafting
from benchmarks.engine.grid import counts
from benchmarks.replay.extension import name_for
from benchmarks.rows import origin
from vllm_kcache.integration.counters import SCALARS
from vllm_kcache.reference.codes import code_parts

# Sizes of batches that are captured; a batch between two of them is padded to the larger.
CAPTURE_SIZES = (
    1, 2, 4, 7, 8, 13, 14, 16, 20, 24, 26, 27, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192,
    224, 256, 320, 384, 448, 512
)  # fmt: skip
SHORT_STEPS = 8
# More than the tokens that a request makes before the steps are counted and after the last.
SPARE_TOKENS = 12
PROFILED_STEPS, PROFILED_KERNELS = 4, 24
# Of `vllm_kcache.metrics`: what steps add up, that is all but the size of the pool.
FIGURES = tuple(name for name in SCALARS if not name.startswith("host_pool_"))


def measure(options: dict[str, Any]) -> None:
    """Start one engine and time its decode steps; runs in the process of that engine.

    Prints a line "RESULT {row}" for each context and number of requests.

    Args:
        options: model, contexts, max_model_len (None: of the longest context),
            max_num_batched_tokens (None: vLLM's choice), output, engine ("stock" or "kcache"),
            kv_cache_dtype, kcache_config, mode, utilization, requests (0: all that fit),
            max_requests, repeats, profile, label, command, quantization, tensor_parallel_size,
            drafts (None: none), seconds (no run is begun after so many), ran (numbers of requests
            by context that are left out).
    """
    split = options["engine"] == "kcache"
    replay = split and options["mode"] == "replay"
    started = time.monotonic()
    extension = name_for(options["kcache_config"], min(options["contexts"])) if replay else ""
    llm = _start_engine(options, extension)
    start_seconds = time.monotonic() - started
    if split:
        llm.collective_rpc(fill_cache)
    cache = llm.llm_engine.vllm_config.cache_config
    common = {
        **origin("torch", "vllm"),
        "command": options["command"],
        "model": Path(options["model"]).name,
        "utilization": options["utilization"],
        "label": options["label"],
        "engine": options["engine"],
        "kv_cache_dtype": options["kv_cache_dtype"],
        "drafts": options["drafts"],
        "quantization": options["quantization"],
        "tensor_parallel_size": options["tensor_parallel_size"],
        "mode": options["mode"] if split else None,
        "kcache_config": options["kcache_config"] if split else None,
        "hot_cache_bytes": llm.collective_rpc(_hot_cache_bytes)[0] if split else None,
        "max_model_len": longest(options),
        "max_num_batched_tokens": options["max_num_batched_tokens"],
        "num_blocks": cache.num_gpu_blocks,
        "num_pages": llm.collective_rpc(_num_pages)[0] if split else None,
        "start_seconds": round(start_seconds, 1),
    }
    for context in options["contexts"]:
        tokens = context + options["output"] + spare_tokens(options["drafts"])
        fits = requests_that_fit(llm, tokens)
        most = min(fits, options["max_requests"])
        for asked, count in counts(options["requests"], most).items():
            if count in options.get("ran", {}).get(str(context), []):
                continue
            if time.monotonic() - started > options["seconds"]:
                print(f"left: from {count} x {context} on", file=sys.stderr)
                return
            run = _time_steps(llm, options, context, count)
            if replay:
                # A row of scores is played for each token of a step.
                rows = count * (1 + (options["drafts"] or 0))
                costs = llm.collective_rpc("replay_cost_ms", args=(rows, context))
                run["replay_kernel_ms"] = round(max(costs), 3)
            row = {
                **common,
                "context": context,
                "requests_that_fit": fits,
                "requests_asked": asked,
                "peak_gpu_bytes": max(llm.collective_rpc(_peak_gpu_bytes)),
                "runs": [run],
            }
            print("RESULT " + json.dumps(row), flush=True)


def requests_that_fit(llm: Any, tokens: int) -> int:
    """Requests of so many tokens that the engine holds at once.

    Counted as its scheduler does: a request takes blocks of each group of layers, for all of its
    tokens or for those that the group still needs, out of the pool that the group draws from.

    Args:
        llm: A `vllm.LLM` with its engine in this process.
        tokens: Of a request, with all that it is to make.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    # Blocks that left the window are freed when the steps that were on their way have ended.
    behind = scheduler.vllm_config.max_concurrent_batches
    needed: Counter[int] = Counter()
    free = {}
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        pool = manager.block_pool
        seen = tokens - manager.get_num_skipped_tokens(tokens) + behind
        blocks, all_blocks = (-(-n // manager.block_size) for n in (seen, tokens))
        # One more, where what is seen begins within a block.
        needed[id(pool)] += min(blocks + 1, all_blocks)
        free[id(pool)] = pool.num_gpu_blocks - 1  # vLLM keeps one
    return min(free[pool] // needed[pool] for pool in free)


def spare_tokens(drafts: int | None) -> int:
    """Places of a request beside its prompt and `output` tokens. Without room for the drafts of the
    step that is on its way, taken for right, and of the next, steps would have fewer, or none."""
    return SPARE_TOKENS + 2 * (drafts or 0)


def longest(options: dict[str, Any]) -> int:
    """The engine's max_model_len: as asked, else what the longest context needs."""
    least = max(options["contexts"]) + options["output"] + spare_tokens(options["drafts"])
    return options["max_model_len"] or least + 4


def _start_engine(options: dict[str, Any], extension: str) -> Any:
    """A vllm.LLM as the options say."""
    from vllm import LLM

    split: dict[str, Any] = {}
    if options["engine"] == "kcache":
        split = {"kv_backend": "kcache", "kcache_config": options["kcache_config"]}
    most, drafts = options["max_requests"], options["drafts"]
    capture = {size for size in (*CAPTURE_SIZES, *options["requests"], most) if 0 < size <= most}
    if drafts:
        capture = {size * (1 + drafts) for size in capture}
        split["speculative_config"] = drafting.speculation(drafts)
        drafting.install()
    if importlib.util.find_spec("flashinfer") is None:
        # On Hopper vLLM takes FlashInfer's kernel for prompts of linear layers, there or not.
        split["gdn_prefill_backend"] = "triton"
    return LLM(
        options["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest(options),
        max_num_seqs=most,
        max_num_batched_tokens=options["max_num_batched_tokens"],
        gpu_memory_utilization=options["utilization"],
        quantization=options["quantization"],
        tensor_parallel_size=options["tensor_parallel_size"],
        worker_extension_cls=extension,
        enable_prefix_caching=False,
        kv_cache_dtype=options["kv_cache_dtype"],
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted(capture),
        },
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_std": 0.5, "startup_fill": True},
        },
        **split,
    )


def fill_cache(worker: Any) -> None:
    """Overwrite the rows of all pages, and with K codes the pages, with random values; forget all
    copies. In place of what the connector wrote, which is meant for pages of K and V; so those of
    layers that are not split keep it."""
    import torch

    cache = worker.split_cache
    row = cache.shape.row
    sample = torch.empty(1 << 15, row.bytes, dtype=torch.uint8)
    for part in (row.keys, row.values)[not row.has_keys :]:
        values = part(sample)
        if row.host_dtype == "int8":
            values.random_(-127, 128)
        else:
            values.normal_(0, 0.5)
    if row.host_dtype == "int8":
        for scales in row.scales(sample):
            scales.fill_(0.5 / 127)
    for index in range(cache.pool.num_layers):
        for rows in cache.pool.layer(index).split(len(sample)):
            rows.copy_(sample[: len(rows)])
    if row.has_keys:
        for pages in split_pages(worker):
            codes, scales = code_parts(pages.view(torch.uint8).flatten(2), cache.shape.head_size)
            codes.random_(0, 256)
            scales.view(torch.float16)[..., 0] = 1 / 3
            scales.view(torch.float16)[..., 1] = -2.5
    if not hasattr(cache, "hot_cache"):
        return  # the CPU has none
    cache.invalidate()
    if row.has_keys:
        _keep_first_pages(cache.hot_cache, sample)


def split_pages(worker: Any) -> list[Any]:
    """Pages of the split layers, [M, Hkv, S, C] each."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention

    from vllm_kcache.integration.backend import KCacheImpl

    layers = get_layers_from_vllm_config(worker.vllm_config, Attention).values()
    return [layer.kv_cache for layer in layers if isinstance(layer.impl, KCacheImpl)]


def _keep_first_pages(hot_cache: Any, sample: Any) -> None:
    """What prompts leave: the rows of the first pages have slots, as far as those go."""
    import torch

    num_layers, rows = hot_cache.table.shape
    kept = min(rows, hot_cache.num_slots // num_layers)
    for layer in range(num_layers):
        slots = torch.arange(layer * kept, (layer + 1) * kept, device=hot_cache.table.device)
        hot_cache.table[layer, :kept] = slots.int()
        owners = layer * rows + torch.arange(kept, device=slots.device)
        hot_cache.slot_word[layer * kept : (layer + 1) * kept] = owners << 32
    on_gpu = sample.to(hot_cache.slots.device)
    for part in hot_cache.slots[: num_layers * kept].split(len(sample)):
        part.copy_(on_gpu[: len(part)])


def _hot_cache_bytes(worker: Any) -> int:
    """GPU memory of the hot V cache's slots."""
    cache = getattr(worker.split_cache, "hot_cache", None)
    return 0 if cache is None else cache.slots.nbytes + cache.slot_word.nbytes


def _num_pages(worker: Any) -> int:
    """Pages of the split layers: beside window layers others than vLLM's blocks."""
    cache = worker.split_cache
    return cache.pool.num_rows // cache.shape.rows_per_page


def _peak_gpu_bytes(worker: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _synchronize(worker: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _v_block_tokens(worker: Any) -> int:
    return worker.split_cache.shape.block_tokens


def _figures(llm: Any) -> dict[str, float]:
    """The split cache's counters since its start; zeros for stock vLLM."""
    import vllm_kcache
    from vllm_kcache.integration.settings import settings_of

    if settings_of(llm.llm_engine.vllm_config) is None:
        return dict.fromkeys(FIGURES, 0.0)
    metrics = vllm_kcache.metrics(llm)
    return {name: metrics[name] for name in FIGURES}


def _time_steps(llm: Any, options: dict[str, Any], context: int, count: int) -> dict[str, Any]:
    """Step time of `count` requests: the mean of the steps of a run but its first ones.

    Steps are timed where the engine takes them, so that neither the prompts nor the first steps,
    which bring rows to the hot cache, are part of them. The split cache's figures are of the same
    steps.
    """
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 31000), k=context) for _ in range(count)]
    steps = options["output"] - SHORT_STEPS
    step_ms, sums, kernel_ms = [], dict.fromkeys(FIGURES, 0.0), {}
    for _ in range(options["repeats"]):
        names, made = _begin(llm, prompts, options["output"])
        for _ in range(SHORT_STEPS):
            _step(llm, made)
        made_before = sum(made.values())
        before = _figures(llm)
        llm.collective_rpc(_synchronize)
        begin = time.perf_counter()
        for _ in range(steps):
            _step(llm, made)
        llm.collective_rpc(_synchronize)
        step_ms.append((time.perf_counter() - begin) / steps * 1e3)
        running = llm.llm_engine.get_num_unfinished_requests()
        if running != count:
            raise RuntimeError(f"{running} of {count} requests ran to the last step timed")
        found = sum(made.values()) - made_before
        # A step that begins the queue of those that are on their way returns nothing.
        if not (steps - 1) * count <= found <= steps * count:
            raise RuntimeError(
                f"{count} requests made {found} tokens in {steps} steps, not one each"
            )
        after = _figures(llm)
        if options["profile"]:
            kernel_ms = _profile(llm)
        sums = {name: sums[name] + after[name] - before[name] for name in FIGURES}
        llm.llm_engine.abort_request(names, internal=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    middle = statistics.median(step_ms)
    result: dict[str, Any] = {
        "requests": count,
        "step_ms": round(middle, 3),
        "step_ms_all": [round(value, 3) for value in sorted(step_ms)],
        "tokens_per_second": round(count / middle * 1e3, 1),
    }
    if options["profile"]:
        result["kernel_ms"] = kernel_ms
    if options["engine"] == "kcache":
        looked_up = sums["hot_cache_hits"] + sums["hot_cache_misses"] + sums["direct_host_reads"]
        blocks = sums["selected_blocks"] / max(1, sums["selected_lists"])
        result["hit_rate"] = round(sums["hot_cache_hits"] / max(1, looked_up), 4)
        tokens = llm.collective_rpc(_v_block_tokens)[0]
        result["mean_selected_tokens"] = round(blocks * tokens, 1)
        result["kcache_metrics"] = sums
    return result


def _profile(llm: Any) -> dict[str, float]:
    """Milliseconds a step of each kernel, the longest first, over some more steps, and "idle":
    when none ran. Kernels on two streams, or launched before the one ahead has ended, overlap."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED_STEPS):
            llm.llm_engine.step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    busy_until, idle = None, 0.0
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        start, end = event.time_range.start, event.time_range.end
        times[event.name] += end - start
        idle += max(0.0, start - busy_until) if busy_until is not None else 0.0
        busy_until = max(end, busy_until or end)
    found = [("idle", idle), *times.most_common(PROFILED_KERNELS)]
    return {name[:100]: round(us / 1e3 / PROFILED_STEPS, 4) for name, us in found}


def _step(llm: Any, made: dict[str, int]) -> None:
    """One step; how many tokens its requests have made goes to `made`."""
    for output in llm.llm_engine.step():
        made[output.request_id] = len(output.outputs[0].token_ids)


def _begin(llm: Any, prompts: list[list[int]], output: int) -> tuple[list[str], dict[str, int]]:
    """Add requests, and step until each has made a token. Returns their names in the engine, and
    how many tokens each has made."""
    from vllm import SamplingParams

    # Some steps are on their way when the last one is timed: no request may end before.
    sampling = SamplingParams(
        max_tokens=output + SPARE_TOKENS, ignore_eos=True, detokenize=False, temperature=0
    )
    names = [
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        for number, prompt in enumerate(prompts)
    ]
    made: dict[str, int] = {}
    while len(made) < len(names):
        _step(llm, made)
    return names, made


if __name__ == "__main__":
    measure(json.loads(sys.argv[1]))

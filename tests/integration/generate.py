# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: reads what to do as JSON, writes what came out.

    python -m tests.integration.generate SPEC.json OUT.json

The specification: {"engine": keyword arguments of vllm.LLM, "batches": [{"prompts": [...],
"sampling": {...} or one for each prompt, "forced": [[token ids], ...] or absent, "lora": [folder
or null for each prompt] or absent}]}; or a batch is {"prompts": [...], "beam_search": {...}}.
Batches run one after the other, so that a later one can hit the prefix cache of an earlier one.
With "forced", request i must continue with those tokens, and the raw log-probability of each is
returned: teacher forcing on the decode path.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # A spinning thread pool on shared cores costs more than the second core gives.
    "OMP_NUM_THREADS": "1",
    # Stock's Triton attention multiplies float32 in TF32 unless told, and then is none to equal.
    "TRITON_F32_DEFAULT": "ieee",
}
# vLLM tells adapters apart by number, in all batches.
ADAPTER_NUMBERS: dict[str, int] = {}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the batches of a specification on a fresh engine."""
    from vllm import LLM

    forced = any("forced" in batch for batch in spec["batches"])
    engine = dict(spec["engine"])
    if forced:
        engine["logits_processors"] = ["tests.integration.forcing:ForceTokens"]
    llm = LLM(disable_log_stats=False, **engine)
    result: dict[str, Any] = {
        "num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "async_scheduling": bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling),
        "batches": [_run_batch(llm, batch) for batch in spec["batches"]],
        "vllm_metrics": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
    }
    if "kv_backend" in engine:
        import vllm_kcache

        result["kcache_metrics"] = vllm_kcache.metrics(llm)
        result["prefill_kernel"] = _prefill_kernel(llm)
    return result


def _run_batch(llm: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    if "beam_search" in batch:
        return _search_beams(llm, batch)
    given = batch["sampling"]
    each = given if isinstance(given, list) else [given] * len(batch["prompts"])
    sampling = []
    for index, own in enumerate(each):
        options = {"temperature": 0.0, **own}
        if "forced" in batch:
            tokens = batch["forced"][index]
            options.update(
                max_tokens=len(tokens),
                ignore_eos=True,
                logprobs=0,
                extra_args={"forced_tokens": tokens},
            )
        sampling.append(SamplingParams(**options))
    prompts = [
        prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        for prompt in batch["prompts"]
    ]
    outputs = llm.generate(
        prompts, sampling, use_tqdm=False, lora_request=_adapters(batch.get("lora"))
    )
    rows = []
    for output, own in zip(outputs, each, strict=True):
        row = {
            "texts": [completion.text for completion in output.outputs],
            "tokens": [list(completion.token_ids) for completion in output.outputs],
            "cached_tokens": output.num_cached_tokens,
            "prompt_tokens": len(output.prompt_token_ids),
        }
        if "logprobs" in own:
            row["top"] = [
                [
                    {str(token): entry.logprob for token, entry in step.items()}
                    for step in c.logprobs
                ]
                for c in output.outputs
            ]
        if "forced" in batch:
            completion = output.outputs[0]
            row["logprobs"] = [
                step[token].logprob
                for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
        rows.append(row)
    return rows


def _search_beams(llm: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences that were found, the prompt before each."""
    from vllm.sampling_params import BeamSearchParams

    prompts = [{"prompt": prompt} for prompt in batch["prompts"]]
    outputs = llm.beam_search(prompts, BeamSearchParams(**batch["beam_search"]))
    return [{"tokens": [beam.tokens for beam in output.sequences]} for output in outputs]


def _prefill_kernel(llm: Any) -> str | None:
    """Kernel of the worker's prefills on a GPU; None where the worker is another process."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        return None
    names = set(llm.collective_rpc(_name_of_prefill))
    assert len(names) == 1, names
    return names.pop()


def _name_of_prefill(worker: Any) -> str | None:
    cache = getattr(worker, "split_cache", None)
    return getattr(getattr(cache, "prefill", None), "name", None)


def _adapters(folders: list[str | None] | None) -> list[Any] | None:
    """A LoRA request for each prompt that names a folder."""
    if folders is None:
        return None
    from vllm.lora.request import LoRARequest

    for folder in filter(None, folders):
        ADAPTER_NUMBERS.setdefault(folder, len(ADAPTER_NUMBERS) + 1)
    return [
        None if folder is None else LoRARequest(folder, ADAPTER_NUMBERS[folder], folder)
        for folder in folders
    ]


def main() -> None:
    """Entry point: paths of the specification and of the result."""
    source, target = map(Path, sys.argv[1:3])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    target.write_text(json.dumps(run(json.loads(source.read_text()))))


if __name__ == "__main__":
    main()

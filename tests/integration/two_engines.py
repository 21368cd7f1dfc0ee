# SPDX-License-Identifier: Apache-2.0
"""Several engines in one process, whose requests take turns step by step."""

from __future__ import annotations

from typing import Any


def run(specs: list[dict[str, Any]], prompts: list[list[list[int]]], tokens: int) -> dict[str, Any]:
    """Make all engines, then let them work in turns.

    Args:
        specs: Keyword arguments of vllm.LLM, for each engine.
        prompts: Token ids of the prompts of each engine.
        tokens: To generate for each prompt.

    Returns:
        "tokens": of each engine and prompt; "metrics": figures of each engine, None for stock;
        "turns": steps that each engine made while another had requests.
    """
    from vllm import LLM, SamplingParams

    import vllm_kcache

    llms = [LLM(**spec) for spec in specs]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engines = [llm.llm_engine for llm in llms]
    for engine, texts in zip(engines, prompts, strict=True):
        for number, prompt in enumerate(texts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    found: list[dict[str, list[int]]] = [{} for _ in engines]
    turns = [0] * len(engines)
    while working := [engine for engine in engines if engine.has_unfinished_requests()]:
        for engine in working:
            at = engines.index(engine)
            turns[at] += len(working) > 1
            # An output's number may carry a suffix of vLLM's.
            for output in engine.step():
                if output.finished:
                    found[at][output.request_id] = list(output.outputs[0].token_ids)
    return {
        "tokens": [
            [own[str(number)] for number in range(len(texts))]
            for own, texts in zip(found, prompts, strict=True)
        ],
        "metrics": [
            vllm_kcache.metrics(llm) if "kv_backend" in spec else None
            for llm, spec in zip(llms, specs, strict=True)
        ],
        "turns": turns,
    }

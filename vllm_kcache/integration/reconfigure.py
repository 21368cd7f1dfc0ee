# SPDX-License-Identifier: Apache-2.0
"""Change the selection of a running engine, to compare settings without starting it again."""

from __future__ import annotations

from typing import Any

from vllm_kcache.integration.settings import settings_of


def reconfigure(
    llm: Any, settings: dict[str, Any], keep_prefix_cache: bool = False
) -> dict[str, Any]:
    """Select and attend by other settings from the next request on.

    Args:
        llm: A `vllm.LLM` made with `kv_backend="kcache"` that runs eager (`enforce_eager=True`; on
            the CPU always) and has nothing to do.
        settings: As `kcache_config` of a new engine: what is not given takes its default. Only
            top_n, coverage, mass_threshold, threshold_length, sink_tokens, recent_tokens, tail and
            head_combine can change; values of others may be repeated, "auto" as what it means. On a
            GPU `top_n` may not pass that of the start, so start with none, and the tail may be
            "clip" only where it was at the start.
        keep_prefix_cache: Keep what is cached. K and V of decoded tokens, unlike those of prompts,
            depend on the settings they were decoded with; keep them only where no later prompt
            contains them.

    Returns:
        The settings in force, those not given left out.

    Raises:
        KCacheConfigError: The engine captured CUDA graphs, or a setting is refused.
        RuntimeError: Requests are running, the prefix cache could not be emptied, or the LLM runs
            without the kcache backend.
    """
    if settings_of(llm.llm_engine.vllm_config) is None:
        raise RuntimeError("reconfigure(llm): this LLM runs without kv_backend='kcache'.")
    if llm.llm_engine.has_unfinished_requests():
        raise RuntimeError("reconfigure(llm): requests are running; wait until they are done.")
    in_force = llm.collective_rpc("kcache_reconfigure", args=(settings,))
    if not keep_prefix_cache and not llm.reset_prefix_cache():
        raise RuntimeError("reconfigure(llm): the prefix cache could not be emptied.")
    return in_force[0]

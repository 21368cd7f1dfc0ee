# SPDX-License-Identifier: Apache-2.0
"""Where the plugin's settings live inside vLLM's configuration.

They travel in `additional_config["kcache"]`, which reaches every process and is hashed as JSON; so
they are kept as a plain JSON object there and parsed where they are used.
"""

from __future__ import annotations

from typing import Any

from vllm_kcache.config import KCacheConfig

KEY = "kcache"
# Beside the settings: an engine of a model without experts forgets how many others there are.
ENGINES_KEY = "kcache_engines_on_host"


def settings_of(vllm_config: Any) -> KCacheConfig | None:
    """The settings of a run, or None where the plugin is not asked for.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        KCacheConfigError: The settings are invalid.
    """
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    return KCacheConfig.from_user(additional[KEY])


def note_engines_on_host(vllm_config: Any) -> None:
    """Keep the number of data-parallel engines on this host for `engines_on_host`.

    Args:
        vllm_config: vLLM's configuration as it was just made.
    """
    engines = max(1, vllm_config.parallel_config.data_parallel_size_local)
    vllm_config.additional_config = {**vllm_config.additional_config, ENGINES_KEY: engines}


def engines_on_host(vllm_config: Any) -> int:
    """Data-parallel engines on this host, of this server; 1 without data parallelism."""
    additional = getattr(vllm_config, "additional_config", None) or {}
    return additional.get(ENGINES_KEY, 1)

# SPDX-License-Identifier: Apache-2.0
"""Where the plugin's settings live inside vLLM's configuration.

They travel in `additional_config["kcache"]`, which reaches every process and is hashed as JSON; so
they are kept as a plain JSON object there and parsed where they are used.
"""

from __future__ import annotations

from typing import Any

from vllm_kcache.config import KCacheConfig

KEY = "kcache"


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

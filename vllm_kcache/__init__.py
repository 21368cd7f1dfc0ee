# SPDX-License-Identifier: Apache-2.0
"""vLLM with codes of K, or K, in GPU memory and the rest in host memory.

Source: KCache, He & Wu 2024, arXiv 2404.18057. Start at docs/design.md.
"""

from __future__ import annotations

from typing import Any

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration.early import install as register

__all__ = ["KCacheConfig", "KCacheConfigError", "metrics", "register"]

# vLLM need not be imported yet: this only makes `LLM(kv_backend="kcache")` known once it is.
register()


def metrics(llm: Any) -> dict[str, Any]:
    """Figures of the split cache behind an offline `vllm.LLM` (integration/metrics.py)."""
    from vllm_kcache.integration.metrics import metrics as read

    return read(llm)

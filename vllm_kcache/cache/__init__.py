# SPDX-License-Identifier: Apache-2.0
"""Where rows lie: the host pool, and the hot cache in GPU memory."""

from vllm_kcache.cache.host_memory import HostMemoryError, host_memory
from vllm_kcache.cache.host_pool import HostPool

__all__ = ["HostMemoryError", "HostPool", "host_memory"]

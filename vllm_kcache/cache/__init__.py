# SPDX-License-Identifier: Apache-2.0
"""Where V lives: the host V pool, and the hot V cache in GPU memory."""

from vllm_kcache.cache.host_memory import HostMemoryError, host_memory
from vllm_kcache.cache.host_pool import HostPool

__all__ = ["HostMemoryError", "HostPool", "host_memory"]

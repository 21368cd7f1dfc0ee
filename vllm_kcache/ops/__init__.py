# SPDX-License-Identifier: Apache-2.0
"""The steps of a decode: checked arguments, then the implementation for the device."""

from vllm_kcache.ops.attend import attend_blocks
from vllm_kcache.ops.fetch import fetch_blocks
from vllm_kcache.ops.score import score_blocks
from vllm_kcache.ops.select import select_blocks
from vllm_kcache.ops.write import update_page_means, write_kv

__all__ = [
    "attend_blocks",
    "fetch_blocks",
    "score_blocks",
    "select_blocks",
    "update_page_means",
    "write_kv",
]

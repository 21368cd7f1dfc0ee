# SPDX-License-Identifier: Apache-2.0
"""Find selected V blocks in the hot cache and bring the misses (csrc/fetch.cuh).

Definition: reference/fetch.py. A decode step does this in `select.select_and_fetch`.
"""

from __future__ import annotations

import torch

from vllm_kcache.types import Selected


def fetch_blocks(
    view: torch.Tensor, selected: Selected, block_table: torch.Tensor, rows: torch.Tensor
) -> None:
    """Fetch alone, on the current stream; no allocation, no wait.

    Args:
        view: of `select.packed_view`.
        block_table: [B, MB] int32, GPU.
        rows: [B, Hkv, N] int32, GPU. Written, as `Fetched.rows`, padded with -1; slots of the hot
            cache hold the V blocks until the epoch after the one in its state has ended.
    """
    torch.ops.kcache.fetch_blocks(view, selected.blocks, selected.counts, block_table, rows)

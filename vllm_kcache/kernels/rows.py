# SPDX-License-Identifier: Apache-2.0
"""K codes and rows of new tokens, and rows back as K and V (csrc/rows.cu, csrc/tokens.cu).

Definitions: reference/write.py and reference/full.py. All calls run on the current stream, allocate
nothing and wait for nothing.
"""

from __future__ import annotations

import torch

from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.write import WriteParts

# Enough thread blocks to fill PCIe 5 x16, few enough to leave the GPU to others.
LINK_BLOCKS = 32


def write_rows(
    view: LayerView,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    parts: WriteParts = WriteParts.ALL,
    allocate_tokens: int = 0,
    fills: bool = False,
    most_thread_blocks: int = 0,
    dependent: bool = False,
) -> None:
    """Store each token's K code in its page, its K and V in its host row and in the hot slot of
    that row.

    Args:
        view: Of k_bits 4, with `packed`.
        key, value: [Tk, Hkv, D] model dtype, GPU. May be strided over tokens; every head begins at
            a multiple of 16 bytes.
        slot_mapping: [Tk] int64, GPU. -1 marks padding. No slot occurs twice.
        parts: what to store: K is the codes. ROW_SLOT does nothing where the hot cache is off.
        allocate_tokens: as for `write.write_kv`.
        fills: other rows of at most 8 tokens that are written whole, their tokens side by side, get
            a slot, too, while there are slots that hold nothing.
        most_thread_blocks: of the launch, `LINK_BLOCKS` on a copy stream; 0: as many as there is
            work for.
        dependent: launch it as kernels/dependent.py says.
    Raises:
        RuntimeError: a tensor does not fit the view.
    Graph-safe: a grid that depends on shapes only.
    """
    torch.ops.kcache.write_rows(
        view.packed, key, value, slot_mapping, parts.value, allocate_tokens, fills,
        most_thread_blocks, dependent,
    )  # fmt: skip


def gather_rows(
    view: LayerView,
    page_table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    first_rows: torch.Tensor,
    max_length: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    most_thread_blocks: int = LINK_BLOCKS,
) -> None:
    """Copy K and V of runs of tokens, one for each request, from host rows to contiguous memory.

    int8 is dequantised, and k' turned back into K.

    Args:
        view: Of k_bits 4, with `packed`.
        page_table, starts, lengths, first_rows, max_length: as for `context.gather_context`.
        keys, values: [rows, Hkv, D] model dtype, GPU. Outside the runs they are left alone.
        most_thread_blocks: of the launch.
    Raises:
        RuntimeError: a tensor does not fit the view.
    """
    torch.ops.kcache.gather_rows(
        view.packed, page_table, starts, lengths, first_rows, max_length, keys, values,
        most_thread_blocks,
    )  # fmt: skip

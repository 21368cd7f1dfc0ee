# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops. They read shapes, dtypes and devices, never values: no host sync."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from vllm_kcache.types import Fetched, Selected, Selection

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Mapping[str, int | None],
    dtypes: Collection[torch.dtype],
    device: torch.device | None,
) -> None:
    """Check one argument.

    Args:
        shape: name of each dimension and the size it must have; None accepts any size.
        dtypes: the accepted dtypes.
        device: the device it must lie on; None accepts any.
    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: is {type(tensor).__name__}; must be a torch.Tensor")
    sizes = tuple(shape.values())
    fits = len(sizes) == tensor.dim() and all(
        size is None or size == actual for size, actual in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in shape.items())
        raise ValueError(f"{name}: has shape {list(tensor.shape)}; must be [{wanted}]")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        actual = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: has dtype {actual}; must be {accepted}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: lies on {tensor.device}; must be on {device}, beside the others")


def check_pages(name: str, pages: torch.Tensor, device: torch.device | None) -> None:
    """Check K pages, [M, Hkv, S, D]: they may be strided over M only."""
    shape: Mapping[str, int | None] = {"M": None, "Hkv": None, "S": None, "D": None}
    check_tensor(name, pages, shape, MODEL_DTYPES, device)
    _, _, page_tokens, head_size = pages.shape
    if 0 in pages.shape[1:]:
        raise ValueError(f"{name}: has shape {list(pages.shape)}; Hkv, S and D must be at least 1")
    inner = (page_tokens * head_size, head_size, 1)
    if pages.shape[0] and not pages[0].is_contiguous():
        raise ValueError(
            f"{name}: has strides {list(pages.stride())}; the last three must be {list(inner)} "
            "(only the first dimension may be strided)"
        )


def check_v_pool(v_pool: torch.Tensor, k_pages: torch.Tensor) -> None:
    """Check one layer of the host V pool against the K pages it belongs to."""
    check_host_pool(v_pool)
    if v_pool.shape != k_pages.shape:
        raise ValueError(
            f"v_pool: has shape {list(v_pool.shape)}; must be that of k_pages, "
            f"{list(k_pages.shape)}"
        )
    if v_pool.dtype != k_pages.dtype:
        raise TypeError(
            f"v_pool: has dtype {v_pool.dtype}; must be that of k_pages, {k_pages.dtype}"
        )


def check_host_pool(v_pool: torch.Tensor) -> None:
    """Check one layer of the host V pool: [M, Hkv, S, D], contiguous, in host memory."""
    check_pages("v_pool", v_pool, torch.device("cpu"))
    if not v_pool.is_contiguous():
        raise ValueError(f"v_pool: has strides {list(v_pool.stride())}; must be contiguous")


def check_query(query: torch.Tensor, pages: torch.Tensor, batch_name: str = "B") -> None:
    """Check the query, [B, Hq, D], against the K pages: same dtype, device and D, Hq % Hkv == 0."""
    _, num_kv_heads, _, head_size = pages.shape
    shape = {batch_name: None, "Hq": None, "D": head_size}
    check_tensor("query", query, shape, (pages.dtype,), pages.device)
    check_head_groups("query", query.shape[1], num_kv_heads)


def check_head_groups(name: str, num_heads: int, num_kv_heads: int) -> None:
    """Check that the query heads divide evenly among the KV heads."""
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{name}: has {num_heads} query heads; must be a multiple of {num_kv_heads} KV heads"
        )


def check_block_table(block_table: torch.Tensor, num_requests: int, device: torch.device) -> None:
    """Check the block table, [B, MB] int32."""
    shape = {"B": num_requests, "MB": None}
    check_tensor("block_table", block_table, shape, (torch.int32,), device)


def check_seq_lens(seq_lens: torch.Tensor, num_requests: int, device: torch.device) -> None:
    """Check the lengths, [B] int32."""
    check_tensor("seq_lens", seq_lens, {"B": num_requests}, (torch.int32,), device)


def accumulation_dtypes(model_dtype: torch.dtype) -> tuple[torch.dtype]:
    """float32, or float64 for a float64 model: the dtype that scores and means are kept in."""
    return (torch.float64,) if model_dtype == torch.float64 else (torch.float32,)


def check_block_lse(
    name: str,
    block_lse: torch.Tensor,
    num_requests: int,
    num_heads: int | None,
    num_blocks: int | None,
    query: torch.Tensor | None,
) -> None:
    """Check log-sum-exps, [B, Hq, P] float32, beside the query where there is one."""
    shape = {"B": num_requests, "Hq": num_heads, "P": num_blocks}
    if query is None:
        check_tensor(name, block_lse, shape, (torch.float32, torch.float64), None)
    else:
        check_tensor(name, block_lse, shape, accumulation_dtypes(query.dtype), query.device)


def check_v_block_tokens(v_block_tokens: int, page_tokens: int | None = None) -> None:
    """Check the size of a V block: a power of two that divides a page."""
    if v_block_tokens < 1 or v_block_tokens & (v_block_tokens - 1):
        raise ValueError(f"v_block_tokens={v_block_tokens}: must be a power of two")
    if page_tokens is not None and page_tokens % v_block_tokens:
        raise ValueError(
            f"v_block_tokens={v_block_tokens}: must divide the {page_tokens} tokens of a K page"
        )


def check_selection(selection: Selection, v_block_tokens: int) -> None:
    """Check the selection rule, forced blocks against the cap included."""
    if selection.combine not in ("sum", "max"):
        raise ValueError(f'selection.combine={selection.combine!r}: must be "sum" or "max"')
    if selection.coverage is not None and not 0 < selection.coverage <= 1:
        raise ValueError(
            f"selection.coverage={selection.coverage}: must be greater than 0 and at most 1, "
            "or None"
        )
    if selection.mass_threshold is not None:
        if not 0 < selection.mass_threshold <= 1:
            raise ValueError(
                f"selection.mass_threshold={selection.mass_threshold}: must be greater than 0 and "
                "at most 1, or None"
            )
        if selection.coverage is not None:
            raise ValueError(
                f"selection.mass_threshold={selection.mass_threshold}: not together with "
                f"selection.coverage={selection.coverage}"
            )
    if selection.sink_blocks < 0:
        raise ValueError(f"selection.sink_blocks={selection.sink_blocks}: must be at least 0")
    if selection.recent_tokens < 1:
        raise ValueError(f"selection.recent_tokens={selection.recent_tokens}: must be at least 1")
    forced = selection.most_forced_blocks(v_block_tokens)
    if selection.top_n is not None and selection.top_n < forced:
        raise ValueError(
            f"selection.top_n={selection.top_n}: must be at least {forced}, the most V blocks that "
            "sink and recent force in, or None"
        )


def check_selected(
    name: str,
    selected: Selected,
    num_requests: int,
    num_kv_heads: int,
    device: torch.device,
    least_columns: int = 0,
) -> None:
    """Check a selection, [B, Hkv, N] with at least `least_columns` columns."""
    rows: Mapping[str, int | None] = {"B": num_requests, "Hkv": num_kv_heads}
    check_tensor(f"{name}.blocks", selected.blocks, {**rows, "N": None}, (torch.int32,), device)
    check_tensor(f"{name}.counts", selected.counts, rows, (torch.int32,), device)
    check_tensor(f"{name}.mass", selected.mass, rows, (torch.float32,), device)
    if selected.blocks.shape[2] < least_columns:
        raise ValueError(
            f"{name}.blocks: has N={selected.blocks.shape[2]} columns; must have at least "
            f"{least_columns}, or a list could be cut short"
        )


def check_fetched(
    name: str,
    fetched: Fetched,
    blocks: torch.Tensor,
    v_block_tokens: int,
    head_size: int,
    dtype: torch.dtype,
) -> None:
    """Check rows, [B, Hkv, N] beside the selected `blocks`, and v_rows, [R, T, D]."""
    num_requests, num_kv_heads, columns = blocks.shape
    shape: Mapping[str, int | None] = {"B": num_requests, "Hkv": num_kv_heads, "N": columns}
    check_tensor(f"{name}.rows", fetched.rows, shape, (torch.int32,), blocks.device)
    shape = {"R": None, "T": v_block_tokens, "D": head_size}
    check_tensor(f"{name}.v_rows", fetched.v_rows, shape, (dtype,), blocks.device)

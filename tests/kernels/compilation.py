# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel to machine code of a GPU that need not be there; nothing is run.

    python -m tests.kernels.compilation 90

The interpreter takes what the compiler does not: a variable of two types or shapes after a branch,
a product of too few rows, more shared memory than there is.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vllm_kcache.kernels
from tests.shapes import Shape, build_case
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.attend_plan import attend_config
from vllm_kcache.kernels.context import gather_context, patch_context, store_value
from vllm_kcache.kernels.fetch import launch_fetch
from vllm_kcache.kernels.score import launch_score
from vllm_kcache.kernels.score_plan import chunk_blocks, num_chunks
from vllm_kcache.kernels.select import launch_select
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.types import Fetched, Selected, Selection

# Group sizes 1 to 16, head sizes that are padded and that are not.
CASES = (
    (Shape((300, 0), 2, 4, 128, 16, 8), torch.bfloat16),
    (Shape((300,), 1, 3, 80, 32, 16), torch.float16),
    (Shape((37,), 2, 1, 64, 16, 4), torch.float32),
    (Shape((300,), 1, 16, 256, 16, 4), torch.bfloat16),
    # The most shared memory of the score kernel, and of attention.
    (Shape((300,), 1, 4, 64, 16, 1), torch.bfloat16),
    (Shape((300,), 1, 16, 256, 32, 32), torch.float32),
)
RULES = (
    (Selection(4, None, 1, 1, "sum"), "renormalize"),
    (Selection(None, 0.9, 1, 1, "max"), "drop"),
    (Selection(None, None, 1, 1, "max", 0.002), "clip"),
)


# Shared memory that a thread block may have, bytes, by compute capability (CUDA C++ Programming
# Guide, technical specifications).
MOST_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead_of_running(capability: int) -> set[str]:
    """From now on a launch compiles. Names of what was compiled gather in the set returned."""
    compiled: set[str] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **{**options, "warmup": True})
        assert kernel.asm["cubin"], self
        if options.get("launch_pdl"):
            assert "griddepcontrol.wait" in kernel.asm["ptx"], self
        assert kernel.metadata.shared <= MOST_SHARED[capability], (self, kernel.metadata.shared)
        # Of two memories less than 32 GiB apart: a product in 32 bits would not fit.
        assert not re.search(r"muli %host_distance\S* .*: i32", kernel.asm["ttir"]), self
        compiled.add(self.fn.__name__)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(NoGpu(capability))
    return compiled


def launch_all(shape: Shape, dtype: torch.dtype, dependent: bool) -> None:
    """Every launch that a layer of this shape may make."""
    case = build_case(shape, dtype)
    tokens, heads = shape.v_block_tokens, shape.num_kv_heads
    rows = case.v_pool[..., 0].numel() // tokens
    cache = HotCache.make(64, 1, rows, tokens, shape.head_size, dtype, "cpu")
    key = case.keys[0][:1].contiguous()
    slot = torch.zeros(1, dtype=torch.int64)
    write_kv(
        key, key, slot, case.k_pages, case.v_pool, cache, 0, allocate_tokens=1, dependent=dependent
    )
    block_lse = torch.zeros(len(shape.seq_lens), shape.num_heads, shape.max_blocks)
    lists = (len(shape.seq_lens), heads)
    scored = torch.zeros(lists[0] * heads, dtype=torch.int32)
    arguments = (case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, tokens)
    launch_score(*arguments, block_lse, pad=True)
    in_chunk = chunk_blocks(shape.head_size, dtype.itemsize, tokens)
    sums = block_lse.new_zeros((*block_lse.shape[:2], num_chunks(shape.max_blocks, in_chunk)))
    launch_score(*arguments, block_lse, new_epoch=cache)
    for after_write in {False, dependent}:
        chain = {"chunk_lse": sums, "dependent": dependent, "after_write": after_write}
        launch_score(*arguments, block_lse, new_epoch=cache, **chain)
        launch_score(*arguments, block_lse, parts_scored=scored, **chain)
    for selection, tail in RULES:
        columns = selection.top_n or shape.max_blocks
        selected = Selected(
            torch.zeros(*lists, columns, dtype=torch.int32),
            torch.zeros(lists, dtype=torch.int32),
            torch.zeros(lists),
            torch.zeros(len(shape.seq_lens), shape.num_heads),
        )
        launch_select(block_lse, case.seq_lens, tokens, selection, selected, hot_cache=cache)
        fetched = Fetched(torch.zeros_like(selected.blocks), cache.slots)
        for hot in (cache, None):
            launch_fetch(selected, case.block_table, case.v_pool, tokens, hot, 0, fetched)
        usual = attend_config(2, columns, shape.head_size, dtype.itemsize, tokens)
        # Whether lists are split is a compiled-in choice, apart from what the tail does.
        for splits in (1, 4) if tail == "clip" else (4,):
            attend_blocks(
                case.query, case.k_pages, case.v_pool, fetched, selected, case.block_table,
                case.seq_lens, case.scale, tokens, tail, block_lse, clip=selection.clip,
                config=replace(usual, splits=splits), dependent=dependent,
            )  # fmt: skip
    context = torch.zeros(shape.seq_lens[0], heads, shape.head_size, dtype=dtype)
    one = (case.block_table, case.seq_lens * 0, case.seq_lens, case.seq_lens * 0)
    gather_context(case.v_pool, *one, shape.seq_lens[0], context, 2)
    step_rows = torch.full((case.v_pool.shape[0] * shape.page_tokens,), -1, dtype=torch.int32)
    patch_context(context, key, step_rows, *one, shape.seq_lens[0], shape.page_tokens)
    store_value(key, slot, case.v_pool)


def all_kernels() -> set[str]:
    """Names of the kernels that the package has."""
    names = set()
    for module in pkgutil.iter_modules(vllm_kcache.kernels.__path__):
        members = vars(importlib.import_module(f"vllm_kcache.kernels.{module.name}")).values()
        functions = (member for member in members if isinstance(member, JITFunction))
        names |= {f.fn.__name__ for f in functions if f.fn.__name__.endswith("_kernel")}
    return names


def main(capability: int) -> None:
    compiled = compile_instead_of_running(capability)
    for shape, dtype in CASES:
        launch_all(shape, dtype, dependent=capability >= 90)
    assert compiled == all_kernels(), compiled ^ all_kernels()
    print(f"{len(compiled)} kernels compiled for compute capability {capability / 10}")


if __name__ == "__main__":
    main(int(sys.argv[1]))

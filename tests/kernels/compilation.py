# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel to machine code of a GPU that need not be there; nothing is run.

    python -m tests.kernels.compilation 90

The interpreter takes what the compiler does not: a variable of two types or shapes after a branch,
a product of too few rows, more shared memory than there is.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import re
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vllm_kcache.kernels
from tests.kernels.layers import Layer, code_layer_of, layer_of
from tests.reference.coded import Coded
from tests.shapes import Shape, build_case
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.attend_plan import attend_config
from vllm_kcache.kernels.context import gather_context, patch_context, store_value
from vllm_kcache.kernels.score import score_blocks
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.types import Selection, Tail

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
# With learned sinks and a soft cap, too.
SPECIAL = (CASES[0], CASES[-1])
RULES: tuple[tuple[Selection, Tail], ...] = (
    (Selection(4, None, 1, 1, "sum"), "renormalize"),
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


def attend(layer: Layer, splits: int, dependent: bool) -> None:
    """Attention over as many programs a list."""
    view, batch, workspace = layer.view, layer.batch, layer.workspace
    lists = workspace.views(view, batch)
    usual = attend_config(view.shape, 2, lists.rows.shape[2])
    attend_blocks(
        view, batch, lists.selected, lists.rows, workspace, torch.empty_like(batch.query),
        config=replace(usual, splits=splits), dependent=dependent,
    )  # fmt: skip


def with_sinks_and_cap(layer: Layer) -> Layer:
    """The same, with what some models have besides."""
    sinks = torch.zeros(layer.view.shape.num_query_heads, dtype=layer.view.shape.dtype)
    return replace(layer, batch=replace(layer.batch, sinks=sinks, soft_cap=4.0))


def launch_all(shape: Shape, dtype: torch.dtype, dependent: bool) -> None:
    """Every launch that a layer of this shape may make."""
    case = build_case(shape, dtype)
    key = case.keys[0][:1].contiguous()
    slot = torch.zeros(1, dtype=torch.int64)
    for (selection, tail), num_slots in zip(RULES, (0, 64), strict=True):
        layer = layer_of(case, selection, tail, num_slots)
        view, batch, workspace = layer.view, layer.batch, layer.workspace
        write_kv(view, key, key, slot, allocate_tokens=1, dependent=dependent)
        write_kv(view, key, key, slot, parts=WriteParts.K | WriteParts.ROW_SLOT)
        lists = workspace.views(view, batch)
        spans = torch.zeros(batch.num_requests, 2, dtype=torch.int32)
        drafts = replace(batch, spans=spans, most_tokens=4)
        for after_write, signal in itertools.product({False, dependent}, (False, True)):
            for each in (batch, drafts):
                score_blocks(
                    view, each, lists, signal=signal, dependent=dependent, after_write=after_write
                )
        # Whether lists are split is a compiled-in choice, apart from what the tail does.
        for splits in (1, 4) if tail == "clip" else (4,):
            attend(layer, splits, dependent)
        if (shape, dtype) in SPECIAL:
            layer = with_sinks_and_cap(layer)
            score_blocks(view, layer.batch, lists, dependent=dependent)
            attend(layer, 4, dependent)
    for host_dtype, (selection, tail) in zip(("model", "int8"), RULES, strict=True):
        layer = code_layer_of(Coded.of(case, host_dtype), selection, tail, 64)
        if host_dtype == "int8" and dtype != torch.float32:
            continue  # csrc/attend.cu
        if (shape, dtype) in SPECIAL:
            attend(with_sinks_and_cap(layer), 4, dependent)
        attend(layer, 4, dependent)
    heads = shape.num_kv_heads
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


def main() -> None:
    """Compile for the GPU that KCACHE_CAPABILITY names, such as 90."""
    capability = int(os.environ["KCACHE_CAPABILITY"])
    compiled = compile_instead_of_running(capability)
    for shape, dtype in CASES:
        launch_all(shape, dtype, dependent=capability >= 90)
    assert compiled == all_kernels(), compiled ^ all_kernels()
    print(f"{len(compiled)} kernels compiled for compute capability {capability / 10}")


if __name__ == "__main__":
    main()

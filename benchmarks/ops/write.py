# SPDX-License-Identifier: Apache-2.0
"""Write: a decode step's tokens, and a prompt chunk's. `python -m benchmarks.ops.write`.

Bytes counted for a chunk: V over the link.
"""

from __future__ import annotations

import torch

from benchmarks.ops.common import (
    ANY_RULE,
    DTYPE,
    PAGE_TOKENS,
    PROBLEMS,
    Batch,
    Problem,
    Report,
    Timing,
    arguments,
    link_bandwidths,
    time_calls,
)
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.write import WriteParts, write_kv

CHUNK_TOKENS = 4096


def random_slots(problem: Problem, tokens: int, whole_pages: bool) -> torch.Tensor:
    """Slots of new tokens: each in a page of its own, or filling pages in order."""
    pages = torch.randperm(problem.num_pages, device="cuda")
    if whole_pages:
        offsets = torch.arange(PAGE_TOKENS, device="cuda")
        return (pages[: tokens // PAGE_TOKENS, None] * PAGE_TOKENS + offsets).flatten()
    return pages[:tokens] * PAGE_TOKENS + torch.randint(PAGE_TOKENS, (tokens,), device="cuda")


def time_write(
    problem: Problem, view: LayerView, tokens: int, whole_pages: bool, parts: WriteParts
) -> Timing:
    p = problem
    shape = (tokens, p.num_kv_heads, p.head_size)
    key = torch.randn(shape, dtype=DTYPE, device="cuda")
    allocate_tokens = 0 if whole_pages else tokens

    def call(slots: torch.Tensor) -> None:
        write_kv(view, key, key, slots, parts=parts, allocate_tokens=allocate_tokens)

    slot_lists = [random_slots(p, tokens, whole_pages) for _ in range(4)]
    return time_calls([lambda slots=slots: call(slots) for slots in slot_lists])


def main() -> None:
    options = arguments(__doc__)
    _, outward = link_bandwidths()
    report = Report("write", options.results)
    for problem in PROBLEMS:
        batch = Batch(problem)
        view = batch.view(ANY_RULE, batch.hot_cache(1 << 16))
        timing = time_write(problem, view, problem.num_requests, False, WriteParts.ALL)
        report.add(f"{problem.name}, decode step", timing)
        tokens = min(CHUNK_TOKENS, problem.context)
        rest = WriteParts.K | WriteParts.ROW_SLOT
        timing = time_write(problem, view, tokens, True, rest)
        report.add(f"{problem.name}, chunk of {tokens}, K and slots", timing)
        timing = time_write(problem, view, tokens, True, WriteParts.ALL)
        rate = tokens * problem.num_kv_heads * problem.head_size * 2 / timing.p50 * 1e3
        report.add(
            f"{problem.name}, chunk of {tokens}, all",
            timing,
            rate / 1e9,
            share_of_link_copy=rate / outward,
        )
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()

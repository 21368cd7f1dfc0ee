# SPDX-License-Identifier: Apache-2.0
"""Before an engine serves: do the kernels on this GPU do what their definition says?

A compiler or a driver that nobody has tried may get a kernel wrong, and a wrong answer looks like
any other. So a worker decodes a small batch of its model's shape through its kernels, stage by
stage against `reference/`, and does not start where they differ. The same kernels are compiled that
the model will run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels import decode, extension
from vllm_kcache.kernels.decode_plan import DecodePlan
from vllm_kcache.kernels.decode_workspace import DecodeWorkspace
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selected, Selection, Tail

# The environment switch that leaves the check out.
SWITCH = "VLLM_KCACHE_SELF_CHECK"
# Of results of order 1, accumulated in float32 and rounded once.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SCORE_TOLERANCE = 1e-3
# Two masses so close, relative to one another, may change places.
NEAR = 1e-3
# One token; enough that blocks are left out, the last of them not full; a padded row.
REQUEST_TOKENS = (1, 397, 0)
# Sharpens random scores, so that a selection leaves something out.
SHARPNESS = 3.0


class KernelError(RuntimeError):
    """A kernel and its definition differ; the message names the stage."""


@dataclass(frozen=True)
class LayerShape:
    """What decides which kernels a layer runs.

    Attributes:
        num_query_heads, num_kv_heads, head_size: Hq, Hkv and D of one rank.
        page_tokens, v_block_tokens: S and T.
        dtype: of K and V.
        selection, tail: the rule, and what happens to the rest.
    """

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    page_tokens: int
    v_block_tokens: int
    dtype: torch.dtype
    selection: Selection
    tail: Tail

    @property
    def chunk_blocks(self) -> int:
        """V blocks of a chunk that scoring leaves a sum of; 0 where no extension takes them."""
        if not extension.available():
            return 0
        return chunk_blocks(self.head_size, self.dtype.itemsize, self.v_block_tokens)


def is_wanted() -> bool:
    """Whether the check is to run: unless the environment says 0.

    Raises:
        ValueError: neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}={switch}: must be 0 or 1")
    return switch == "1"


def check_kernels(shape: LayerShape, device: torch.device | str) -> None:
    """Write, score, select, fetch and attend a small batch, as the steps of a decode would.

    Every plan of a step runs twice over one hot cache: first it has to fetch, then it finds all.

    Args:
        shape: that of the model's layers.
        device: the GPU.
    Raises:
        KernelError: a result is not that of the reference.
    """
    batch = _Batch(shape, torch.device(device))
    plans = [DecodePlan()]
    if extension.available():
        plans.append(DecodePlan(followers=2))
    # A benchmark that replaces the scores does so from the first step on.
    replacing, decode.after_score = decode.after_score, None
    try:
        for plan in plans:
            batch.check(plan)
    finally:
        decode.after_score = replacing


class _Batch:
    """A few requests in pages of random order, on the device and as the reference takes them."""

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator).to(shape.dtype)

        tokens, heads = shape.page_tokens, shape.num_kv_heads
        self.lengths = torch.tensor(REQUEST_TOKENS, dtype=torch.int32)
        pages_of = [-(-length // tokens) for length in REQUEST_TOKENS]
        num_pages = sum(pages_of) + 1
        order = torch.randperm(num_pages, generator=generator).int()
        self.table = torch.zeros((len(pages_of), max(pages_of)), dtype=torch.int32)
        first = 0
        for row, pages in enumerate(pages_of):
            self.table[row, :pages] = order[first : first + pages]
            first += pages
        pool = (num_pages, heads, tokens, shape.head_size)
        self.k_pages, self.v_pages = random(*pool), random(*pool)
        self.query = SHARPNESS * random(len(pages_of), shape.num_query_heads, shape.head_size)
        self.scale = shape.head_size**-0.5
        self.max_blocks = max(pages_of) * tokens // shape.v_block_tokens
        self.k_there = torch.full_like(self.k_pages, torch.nan, device=device)
        pinned = device.type == "cuda"
        self.v_there = torch.full(pool, torch.nan, dtype=shape.dtype, pin_memory=pinned)

    def write(self, cache: HotCache) -> None:
        """Every token of every page goes through the kernel."""
        rows = [pages.permute(0, 2, 1, 3).flatten(0, 1) for pages in (self.k_pages, self.v_pages)]
        key, value = (row.contiguous().to(self.device) for row in rows)
        slots = torch.arange(key.shape[0], device=self.device)
        write_kv(key, value, slots, self.k_there, self.v_there, cache, 0)
        self._wait()
        if not torch.equal(self.k_there.cpu(), self.k_pages):
            raise self._error("write", "K")
        if not torch.equal(self.v_there, self.v_pages):
            raise self._error("write", "V")

    def check(self, plan: DecodePlan) -> None:
        """Raise KernelError unless two steps of this layout are the reference's."""
        shape, device = self.shape, self.device
        num_requests = len(self.lengths)
        num_blocks = self.v_pages[..., 0].numel() // shape.v_block_tokens
        # Claiming samples the slots: with as many again, every block finds one.
        cache = HotCache.make(
            2 * num_blocks, 1, num_blocks, shape.v_block_tokens, shape.head_size, shape.dtype,
            device,
        )  # fmt: skip
        self.write(cache)
        workspace = DecodeWorkspace.make(
            num_requests, shape.num_query_heads, shape.num_kv_heads, shape.head_size,
            self.max_blocks, shape.selection, device,
            chunk_blocks=shape.chunk_blocks,
        )  # fmt: skip
        out = torch.empty_like(self.query, device=device)
        for _ in range(2):
            out.fill_(torch.nan)
            decode.decode_step(
                workspace, self.query.to(device), self.k_there, self.v_there,
                self.table.to(device), self.lengths.to(device), self.scale, shape.v_block_tokens,
                self.max_blocks, shape.selection, shape.tail, cache, 0, out, plan,
            )  # fmt: skip
            self._wait()
            block_lse, selected, _ = workspace.views(num_requests, self.max_blocks, shape.selection)
            self.compare(block_lse.cpu(), _on_host(selected), out.cpu())

    def compare(self, block_lse: torch.Tensor, selected: Selected, out: torch.Tensor) -> None:
        """Each stage against the reference on the results of the stage before."""
        shape, tokens = self.shape, self.shape.v_block_tokens
        paged = (self.table, self.lengths, self.scale, tokens)
        expected = score_blocks(self.query, self.k_pages, *paged, self.max_blocks)
        exists = expected.isfinite()
        if not _close(block_lse[exists], expected[exists], SCORE_TOLERANCE):
            raise self._error("score", f"off by {_most(block_lse[exists], expected[exists]):.2g}")
        block_lse = block_lse.masked_fill(~exists, -torch.inf)
        chosen = select_blocks(block_lse, self.lengths, shape.num_kv_heads, tokens, shape.selection)
        self._compare_lists(block_lse, selected, chosen)
        # Past its count a list of the kernels holds anything.
        listed = torch.arange(selected.blocks.shape[2]) < selected.counts[..., None]
        selected = Selected(
            selected.blocks.masked_fill(~listed, -1), selected.counts, selected.mass, selected.lse
        )
        fetched = fetch_blocks(selected, self.table, self.v_pages, tokens)
        expected = attend_blocks(
            self.query, self.k_pages, self.v_pages, fetched, selected, *paged, shape.tail,
            block_lse, clip=shape.selection.clip,
        )  # fmt: skip
        if not _close(out, expected, TOLERANCES[shape.dtype]):
            raise self._error("fetch or attend", f"off by {_most(out, expected):.2g}")

    def _compare_lists(self, block_lse: torch.Tensor, selected: Selected, chosen: Selected) -> None:
        """The same blocks, but for those whose masses are as good as equal to the least kept."""
        masses = (block_lse - block_lse.logsumexp(-1, keepdim=True)).exp().nan_to_num()
        by_group = masses.unflatten(1, (self.shape.num_kv_heads, -1))
        mean = self.shape.selection.combine == "sum"
        combined = by_group.mean(2) if mean else by_group.amax(2)
        for row, head in torch.cartesian_prod(*map(torch.arange, selected.counts.shape)).tolist():
            ours = set(selected.blocks[row, head, : selected.counts[row, head]].tolist())
            theirs = set(chosen.blocks[row, head, : chosen.counts[row, head]].tolist())
            edge = min((float(combined[row, head, block]) for block in ours & theirs), default=0.0)
            for block in ours ^ theirs:
                mass = float(combined[row, head, block]) if 0 <= block < self.max_blocks else -1.0
                threshold = self.shape.selection.mass_threshold or edge
                if min(abs(mass - edge), abs(mass - threshold)) > NEAR * max(edge, threshold):
                    raise self._error("select", f"V block {block} of KV head {head}")
        covered = self.lengths[:, None] > 0
        if not _close(
            selected.mass.where(covered, 1.0), chosen.mass.where(covered, 1.0), 10 * NEAR
        ):
            raise self._error("select", "the covered mass")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _error(self, stage: str, what: str) -> KernelError:
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else str(self.device)
        return KernelError(
            f"KCache: on {name} the kernel of the step '{stage}' does not do what it should "
            f"({what}), with {self.shape}. Answers would be wrong, so the engine does not start. "
            f"Please report this; other settings of kcache_config may do, and {SWITCH}=0 skips "
            "the check."
        )


def _on_host(selected: Selected) -> Selected:
    lse = None if selected.lse is None else selected.lse.cpu()
    return Selected(selected.blocks.cpu(), selected.counts.cpu(), selected.mass.cpu(), lse)


def _close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


def _most(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).abs().max())

# SPDX-License-Identifier: Apache-2.0
"""Before an engine serves: do the kernels on this GPU do what their definition says?

A compiler or a driver that nobody has tried may get a kernel wrong, and a wrong answer looks like
any other. So a worker decodes a small batch of its model's shape through its kernels, stage by
stage against `reference/`, and does not start where they differ. The same kernels are compiled that
the model will run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from vllm_kcache.cache.formats import SCALE_BYTES, CacheShape, code_bytes
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import attend
from vllm_kcache.kernels.attend_plan import RowsConfig, on_tensor_cores, rows_config
from vllm_kcache.kernels.decode import LEAST_FOLLOWERS, MOST_FOLLOWERS, decode_step
from vllm_kcache.kernels.rows import write_rows
from vllm_kcache.kernels.select import own_lists, packed_view
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace, Followers, front
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.reference.attend import attend_blocks, attend_rows
from vllm_kcache.reference.codes import read_codes, transform_query
from vllm_kcache.reference.fetch import fetch_blocks, fetch_rows
from vllm_kcache.reference.score import score_blocks, score_transformed
from vllm_kcache.reference.select import request_lse, select_blocks
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.reference.write import write_codes_and_rows
from vllm_kcache.types import KStats, Selected, Selection, Tail

# The environment switch that leaves the check out.
SWITCH = "VLLM_KCACHE_SELF_CHECK"
# Of results of order 1, accumulated in float32 and rounded once.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SCORE_TOLERANCE = 1e-3
# Two masses so close, relative to one another, may change places.
NEAR = 1e-3
# Share of codes that may be off by one: values that lie in the middle of two steps.
MOST_TIES = 0.01
# One token; enough that blocks are left out, the last of them not full; a padded row.
REQUEST_TOKENS = (1, 397, 0)
# With drafts: a block of any size is begun by one token and gone on with by another of a step. Of
# more tokens no more than these are looked at.
DRAFTED_TOKENS, MOST_DECODE_TOKENS = (1, 386, 0), 15
# Sharpens random scores, so that a selection leaves something out.
SHARPNESS = 3.0


class KernelError(RuntimeError):
    """A kernel and its definition differ; the message names the stage."""


def is_wanted() -> bool:
    """Whether the check is to run: unless the environment says 0.

    Raises:
        ValueError: neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}={switch}: must be 0 or 1")
    return switch == "1"


def check_kernels(
    shape: CacheShape,
    selection: Selection,
    tail: Tail,
    device: torch.device | str,
    decode_tokens: int = 1,
    *,
    has_sinks: bool = False,
    soft_cap: float | None = None,
) -> None:
    """Write, score, select, fetch and attend a small batch, as the steps of a decode would.

    Each step runs as the engine's do: launches depend on one another where the GPU knows that,
    behind a write of the newest tokens and behind other work, with and without followers, of which
    more and then fewer work; on a GPU also replayed from a graph.

    Args:
        shape, selection, tail: those of the model's layers.
        device: the GPU.
        decode_tokens: most tokens of a request in a step: with drafts, each is a row of the batch.
            Batches without any are checked, too.
        has_sinks: layers have learned sinks.
        soft_cap: bound of their scaled scores.
    Raises:
        KernelError: a result is not that of the reference.
    """
    kind = _Check if shape.k_bits == 16 else _CodeCheck
    # A batch in which no request has a draft takes the kernels of rows that are each a request.
    for tokens in sorted({1, decode_tokens}):
        _check_steps(
            kind(shape, selection, tail, torch.device(device), tokens, has_sinks, soft_cap)
        )


def _check_steps(check: _Check) -> None:
    check.write_all()
    processors, shape = check.workspace.multiprocessors, check.shape
    most = min(MOST_FOLLOWERS, processors // 2) if processors else 2
    layouts = [None, Followers(most, min(LEAST_FOLLOWERS, most))]
    has_followers = shape.k_bits == 16 and check.batch_there.scored_together(shape.group) == 1
    for followers in layouts if has_followers else layouts[:1]:
        for after_write in (False, True):
            # All is missing, then all is there, then all is missing again: demand falls and rises.
            for flush in (True, False, True):
                check.step(followers, after_write, flush)
        if check.device.type == "cuda":
            check.replay(followers)


class _Check:
    """A few requests in pages of random order, on the device and as the reference takes them."""

    def __init__(
        self,
        shape: CacheShape,
        selection: Selection,
        tail: Tail,
        device: torch.device,
        decode_tokens: int,
        has_sinks: bool,
        soft_cap: float | None,
    ) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator).to(shape.dtype)

        tokens = shape.page_tokens
        requests = REQUEST_TOKENS if decode_tokens == 1 else DRAFTED_TOKENS
        new_tokens = min(decode_tokens, MOST_DECODE_TOKENS)
        pages_of = [-(-length // tokens) for length in requests]
        num_pages = sum(pages_of) + 1
        order = torch.randperm(num_pages, generator=generator).int()
        tables, lengths, newest, spans, first = [], [], [], [], 0
        for length, count in zip(requests, pages_of, strict=True):
            row = torch.zeros(max(pages_of), dtype=torch.int32)
            row[:count] = order[first : first + count]
            first += count
            before = max(length - new_tokens, 0) + 1
            for seen in range(before, length + 1) if length else (0,):
                spans.append((seen - before, length - seen) if length else (0, 0))
                tables.append(row)
                lengths.append(seen)
                last = seen - 1
                page = int(row[last // tokens])
                newest.append(page * tokens + last % tokens if seen else -1)
        table = torch.stack(tables)
        pool = (num_pages, shape.num_kv_heads, tokens, shape.head_size)
        self.k_pages, self.v_pages = random(*pool), random(*pool)
        # The token of each row; -1 for the padded one.
        self.newest = torch.tensor(newest)
        query = SHARPNESS * random(len(lengths), shape.num_query_heads, shape.head_size)
        max_blocks = shape.score_columns(max(pages_of) * tokens)
        sinks = random(shape.num_query_heads) if has_sinks else None
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        scale = shape.head_size**-0.5
        self.batch = DecodeBatch(
            query, table, seq_lens, scale, max_blocks, sinks=sinks, soft_cap=soft_cap
        )  # fmt: skip
        self.batch_there = DecodeBatch(
            query.to(device), table.to(device), seq_lens.to(device), scale, max_blocks,
            torch.tensor(spans, dtype=torch.int32, device=device), new_tokens,
            None if sinks is None else sinks.to(device), soft_cap,
        )  # fmt: skip
        rows = num_pages * shape.rows_per_page
        pinned = device.type == "cuda"
        host_rows = torch.full((rows, shape.row.bytes), 255, dtype=torch.uint8, pin_memory=pinned)
        # Claiming samples the slots: with as many again, every row finds one.
        cache = HotCache.make(2 * rows, 1, rows, shape.row.bytes, device)
        pages, stats = self._empty_pages(generator)
        view = LayerView(
            0, shape, selection, tail, pages, host_rows, hot_cache=cache, k_stats=stats
        )
        self.view = replace(view, packed=packed_view(view))
        self.workspace = DecodeWorkspace.make(
            shape, selection, len(lengths), max_blocks, device, new_tokens
        )
        self.out = torch.empty_like(query, device=device)

    def _empty_pages(self, generator: torch.Generator) -> tuple[torch.Tensor, KStats | None]:
        """K pages to write to, poisoned, and the constants of their codes."""
        return torch.full_like(self.k_pages, torch.nan, device=self.device), None

    def write_all(self) -> None:
        """Every token of every page goes through the kernel."""
        key, value = self._tokens()
        self._write(key, value, torch.arange(key.shape[0], device=self.device))
        self._check_written()

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, **how: Any
    ) -> None:
        write_kv(self.view, key, value, slots, **how)

    def step(self, followers: Followers | None, after_write: bool, flush: bool) -> None:
        """Raise KernelError unless a step of this layout is the reference's."""
        assert self.view.hot_cache is not None
        if flush:
            self.view.hot_cache.flush()
            self.view.hot_cache.slots.fill_(255)
        self._poison()
        self._run(followers, after_write)
        self._compare()

    def replay(self, followers: Followers | None) -> None:
        """The same from a graph, replayed once."""
        # The kernels are compiled by now, and capturing allocates nothing of theirs.
        self._poison()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(followers, after_write=True)
        graph.replay()
        self._compare()

    def _run(self, followers: Followers | None, after_write: bool) -> None:
        """As a layer does: write the newest tokens, then decode."""
        key, value = self._new
        self._write(
            key, value, self._places, allocate_tokens=key.shape[0],
            dependent=self.workspace.dependent,
        )  # fmt: skip
        decode_step(
            self.view, self.workspace, self.batch_there, self.out, after_write=after_write,
            followers=followers,
        )  # fmt: skip

    def _poison(self) -> None:
        """NaN where the newest tokens go, and in the output; their K and V made ready."""
        tokens = self.shape.page_tokens
        for place in self.newest[self.newest >= 0].tolist():
            self._poison_token(place // tokens, place % tokens)
        self.out.fill_(torch.nan)
        key, value = self._tokens()
        rows = self.newest.clamp_min(0).to(self.device)
        self._new = key[rows], value[rows]
        self._places = self.newest.to(self.device)
        self._wait()

    def _poison_token(self, page: int, offset: int) -> None:
        for pages in (self.view.k_pages, self.view.v_pages):
            pages[page, :, offset] = torch.nan

    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all slots, [M * S, Hkv, D], on the device."""
        flat = [pages.permute(0, 2, 1, 3).flatten(0, 1) for pages in (self.k_pages, self.v_pages)]
        key, value = (tokens.contiguous().to(self.device) for tokens in flat)
        return key, value

    def _check_written(self) -> None:
        self._wait()
        for name, there, expected in (
            ("K", self.view.k_pages.cpu(), self.k_pages),
            ("V", self.view.v_pages, self.v_pages),
        ):
            if not torch.equal(there, expected):
                raise self._error("write", name)

    def _compare(self) -> None:
        """Each stage against the reference on the results of the stage before."""
        self._check_written()
        view, batch, shape, tokens = self.view, self.batch, self.shape, self.shape.block_tokens
        lists = self.workspace.views(view, self.batch_there)
        block_lse, out, spans = lists.block_lse.cpu(), self.out, self.batch_there.spans
        assert spans is not None
        together = self.batch_there.listed_together(shape)
        selected = own_lists(_on_host(lists.selected), spans.cpu(), together)
        expected = self._scores()
        exists = expected.isfinite()
        if not _close(block_lse[exists], expected[exists], SCORE_TOLERANCE):
            raise self._error("score", f"off by {_most(block_lse[exists], expected[exists]):.2g}")
        block_lse = block_lse.masked_fill(~exists, -torch.inf)
        chosen = select_blocks(
            block_lse, batch.seq_lens, shape.num_kv_heads, tokens, view.selection,
            estimated=shape.k_bits == 4,
        )  # fmt: skip
        self._compare_lists(block_lse, selected, chosen)
        # Past its count a list of the kernels holds anything.
        listed = torch.arange(selected.blocks.shape[2]) < selected.counts[..., None]
        selected = replace(selected, blocks=selected.blocks.masked_fill(~listed, -1))
        expected, known_lse = self._attended(selected, block_lse)
        if batch.sinks is not None:
            lse = request_lse(known_lse, batch.seq_lens, tokens)
            share = share_of_tokens(lse, batch.sinks)
            expected = (expected * share[..., None]).to(expected.dtype)
        if not _close(out.cpu(), expected, TOLERANCES[shape.dtype]):
            raise self._error("fetch or attend", f"off by {_most(out.cpu(), expected):.2g}")
        if on_tensor_cores(shape):
            # Lists of a check are short: again, so that each has several thread blocks.
            config = RowsConfig(splits=4, least_tiles=1)
            if together > 1:
                num_lists, columns = lists.rows.shape[:2].numel(), lists.rows.shape[2]
                usual = rows_config(shape, num_lists, columns, num_lists, together)
                config = replace(usual, least_tiles=1)
            out.fill_(torch.nan)
            attend.attend_blocks(
                view, self.batch_there, lists.selected, lists.rows, self.workspace, out,
                config=config,
            )  # fmt: skip
            if not _close(out.cpu(), expected, TOLERANCES[shape.dtype]):
                raise self._error("attend", f"off by {_most(out.cpu(), expected):.2g}")
        if bool(self.workspace.signals.any()):
            raise self._error("select", "signals of this step are left for the next")

    def _scores(self) -> torch.Tensor:
        """block_lse of the definition, over the pages as they were written."""
        batch = self.batch
        paged = (batch.block_table, batch.seq_lens, batch.scale, self.shape.block_tokens)
        return score_blocks(
            batch.query, self.k_pages, *paged, batch.max_blocks, soft_cap=batch.soft_cap
        )

    def _attended(
        self, selected: Selected, block_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of the definition over these lists, and what is known of each V block then."""
        batch, view, tokens = self.batch, self.view, self.shape.block_tokens
        fetched = fetch_blocks(selected, batch.block_table, self.v_pages, tokens)
        out = attend_blocks(
            batch.query, self.k_pages, self.v_pages, fetched, selected, batch.block_table,
            batch.seq_lens, batch.scale, tokens, view.tail,
            clip=view.selection.clips(batch.seq_lens), soft_cap=batch.soft_cap,
        )  # fmt: skip
        return out, block_lse

    def _compare_lists(self, block_lse: torch.Tensor, selected: Selected, chosen: Selected) -> None:
        """The same blocks, but for those whose masses are as good as equal to the least kept."""
        masses = (block_lse - block_lse.logsumexp(-1, keepdim=True)).exp().nan_to_num()
        by_group = masses.unflatten(1, (self.shape.num_kv_heads, -1))
        mean = self.view.selection.combine == "sum"
        shares = self.view.selection.threshold_share(self.batch.seq_lens).tolist()
        combined = by_group.mean(2) if mean else by_group.amax(2)
        for row, head in torch.cartesian_prod(*map(torch.arange, selected.counts.shape)).tolist():
            ours = set(selected.blocks[row, head, : selected.counts[row, head]].tolist())
            theirs = set(chosen.blocks[row, head, : chosen.counts[row, head]].tolist())
            edge = min((float(combined[row, head, block]) for block in ours & theirs), default=0.0)
            for block in ours ^ theirs:
                mass = (
                    float(combined[row, head, block])
                    if 0 <= block < self.batch.max_blocks
                    else -1.0
                )
                threshold = (self.view.selection.mass_threshold or edge) * shares[row]
                if min(abs(mass - edge), abs(mass - threshold)) > NEAR * max(edge, threshold):
                    raise self._error("select", f"V block {block} of KV head {head}")
        covered = self.batch.seq_lens[:, None] > 0
        if (
            selected.dropped is not None
            and chosen.dropped is not None
            and not _close(
                selected.dropped.where(covered, 0.0), chosen.dropped.where(covered, 0.0), 10 * NEAR
            )
        ):
            raise self._error("select", "the dropped mass")
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
            f"({what}), with {self.shape} and {self.view.selection}. Answers would be wrong, so "
            "the engine does not start. Please report this; other settings of kcache_config may "
            f"do, and {SWITCH}=0 skips "
            "the check."
        )


class _CodeCheck(_Check):
    """The same with K codes in the pages, and K beside V in the rows."""

    def _empty_pages(self, generator: torch.Generator) -> tuple[torch.Tensor, KStats | None]:
        shape, heads = self.shape, (self.shape.num_kv_heads, self.shape.head_size)
        self.stats = KStats(
            torch.randn(heads, generator=generator), torch.rand(heads, generator=generator) + 0.5
        )
        stats = KStats(self.stats.mean.to(self.device), self.stats.deviation.to(self.device))
        page = (*self.k_pages.shape[:3], code_bytes(shape.head_size))
        self.expected_pages = torch.full(page, 255, dtype=torch.uint8)
        rows = self.k_pages.shape[0] * shape.rows_per_page
        self.expected_rows = torch.full((rows, shape.row.bytes), 255, dtype=torch.uint8)
        key, value = (x.cpu() for x in self._tokens())
        write_codes_and_rows(
            key, value, torch.arange(key.shape[0]), self.expected_pages.flatten(2),
            self.expected_rows, shape.row, self.stats,
        )  # fmt: skip
        return torch.full_like(self.expected_pages, 255, device=self.device), stats

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, **how: Any
    ) -> None:
        write_rows(self.view, key, value, slots, **how)

    def _poison_token(self, page: int, offset: int) -> None:
        shape, row = self.shape, self.shape.row
        codes = self.view.code_pages[page]
        width = code_bytes(shape.head_size) - SCALE_BYTES
        codes[:, offset * width : (offset + 1) * width] = 255
        scales = shape.page_tokens * width + offset * SCALE_BYTES
        codes[:, scales : scales + SCALE_BYTES] = 255
        per_page = shape.page_tokens // shape.block_tokens
        block, at = divmod(offset, shape.block_tokens)
        for head in range(shape.num_kv_heads):
            place = (page * shape.num_kv_heads + head) * per_page + block
            rows = self.view.host_rows[place : place + 1]
            poison = -1 if row.host_dtype == "int8" else torch.nan
            for part in (row.keys(rows), row.values(rows)):
                part[:, at] = poison

    def _check_written(self) -> None:
        """Alike but for values within rounding of the middle of two steps."""
        self._wait()
        head_size, row = self.shape.head_size, self.shape.row
        pages = [pages.cpu().flatten(2) for pages in (self.view.k_pages, self.expected_pages)]
        ours, expected = (read_codes(page, head_size) for page in pages)
        # A code that is off by one moves a value by a fifteenth of its head's span.
        off = (ours - expected).abs()
        if not bool((off <= 0.07 * _span(expected)).all()) or float(off.count_nonzero()) > (
            MOST_TIES * off.numel()
        ):
            raise self._error("write", "codes of K")
        rows = (self.view.host_rows, self.expected_rows)
        for name, part in (("K", row.keys), ("V", row.values)):
            there, wanted = (part(x).float() for x in rows)
            if row.host_dtype == "model" and not torch.equal(there, wanted):
                raise self._error("write", name)
            if not bool(((there - wanted).abs() <= 1).all()):
                raise self._error("write", name)
        if row.host_dtype == "int8":
            for there, wanted in zip(*(row.scales(x) for x in rows), strict=True):
                if not _close(there, wanted, NEAR):
                    raise self._error("write", "scales of a row")

    def _scores(self) -> torch.Tensor:
        """Of the kernel's own q', once that is the definition's: of two whose last bits differ,
        rounding may take a value to one of two steps."""
        batch = self.batch
        expected, bias = transform_query(batch.query, self.stats)
        exists = batch.seq_lens > 0
        ours = front(self.workspace.code_query, *expected.shape).cpu()
        if not _close(ours[exists], expected[exists], TOLERANCES[torch.float32]):
            raise self._error("score", f"q' off by {_most(ours[exists], expected[exists]):.2g}")
        return score_transformed(
            ours, bias, self.view.code_pages.cpu(), batch.block_table, batch.seq_lens,
            batch.scale, self.shape.block_tokens, batch.max_blocks, soft_cap=batch.soft_cap,
        )  # fmt: skip

    def _attended(
        self, selected: Selected, block_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, view, shape = self.batch, self.view, self.shape
        per_page = shape.page_tokens // shape.block_tokens
        fetched = fetch_rows(
            selected, batch.block_table, view.host_rows, shape.num_kv_heads, per_page
        )
        refined = torch.zeros((*batch.query.shape[:2], selected.blocks.shape[2]))
        out = attend_rows(
            batch.query, view.host_rows, shape.row, self.stats, fetched, selected, batch.seq_lens,
            batch.scale, view.tail, clip=view.selection.clips(batch.seq_lens), refined=refined,
            soft_cap=batch.soft_cap,
        )  # fmt: skip
        return out, refine_lse(block_lse, refined, selected)


def _span(values: torch.Tensor) -> torch.Tensor:
    return (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)).clamp_min(1e-6)


def _on_host(selected: Selected) -> Selected:
    lse, dropped = (
        None if part is None else part.cpu() for part in (selected.lse, selected.dropped)
    )
    return Selected(selected.blocks.cpu(), selected.counts.cpu(), selected.mass.cpu(), lse, dropped)


def _close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


def _most(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).abs().max())

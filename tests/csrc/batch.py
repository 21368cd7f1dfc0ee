# SPDX-License-Identifier: Apache-2.0
"""Batches of random scores and rows for csrc/, and what their lists must be. Outputs are poisoned
until a call has written them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.conftest import assert_close
from tests.reference import brute_force
from vllm_kcache.cache.hot_cache import ENDED, EXISTING, MISSED, HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.select import Lists
from vllm_kcache.reference import select
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.types import Selected, Selection

POISON = -99
ROW_BYTES = 48
# Of masses, which are computed in float32.
NEAR = 2e-6

DEFAULT = Selection(None, None, 1, 9, "max", 0.004)
EVERYTHING = Selection(None, None, 1, 8, "max")
RULES = (
    DEFAULT,
    EVERYTHING,
    Selection(None, None, 1, 8, "sum"),
    Selection(None, None, 0, 9, "sum", 0.01),
    Selection(25, None, 1, 9, "max", 0.004),
    Selection(30, None, 1, 3, "sum"),
    # Of a hundred tokens, and less for each that is longer.
    Selection(None, None, 1, 9, "max", 0.05, 100),
    Selection(25, None, 1, 9, "sum", 0.02, 100),
    Selection(None, 0.9, 1, 3, "sum"),
    Selection(None, 0.8, 0, 9, "max"),
    Selection(40, 0.95, 2, 3, "max"),
    # What is forced covers more than is asked for.
    Selection(None, 0.05, 2, 40, "sum"),
)


def layer_view(
    host_rows: torch.Tensor,
    hot_cache: HotCache,
    layer: int,
    num_kv_heads: int,
    group: int,
    page_tokens: int,
    block_tokens: int,
    selection: Selection,
) -> torch.Tensor:
    """`kcache::layer_view` of any rows of bytes, as `select.packed_view` makes it of a model's."""
    extension.load()
    cache = hot_cache
    tensors = (cache.slots, cache.table, cache.slot_word, cache.state, cache.counters)
    rule = (selection.top_n, selection.coverage, selection.mass_threshold)
    return torch.ops.kcache.layer_view(
        host_rows, *tensors, layer, num_kv_heads, group, page_tokens, block_tokens,
        *(-1 if part is None else part for part in rule), selection.threshold_length or 0,
        selection.sink_blocks,
        selection.recent_tokens, selection.combine == "max",
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a batch: tokens of each request, KV heads, query heads of each, T, pages of four V blocks,
    V blocks of a chunk, and columns of scores past the longest request."""

    seq_lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    tokens: int = 8
    chunk: int = 16
    spare: int = 0

    @property
    def lengths(self) -> list[int]:
        """V blocks of each request."""
        return [-(-tokens // self.tokens) for tokens in self.seq_lens]


@dataclass
class Batch:
    """One call's tensors over a cache of two layers, of which it uses the second."""

    sizes: Sizes
    rule: Selection
    host_rows: torch.Tensor
    cache: HotCache
    view: torch.Tensor
    lists: Lists

    @classmethod
    def make(
        cls,
        sizes: Sizes,
        rule: Selection,
        num_slots: int = 1 << 14,
        kind: str = "random",
        cache: HotCache | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> Batch:
        """Random scores of a kind, and rows in pages of random order.

        Args:
            cache: of a batch of the same sizes; made if not given.
            device: "cpu" for the emulated extension.
        """
        generator = torch.Generator().manual_seed(seed)
        requests, per_page = len(sizes.seq_lens), 4
        heads = sizes.kv_heads * sizes.group
        width = max(1, *sizes.lengths) + sizes.spare
        scores = scores_of(kind, (requests, heads, width), generator)
        pages = [-(-blocks // per_page) for blocks in sizes.lengths]
        order = torch.randperm(sum(pages) + 3, generator=generator).int()
        table = torch.full((requests, max(pages) + 2), 2**30, dtype=torch.int32)
        chunks = -(-width // sizes.chunk)
        sums = torch.full((requests, heads, chunks), torch.nan)
        most = torch.full_like(sums, torch.nan)
        for row, blocks in enumerate(sizes.lengths):
            table[row, : pages[row]] = order[: pages[row]]
            order = order[pages[row] :]
            scores[row, :, blocks:] = torch.nan
            for first in range(0, blocks, sizes.chunk):
                there = scores[row, :, first : min(first + sizes.chunk, blocks)]
                sums[row, :, first // sizes.chunk] = there.double().logsumexp(-1)
                most[row, :, first // sizes.chunk] = there.amax(-1)
        rows = (sum(pages) + 3) * sizes.kv_heads * per_page
        host_rows = torch.randint(0, 256, (rows, ROW_BYTES), dtype=torch.uint8, generator=generator)
        if device != "cpu":
            host_rows = host_rows.pin_memory()
        if cache is None:
            cache = HotCache.make(num_slots, 2, rows, ROW_BYTES, device)
        columns = width if rule.top_n is None else min(rule.top_n, width)
        lists = (requests, sizes.kv_heads)
        return cls(
            sizes, rule, host_rows, cache,
            layer_view(
                host_rows, cache, 1, sizes.kv_heads, sizes.group, per_page * sizes.tokens,
                sizes.tokens, rule,
            ),
            Lists(
                torch.tensor(sizes.seq_lens, dtype=torch.int32, device=device), table.to(device),
                scores.to(device), sums.to(device), sizes.chunk,
                Selected(
                    integers(*lists, columns).to(device), integers(*lists).to(device),
                    torch.full(lists, torch.nan, device=device),
                    torch.full((requests, heads), torch.nan, device=device),
                    torch.full((requests, heads), torch.nan, device=device),
                ),
                integers(*lists, columns).to(device),
                torch.zeros(lists, dtype=torch.int32, device=device).flatten(),
                most.to(device) if sizes.chunk in (4, 8, 16, 32, 64, 128, 256) else None,
            ),
        )  # fmt: skip

    def again(self) -> Batch:
        """The same over the same cache, poisoned again, with no signal yet."""
        lists, selected = self.lists, self.lists.selected
        fresh = Lists(
            lists.seq_lens, lists.block_table, lists.block_lse, lists.chunk_lse, lists.chunk_blocks,
            Selected(
                torch.full_like(selected.blocks, POISON), torch.full_like(selected.counts, POISON),
                torch.full_like(selected.mass, torch.nan),
                torch.full_like(selected.lse, torch.nan),  # type: ignore[arg-type]
                torch.full_like(selected.dropped, torch.nan),  # type: ignore[arg-type]
            ),
            torch.full_like(lists.rows, POISON), torch.zeros_like(lists.signals), lists.chunk_max,
        )  # fmt: skip
        return Batch(self.sizes, self.rule, self.host_rows, self.cache, self.view, fresh)

    def parts(self, splits: int) -> torch.Tensor:
        """[B * Hkv] programs of the score kernel that each list has."""
        parts = [min(splits, -(-blocks // self.sizes.chunk)) for blocks in self.sizes.lengths]
        device = self.lists.signals.device
        one = torch.tensor(parts, dtype=torch.int32, device=device)
        return one.repeat_interleave(self.sizes.kv_heads)

    def on_host(self) -> tuple[Lists, Selected]:
        """The call's tensors, and its lists, on the CPU."""

        def moved(record: Lists | Selected) -> dict[str, torch.Tensor]:
            tensors = {name: getattr(record, name) for name in record.__dataclass_fields__}
            return {
                name: tensor.cpu()
                for name, tensor in tensors.items()
                if isinstance(tensor, torch.Tensor)
            }

        selected = Selected(**moved(self.lists.selected))
        return replace(self.lists, **moved(self.lists), selected=selected), selected

    def expected(self) -> Selected:
        """Lists of the definition."""
        lists, _ = self.on_host()
        lse = lists.block_lse.nan_to_num(nan=-torch.inf)
        return select.select_blocks(
            lse, lists.seq_lens, self.sizes.kv_heads, self.sizes.tokens, self.rule
        )

    def check_equal(self) -> None:
        """The lists are those of the definition, block for block."""
        expected, (_, selected) = self.expected(), self.on_host()
        assert torch.equal(selected.counts, expected.counts)
        width = expected.blocks.shape[2]
        listed = torch.arange(width) < expected.counts[..., None]
        assert torch.equal(selected.blocks[..., :width][listed], expected.blocks[listed])

    def check_lists(self) -> None:
        """The lists keep the rule, whichever of two blocks of nearly equal mass is in them."""
        sizes, (lists, selected) = self.sizes, self.on_host()
        assert selected.lse is not None
        assert selected.dropped is not None
        for row, seq_len in enumerate(sizes.seq_lens):
            num_blocks = sizes.lengths[row]
            lse = lists.block_lse[row, :, :num_blocks].double()
            if num_blocks:
                assert_close(selected.lse[row], lse.logsumexp(-1).float())
            for head in range(sizes.kv_heads):
                count = int(selected.counts[row, head])
                self._check_list(
                    lse.unflatten(0, (sizes.kv_heads, -1))[head],
                    selected.blocks[row, head, :count].tolist(),
                    float(selected.mass[row, head]),
                    selected.dropped.unflatten(1, (sizes.kv_heads, -1))[row, head],
                    seq_len,
                )

    def _check_list(
        self,
        lse: torch.Tensor,
        kept: list[int],
        mass: float,
        dropped: torch.Tensor,
        seq_len: int,
    ) -> None:
        rule, num_blocks = self.rule, lse.shape[1]
        assert kept == sorted(set(kept))
        if not seq_len:
            assert (kept, mass) == ([], 1.0)
            return
        assert kept[0] >= 0
        assert kept[-1] < num_blocks
        masses = lse.softmax(-1)
        forced = brute_force.forced(seq_len, self.sizes.tokens, rule)
        cap = num_blocks if rule.top_n is None else min(rule.top_n, num_blocks)
        assert forced <= set(kept) or len(kept) == cap
        assert len(kept) <= cap
        combined = masses.mean(0) if rule.combine == "sum" else masses.amax(0)
        covered = brute_force.covered_mass(masses, kept, rule.combine)
        assert abs(mass - covered) < 1e-5
        expected = 1 - masses[:, kept].sum(-1)
        assert bool((dropped >= 0).all())
        assert bool(((dropped - expected).abs() < 1e-5).all())
        assert len(kept) < num_blocks or not dropped.any()
        others = torch.ones(num_blocks, dtype=torch.bool)
        others[kept] = False
        ranked = [block for block in kept if block not in forced]
        lightest = float(combined[ranked].min()) if ranked else 1.0
        heaviest_other = float(combined[others].max()) if others.any() else 0.0
        assert lightest >= heaviest_other - NEAR or not ranked
        if rule.mass_threshold is not None:
            threshold = brute_force.threshold(rule, seq_len)
            assert lightest >= threshold - NEAR
            assert heaviest_other < threshold + NEAR or len(kept) == cap
        elif rule.coverage is None:
            assert len(kept) == cap
        else:
            # Of the masses kept and of all, each is rounded to 2^-30, which equal masses are alike.
            near = NEAR + (len(kept) + num_blocks) * 2**-31
            assert covered >= rule.coverage - near or len(kept) == cap
            if ranked:
                last = min(ranked, key=lambda block: (float(combined[block]), -block))
                fewer = [block for block in kept if block != last]
                less = brute_force.covered_mass(masses, fewer, rule.combine)
                assert less < rule.coverage + near

    def check_rows(self) -> None:
        """Every listed block is where its row says, with its bytes."""
        lists, selected = self.on_host()
        blocks = selected.blocks
        listed = torch.arange(blocks.shape[2]) < selected.counts[..., None]
        physical = physical_v_blocks(
            blocks.where(listed, -1), lists.block_table, self.sizes.kv_heads, 4
        )
        rows, physical = lists.rows[listed].long(), physical[listed]
        there = rows >= 0
        assert torch.equal(rows[~there], -2 - physical[~there])
        assert torch.equal(self.cache.slots.cpu()[rows[there]], self.host_rows[physical[there]])

    def check_step(self) -> None:
        """All of it after `select_and_fetch`, which leaves everything ready for the next step."""
        self.check_lists()
        self.check_rows()
        assert (self.lists.signals == 0).all()
        assert self.cache.state[[ENDED, MISSED, EXISTING]].tolist() == [0, 0, 0]


def integers(*shape: int) -> torch.Tensor:
    """Poisoned."""
    return torch.full(shape, POISON, dtype=torch.int32)


def scores_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Log-sum-exp of V blocks, with many equal masses but for the kind "random"."""
    scores = 3 * torch.randn(shape, generator=generator)
    if kind == "equal":
        return torch.zeros(shape)
    if kind == "ties":
        return scores.round()
    if kind == "one has all":
        scores[..., shape[-1] // 3] = 1e4
    if kind == "tiny":
        scores *= 10
    return scores

# SPDX-License-Identifier: Apache-2.0
"""Requests that come, grow, share prefixes and go over a small page pool, with a tiny hot cache.

`python -m tests.kernels.simulation` runs it on the CPU, under TRITON_INTERPRET=1. After every step
the result must be that of the reference over the same selection, whose V comes from the host pool.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch

from tests.conftest import TOLERANCES
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import CacheCounters, HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace, Followers
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.types import Selected, Selection

PAGES, HEADS, GROUP, HEAD_SIZE, PAGE_TOKENS, BLOCK_TOKENS = 20, 2, 2, 64, 16, 8
LAYERS, MAX_REQUESTS, MAX_BLOCKS = 2, 4, 12
SELECTION = Selection(5, None, 1, 8, "sum")
SHAPE = CacheShape(
    LAYERS, HEADS * GROUP, HEADS, HEAD_SIZE, PAGE_TOKENS, BLOCK_TOKENS, torch.float32
)


@dataclass
class Request:
    pages: list[int]
    length: int


@dataclass
class Simulation:
    """The page pool and everything that is in it.

    Args:
        device: "cpu" (Triton's interpreter) or "cuda".
        num_slots: of the hot cache; fewer than one step selects forces reads from the host.
        write_update: False takes out what keeps copies fresh.
        followers: Lists are selected and fetched beside scoring.
    """

    device: str
    num_slots: int
    write_update: bool = True
    followers: Followers | None = None
    seed: int = 0
    requests: list[Request] = field(default_factory=list)
    wrong_steps: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        torch.manual_seed(self.seed)
        shape = (LAYERS, PAGES, HEADS, PAGE_TOKENS, HEAD_SIZE)
        self.k_pages = torch.full(shape, torch.nan, device=self.device)
        self.v_pool = torch.full(shape, torch.nan)
        if self.device != "cpu":
            self.v_pool = self.v_pool.pin_memory()
        rows = PAGES * SHAPE.rows_per_page
        self.cache = HotCache.make(self.num_slots, LAYERS, rows, SHAPE.row.bytes, self.device)
        self.views = []
        for layer in range(LAYERS):
            host_rows = self.v_pool[layer].view(rows, -1).view(torch.uint8)
            view = LayerView(
                layer, SHAPE, SELECTION, "renormalize", self.k_pages[layer], host_rows, self.cache
            )
            self.views.append(replace(view, packed=packed_view(view)))
        self.workspace = DecodeWorkspace.make(
            SHAPE, SELECTION, MAX_REQUESTS, MAX_BLOCKS, self.device
        )
        self.free = list(range(PAGES))

    def run(self, rounds: int) -> CacheCounters:
        for _ in range(rounds):
            event = self.random.random()
            if event < 0.35 or not self.requests:
                self.start()
            elif event < 0.5:
                self.finish()
            self.grow()
        return self.cache.read_counters()

    def start(self) -> None:
        """A prompt, sometimes behind the whole pages of another request."""
        if len(self.requests) == MAX_REQUESTS:
            return
        shared: list[int] = []
        if self.requests and self.random.random() < 0.4:
            other = self.random.choice(self.requests)
            shared = other.pages[: other.length // PAGE_TOKENS]
        length = self.random.randint(1, 40)
        needed = -(-length // PAGE_TOKENS)
        if len(self.free) < needed or len(shared) + needed > MAX_BLOCKS // 2 - 1:
            return
        pages = shared + [self.take_page() for _ in range(needed)]
        start = len(shared) * PAGE_TOKENS
        self.requests.append(Request(pages, start + length))
        slots = [self.slot(pages, position) for position in range(start, start + length)]
        for layer in range(LAYERS):
            key, value, places = self.tokens(slots)
            # As in a prefill: K and slots with the computation, V to the host on its own.
            self.write(key, value, places, layer, WriteParts.K | WriteParts.ROW_SLOT, 0)
            self.write(key, value, places, layer, WriteParts.ROW_HOST, 0)

    def finish(self) -> None:
        """Pages that no other request holds are free, and are taken again soon."""
        gone = self.requests.pop(self.random.randrange(len(self.requests)))
        held = {page for request in self.requests for page in request.pages}
        self.free += [page for page in gone.pages if page not in held]

    def grow(self) -> None:
        """One decode step of every request that has room."""
        for request in list(self.requests):
            if request.length % PAGE_TOKENS == 0:
                if not self.free or len(request.pages) == MAX_BLOCKS // 2:
                    self.requests.remove(request)
                    held = {page for other in self.requests for page in other.pages}
                    self.free += [page for page in request.pages if page not in held]
                    continue
                request.pages.append(self.take_page())
            request.length += 1
        if not self.requests:
            return
        slots = [self.slot(request.pages, request.length - 1) for request in self.requests]
        for layer in range(LAYERS):
            key, value, places = self.tokens(slots)
            self.write(key, value, places, layer, WriteParts.ALL, len(slots))
            self.step(layer)

    def step(self, layer: int) -> None:
        """Decode and compare; a padded row comes last."""
        rows = len(self.requests) + (len(self.requests) < MAX_REQUESTS)
        table = torch.full((rows, MAX_BLOCKS // 2), 2**30, dtype=torch.int32)
        lengths = torch.zeros(rows, dtype=torch.int32)
        for row, request in enumerate(self.requests):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
            lengths[row] = request.length
        query = 2 * torch.randn(rows, HEADS * GROUP, HEAD_SIZE)
        out = torch.full(query.shape, torch.nan, device=self.device)
        batch = DecodeBatch(
            query.to(self.device), table.to(self.device), lengths.to(self.device), HEAD_SIZE**-0.5,
            MAX_BLOCKS,
        )  # fmt: skip
        decode_step(self.views[layer], self.workspace, batch, out, followers=self.followers)
        chosen = self.workspace.views(self.views[layer], batch).selected
        counts = chosen.counts.cpu()
        places = torch.arange(chosen.blocks.shape[2])
        blocks = chosen.blocks.cpu().masked_fill(places >= counts[..., None], -1)
        selected = Selected(blocks, counts, chosen.mass.cpu())
        fetched = fetch_blocks(selected, table, self.v_pool[layer], BLOCK_TOKENS)
        expected = attend_blocks(
            query, self.k_pages[layer].cpu(), self.v_pool[layer], fetched, selected, table,
            lengths, HEAD_SIZE**-0.5, BLOCK_TOKENS, "renormalize",
        )  # fmt: skip
        relative, absolute = TOLERANCES[torch.float32]
        self.wrong_steps += not torch.allclose(out.cpu(), expected, rtol=relative, atol=absolute)

    def take_page(self) -> int:
        """Any free page: the most recently freed are the likeliest to be resident still."""
        return self.free.pop(self.random.randrange(len(self.free)))

    def slot(self, pages: list[int], position: int) -> int:
        return pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS

    def tokens(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key, value = torch.randn(2, len(slots), HEADS, HEAD_SIZE, device=self.device)
        return key, value, torch.tensor(slots, device=self.device)

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        layer: int,
        parts: WriteParts,
        allocate_tokens: int,
    ) -> None:
        if not self.write_update:
            parts &= ~WriteParts.ROW_SLOT
        write_kv(self.views[layer], key, value, slots, parts=parts, allocate_tokens=allocate_tokens)


def check(device: str, rounds: int, sizes: tuple[int, ...]) -> None:
    """Fresh copies with caches of several sizes; stale ones when the update is taken out."""
    one_step = MAX_REQUESTS * HEADS * 5
    for num_slots in sizes:
        simulation = Simulation(device, num_slots, seed=num_slots)
        counted = simulation.run(rounds)
        assert simulation.wrong_steps == 0, f"{num_slots} slots: {simulation.wrong_steps} steps"
        assert counted.selected == counted.hits + counted.misses + counted.direct
        assert counted.hits > 0
        assert counted.misses > 0
        if num_slots >= one_step:
            assert counted.direct == 0
        elif num_slots < one_step // 4:
            assert counted.direct > 0
    for followers in (Followers(2, 1), Followers(5, 5)):
        simulation = Simulation(device, 30, followers=followers, seed=7)
        counted = simulation.run(rounds)
        assert simulation.wrong_steps == 0, f"{followers}: {simulation.wrong_steps} steps"
        assert counted.selected == counted.hits + counted.misses + counted.direct
    blind = Simulation(device, 200, write_update=False, seed=1)
    blind.run(rounds)
    assert blind.wrong_steps > 0, "the simulation does not notice stale copies"


def main() -> None:
    """A short run; a wrong step raises."""
    check("cpu", rounds=9, sizes=(8,))
    print("every step equals the reference")


if __name__ == "__main__":
    main()

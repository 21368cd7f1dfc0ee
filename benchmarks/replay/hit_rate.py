# SPDX-License-Identifier: Apache-2.0
"""Hit rate of the hot V cache against its size and the number of requests, without an engine.

    python -m benchmarks.replay.hit_rate

Whole decode steps run over a random pool with the recorded selections of replay.py: write,
score, replay, select, look up, fetch, attend, in the shape of the recorded model, so that layers
and KV heads are played one to one. The cache holds a multiple of the mean selected set: the mean
length of a recorded list, times the lists of all requests. It starts empty; counting begins after
some steps. Slots are of 8 tokens, as recorded; their bytes do not matter here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.common import DTYPE, PAGE_TOKENS
from benchmarks.replay.record import RECORDINGS, Recording, decode_mass, selected_blocks, statistics
from benchmarks.replay.replay import Replay
from benchmarks.rows import RESULTS, append, command, origin
from vllm_kcache.cache import HostPool
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import CacheCounters, HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.workspace import DecodeBatch
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.types import Selection, Tail

HEAD_SIZE = 64
MULTIPLES = (1.0, 1.5, 2.0, 4.0)
REQUESTS = (1, 8, 32)


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        warm_steps: steps before counting, on a cache that starts empty.
        steps: steps counted.
        selection: rule of selection.
    """

    warm_steps: int
    steps: int
    selection: Selection

    @property
    def tail(self) -> Tail:
        """What goes with the rule by default."""
        return "renormalize" if self.selection.mass_threshold is None else "clip"


def mean_list_blocks(recording: Recording, selection: Selection) -> float:
    """V blocks of a recorded list under a rule of selection, mean over all of them."""
    chosen = selected_blocks(
        decode_mass(recording.codes).flatten(0, 2), recording.seq_lens, selection,
        recording.v_block_tokens, recording.group,
    )  # fmt: skip
    return statistics(chosen, recording.v_block_tokens).tokens / recording.v_block_tokens


class Requests:
    """Requests as long as what was recorded, over a pool of random K and V.

    All layers read and write the same K and V: only where a block lies matters.
    """

    def __init__(
        self, recording: Recording, num_requests: int, run: Run, device: torch.device
    ) -> None:
        _, layers, heads, _, _ = recording.codes.shape
        heads //= recording.group
        # As in a model with three query heads to a KV head.
        self.shape = shape = CacheShape(
            layers, heads * 3, heads, HEAD_SIZE, PAGE_TOKENS, recording.v_block_tokens, DTYPE
        )
        self.run, self.device = run, device
        replay = Replay(recording, device)
        self.context = replay.recording.shortest_tokens
        columns = -(-(self.context + run.warm_steps + run.steps) // PAGE_TOKENS)
        pages = num_requests * columns
        self.rows = pages * shape.rows_per_page
        self.pool = HostPool(1, self.rows, shape.row.bytes, pinned=device.type == "cuda")
        self.k_pages = torch.randn((pages, heads, PAGE_TOKENS, HEAD_SIZE), device=device).to(DTYPE)
        self.block_table = torch.randperm(pages, device=device).int().view(num_requests, columns)
        self.query = torch.randn((num_requests, heads * 3, HEAD_SIZE), device=device).to(DTYPE)
        self.token = torch.randn((num_requests, heads, HEAD_SIZE), device=device).to(DTYPE)
        self.max_blocks = shape.max_blocks(columns * PAGE_TOKENS)
        self.workspace = replay.Workspace.make(
            shape, run.selection, num_requests, self.max_blocks, device
        )

    def hot_cache(self, num_slots: int) -> HotCache:
        return HotCache.make(
            num_slots, self.shape.num_layers, self.rows, self.shape.row.bytes, self.device
        )

    def count(self, cache: HotCache) -> CacheCounters:
        """Decode; what the cache counted after the warm steps."""
        views = [self.view(layer, cache) for layer in range(self.shape.num_layers)]
        lengths = torch.full_like(self.block_table[:, 0], self.context)
        for _ in range(self.run.warm_steps):
            self.step(views, lengths)
        cache.read_counters(reset=True)
        for _ in range(self.run.steps):
            self.step(views, lengths)
        return cache.read_counters()

    def view(self, layer: int, cache: HotCache) -> LayerView:
        run = self.run
        view = LayerView(
            layer, self.shape, run.selection, run.tail, self.k_pages, self.pool.layer(0), cache
        )
        return replace(view, packed=packed_view(view))

    def step(self, views: list[LayerView], lengths: torch.Tensor) -> None:
        """One token more of each request, in all layers."""
        pages = self.block_table.gather(1, (lengths // PAGE_TOKENS).long()[:, None])[:, 0]
        slots = pages.long() * PAGE_TOKENS + lengths % PAGE_TOKENS
        lengths += 1
        out = torch.empty_like(self.query)
        batch = DecodeBatch(self.query, self.block_table, lengths, HEAD_SIZE**-0.5, self.max_blocks)
        for view in views:
            write_kv(view, self.token, self.token, slots, allocate_tokens=len(slots))
            decode_step(view, self.workspace, batch, out)

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.pool.close()


def measure(
    recording: Recording,
    run: Run,
    requests: list[int],
    multiples: list[float],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows of all sizes, printed as they come."""
    _, layers, heads, _, _ = recording.codes.shape
    heads //= recording.group
    blocks = mean_list_blocks(recording, run.selection)
    rows = []
    for num_requests in requests:
        batch = Requests(recording, num_requests, run, device)
        for multiple in multiples:
            selected_set = blocks * layers * heads * num_requests
            cache = batch.hot_cache(max(1, round(multiple * selected_set)))
            counted = batch.count(cache)
            rows.append(
                {
                    "requests": num_requests,
                    "lists": layers * heads * num_requests,
                    "context": batch.context,
                    "coverage": run.selection.coverage,
                    "mass_threshold": run.selection.mass_threshold,
                    "warm_steps": run.warm_steps,
                    "steps": run.steps,
                    "multiple_of_selected_set": multiple,
                    "slots": cache.num_slots,
                    # One request plays one text, whose lists are not of the mean length.
                    "slots_over_selected": cache.num_slots * run.steps / counted.selected,
                    "selected_tokens": counted.selected / counted.lists * recording.v_block_tokens,
                    "hit_rate": counted.hits / counted.selected,
                    "direct_share": counted.direct / counted.selected,
                }
            )
            print({name: round(value, 3) for name, value in rows[-1].items() if value}, flush=True)
        batch.close()
    return rows


def main() -> None:
    """Measure and append rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=list(REQUESTS))
    parser.add_argument("--multiples", type=float, nargs="+", default=list(MULTIPLES))
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--mass-threshold", type=float, help="in place of the coverage")
    parser.add_argument("--warm-steps", type=int, default=16)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    options = parser.parse_args()
    threshold = options.mass_threshold
    selection = Selection(None, options.coverage, 1, 32, "sum")
    if threshold is not None:
        selection = Selection(None, None, 1, 32, "max", threshold)
    run = Run(options.warm_steps, options.steps, selection)
    recording = Recording.load(RECORDINGS[selection.combine])
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    rows = measure(recording, run, options.requests, options.multiples, torch.device("cuda"))
    common = {**origin("torch", "triton"), "command": command()}
    for row in rows:
        append(options.results / "hit_rate.jsonl", {"operation": "hit_rate", **common, **row})


if __name__ == "__main__":
    main()

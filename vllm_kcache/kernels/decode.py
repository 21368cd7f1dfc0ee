# SPDX-License-Identifier: Apache-2.0
"""The steps of a decode behind `write_kv`, in order: score, select and fetch, attend.

In a large batch a second kernel follows the scoring on a stream of high priority: it selects and
fetches each list as soon as it is scored. What it leaves, for whatever reason, is selected and
fetched after scoring. In a small batch there is no such kernel: there its launch costs more than
the overlap gains. The layout depends on shapes only, so all of it is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.score import score_blocks
from vllm_kcache.kernels.score_codes import score_codes
from vllm_kcache.kernels.select import Lists, follow_scores, select_and_fetch
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace, Followers, front

# Least bytes of K (some 120 us of an H100's memory bandwidth) and least lists for which followers
# pay. With fewer lists too few multiprocessors would select (docs/benchmarks.md, overlap).
FOLLOWED_BYTES = 384 << 20
FOLLOWED_LISTS = 96
# Followers: LEAST work when the last epoch missed nothing, rising to MOST when fetching takes as
# long as scoring. With fewer, long lists wait; more take multiprocessors from scoring.
MOST_FOLLOWERS = 48
LEAST_FOLLOWERS = 32


def plan_followers(
    shape: CacheShape, num_requests: int, max_blocks: int, multiprocessors: int
) -> Followers | None:
    """Followers of a batch; None where they do not pay.

    Args:
        max_blocks: P, V blocks that the longest request may have.
        multiprocessors: of the GPU.
    """
    if shape.k_bits == 4:
        # Scores from codes are there so soon that nothing is gained: 53 x 32K took 18.8 ms with
        # followers and 16.6 without (docs/benchmarks.md, K codes).
        return None
    num_lists = num_requests * shape.num_kv_heads
    k_bytes = num_lists * max_blocks * shape.block_score_bytes
    # Half of the GPU stays free of followers: scoring must have a place to run.
    most = min(MOST_FOLLOWERS, multiprocessors // 2)
    if k_bytes < FOLLOWED_BYTES or num_lists < FOLLOWED_LISTS or most < 1:
        return None
    return Followers(most, min(LEAST_FOLLOWERS, most))


def decode_step(
    view: LayerView,
    workspace: DecodeWorkspace,
    batch: DecodeBatch,
    out: torch.Tensor,
    *,
    after_write: bool = False,
    followers: Followers | None = None,
) -> torch.Tensor:
    """Score, select, fetch and attend for one query of each request; `write_kv` comes before.

    Args:
        view: The layer; this call is one epoch of its hot cache.
        workspace: buffers; the batch must fit. Its contents are those of the last step.
        out: [B, Hq, D] model dtype, GPU. Written and returned.
        after_write: the launch before this call on the stream is `write_kv`, `dependent` where the
            workspace is, as `score.score_blocks` says.
        followers: from `plan_followers`; never with K codes.

    Graph-safe: no allocation, no host sync, grids that depend on shapes only. Uses the current
    stream, and a second one that is joined before the call returns.
    """
    if batch.num_requests == 0:
        return out
    assert view.packed is not None
    if followers is not None and view.shape.k_bits == 4:
        raise ValueError("followers: scores from K codes have none (plan_followers)")
    dependent = workspace.dependent
    lists = workspace.views(view, batch)
    try:
        if followers is None:
            _score(view, batch, workspace, lists, after_write)
            selected_by = workspace.selected_by(view, batch, lists)
        else:
            selected_by = workspace.selected_by(view, batch, lists)
            with _second_stream(workspace) as beside:
                # First scoring, then what waits for it, should they run one after the other.
                splits = score_blocks(
                    view, batch, lists, signal=True, dependent=dependent, after_write=after_write
                )
                with beside:
                    follow_scores(view.packed, selected_by, splits, followers.most, followers.least)
        select_and_fetch(
            view.packed, selected_by, dependent, followers is not None, batch.spans,
            batch.listed_together(view.shape),
        )  # fmt: skip
        attend_blocks(view, batch, lists.selected, lists.rows, workspace, out, dependent=dependent)
    except BaseException:
        # What a step has begun to count must not be taken for the next one's.
        workspace.signals.zero_()
        raise
    return out


def _score(
    view: LayerView, batch: DecodeBatch, workspace: DecodeWorkspace, lists: Lists, after_write: bool
) -> None:
    """By what the pages hold: K, or codes."""
    dependent = workspace.dependent
    if view.shape.k_bits == 16:
        score_blocks(view, batch, lists, dependent=dependent, after_write=after_write)
        return
    query = front(workspace.code_query, *batch.query.shape)
    bias = front(workspace.code_bias, *batch.query.shape[:2])
    score_codes(view, batch, lists, query, bias, dependent=dependent, after_write=after_write)


@contextlib.contextmanager
def _second_stream(workspace: DecodeWorkspace) -> Iterator[contextlib.AbstractContextManager]:
    """Fork a stream from the current one at the start, and join it at the end.

    Yields the context in which launches go to it. On the CPU everything is in order.
    """
    if workspace.fetch_stream is None or workspace.begun is None or workspace.followed is None:
        yield contextlib.nullcontext()
        return
    main = torch.cuda.current_stream()
    workspace.begun.record(main)
    workspace.fetch_stream.wait_event(workspace.begun)
    yield torch.cuda.stream(workspace.fetch_stream)
    workspace.followed.record(workspace.fetch_stream)
    main.wait_event(workspace.followed)

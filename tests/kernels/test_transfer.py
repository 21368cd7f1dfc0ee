# SPDX-License-Identifier: Apache-2.0
"""V of a prefill on its way, without a GPU: what must still be there while it travels."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels import transfer

SHAPE = CacheShape(1, 2, 2, 64, 16, 8, torch.float32)


class Stream:
    """A stream, or an event, of which a test only needs that it can be had."""

    def __init__(self, *_: Any) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def wait_event(self, event: Any) -> None:
        """In order already."""

    def record(self) -> None:
        """In order already."""


def test_slots_are_kept_until_v_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's slots may be a tensor of that step alone (a batch that was put in order). Its memory
    must not be given to others while a stream of its own still reads it."""
    main = Stream()
    for name, value in (
        ("Stream", Stream), ("Event", Stream), ("current_stream", lambda: main),
        ("stream", lambda stream: contextlib.nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(transfer, "store_value", lambda *tensors: None)
    made = transfer.PrefillTransfer(SHAPE, 32, 32, torch.device("cpu"))
    slots = torch.arange(20)
    kept = weakref.ref(slots.untyped_storage())
    view: Any = SimpleNamespace(shape=SHAPE, v_pages=torch.zeros(4, 2, 16, 64))
    made.store(view, torch.zeros(20, 2, 64), torch.zeros(20, 2, 64), slots)
    del slots
    assert kept() is not None, "the caching allocator may give the slots away"
    made.fence()
    assert main.waited == [made._out]
    assert kept() is None
    made.fence()
    assert main.waited == [made._out]

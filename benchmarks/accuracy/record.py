# SPDX-License-Identifier: Apache-2.0
"""Logits processors that force the tokens of a text and keep what the model thought of them.

A request names its tokens in `SamplingParams.extra_args["accuracy"]` (see `Forced`). The processor
sees the raw logits of the whole batch on the device. Stock's are saved to a file; those of the
split cache are compared with it on the spot. Then all tokens but the text's are ruled out.

vLLM has two model runners and an interface for each: `RecordV1` is for the first, `RecordV2` for
the second. Tokens, files and arithmetic are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from benchmarks.accuracy.score import FIELDS, compare_logits

KEY = "accuracy"


@dataclass(frozen=True)
class Forced:
    """What a request must say, and where its figures go.

    Attributes:
        first_row: Row of the files for the first token.
        row_stride: From a token's row to that of the next token.
        num_rows: Rows of the files.
        prompt_tokens: Tokens of the prompt.
        tokens: What must follow.
        stock_logits: File of stock's logits, [rows, vocabulary] float32.
        positions: File of the figures, [rows, 4] float64, there already.
        save: This is stock: write the logits instead of comparing with them.
    """

    first_row: int
    row_stride: int
    num_rows: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    stock_logits: str
    positions: str
    save: bool

    @classmethod
    def of(cls, params: SamplingParams) -> Forced | None:
        """The request's own, or None for a request that is left alone."""
        given = (params.extra_args or {}).get(KEY)
        return None if given is None else cls(**{**given, "tokens": tuple(given["tokens"])})


class Recorder:
    """Forces and records the rows of a batch. Keeps the files of the last requests open."""

    def __init__(self) -> None:
        self._files: dict[str, np.memmap] = {}
        self._stock: tuple[str, torch.Tensor] | None = None

    def process(
        self, logits: torch.Tensor, rows: Sequence[int], forced: Sequence[Forced],
        steps: Sequence[int],
    ) -> None:  # fmt: skip
        """Record the rows' logits, then leave one token possible in each.

        Args:
            logits: [batch, vocabulary] float32. Changed in place.
            rows: Rows of `logits` to look at.
            forced: The request of each row.
            steps: Tokens that each request has said. One that has not finished its prompt counts
                as 0; it is recorded again, over this, when it has.
        """
        # What an asynchronous scheduler runs past a request's end is dropped by vLLM.
        kept = [i for i, f in enumerate(forced) if steps[i] < len(f.tokens)]
        if not kept:
            return
        rows, forced, steps = ([part[i] for i in kept] for part in (rows, forced, steps))
        tokens = torch.tensor([f.tokens[step] for f, step in zip(forced, steps, strict=True)])
        tokens = tokens.to(logits.device)
        picked = logits[rows]
        first = forced[0]
        shape = (first.num_rows, logits.shape[1])
        at = [f.first_row + step * f.row_stride for f, step in zip(forced, steps, strict=True)]
        if first.save:
            file = self._open(first.stock_logits, shape, np.float32, create=True)
            file[at] = picked.cpu().numpy()
            stock = picked
        else:
            saved = self._stock_logits(first.stock_logits, shape, logits.device)
            stock = saved[at].to(logits.device)
        figures = compare_logits(picked, stock, tokens)
        shape = (first.num_rows, len(FIELDS))
        self._open(first.positions, shape, np.float64)[at] = figures.cpu().numpy()
        logits[rows] = float("-inf")
        logits[rows, tokens] = 0.0

    def _stock_logits(
        self, path: str, shape: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """Stock's logits, on the device where there is room: read once for all settings."""
        if self._stock is None or self._stock[0] != path:
            self._stock = None
            saved = torch.from_numpy(self._open(path, shape, np.float32))
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                if 2 * saved.nbytes < free:
                    saved = saved.to(device)
            self._stock = path, saved
        return self._stock[1]

    def _open(
        self, path: str, shape: tuple[int, ...], dtype: Any, create: bool = False
    ) -> np.memmap:
        """The file, mapped; made when it is missing and may be."""
        if path not in self._files:
            # A new setting has a new file of figures: do not keep all of them open.
            self._files = {name: f for name, f in self._files.items() if name.endswith(".f32")}
            mode = "r+"
            if create and not os.path.exists(path):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                mode = "w+"
            self._files[path] = np.memmap(path, dtype=dtype, mode=mode, shape=shape)
        file = self._files[path]
        if file.shape != shape:
            raise ValueError(f"{path}: has shape {file.shape}, expected {shape}")
        return file


class RecordV1(ProcessorV1):
    """For the first model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.recorder = Recorder()
        # Place in the batch: what to force, and the tokens said, a list that vLLM keeps up to date.
        self.requests: dict[int, tuple[Forced, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.requests, batch_update, _state_v1)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = list(self.requests)
        forced = [self.requests[row][0] for row in rows]
        self.recorder.process(logits, rows, forced, [len(self.requests[row][1]) for row in rows])
        return logits


def _state_v1(
    params: SamplingParams, prompt: list[int] | None, said: list[int]
) -> tuple[Forced, list[int]] | None:
    forced = Forced.of(params)
    return None if forced is None else (forced, said)


class RecordV2(ProcessorV2):
    """For the second model runner."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.recorder = Recorder()
        self.requests: dict[int, Forced] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        forced = Forced.of(sampling_params)
        self.requests.pop(req_idx, None)
        if forced is not None:
            self.requests[req_idx] = forced
        return forced is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.idx_mapping_np.tolist()
        if len(slots) != logits.shape[0]:
            raise RuntimeError(
                f"{logits.shape[0]} rows of logits for {len(slots)} requests: speculative decoding "
                "is not supported here."
            )
        rows = [row for row, slot in enumerate(slots) if slot in self.requests]
        if not rows:
            return logits
        forced = [self.requests[slots[row]] for row in rows]
        positions = ctx.pos.tolist()
        # Below 0 while the prompt is unfinished: vLLM drops what is sampled then.
        steps = [
            max(positions[row] + 1 - one.prompt_tokens, 0)
            for row, one in zip(rows, forced, strict=True)
        ]
        self.recorder.process(logits, rows, forced, steps)
        return logits


def processor_for(use_v2_model_runner: bool) -> str:
    """Name to give to `LLM(logits_processors=[...])`."""
    return f"{__name__}:{'RecordV2' if use_v2_model_runner else 'RecordV1'}"

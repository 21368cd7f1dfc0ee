# SPDX-License-Identifier: Apache-2.0
"""Figures of a worker, in a small file that the API server reads.

A worker cannot reach the server's metrics registry. It adds to a fixed array in shared memory, one
file per rank, and the server reads the files of its engine when it is scraped. What the kernels of
a GPU count, the GPU writes there itself.
"""

from __future__ import annotations

import atexit
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_kcache.cache.host_memory import HostMemoryError
from vllm_kcache.cache.host_pool import page_lock
from vllm_kcache.cache.hot_cache import (
    COUNTER_NAMES,
    COUNTER_WORDS,
    DROPPED_MASS_EDGES,
    FIRST_DROPPED_BUCKET,
)

logger = init_logger(__name__)

# Upper bounds of the dropped mass, the same on CPU and GPU.
DROPPED_BOUNDS = DROPPED_MASS_EDGES

SCALARS = (
    "host_pool_blocks",
    "host_pool_bytes",
    "fetched_bytes",
    "decode_layer_steps",
    "eager_decode_steps",
    "hot_cache_hits",
    "hot_cache_misses",
    "direct_host_reads",
    "selected_lists",
    "selected_blocks",
)
_DROPPED_AT = len(SCALARS)
NUM_VALUES = _DROPPED_AT + len(DROPPED_BOUNDS)

# A file: the values, then the bytes of a V block, both float64, then the words of a GPU, int64. It
# is a whole memory page, which can be locked for the GPU to write to.
_ROW_BYTES_AT = NUM_VALUES
_WORDS_OFFSET = 8 * (NUM_VALUES + 1)
FILE_BYTES = mmap.PAGESIZE
assert _WORDS_OFFSET + 8 * COUNTER_WORDS <= FILE_BYTES


def directory() -> Path:
    """Where the files lie: shared memory where the system has it."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def instance_of(vllm_config: Any) -> str:
    """A name that all processes of one server know, and no other server has.

    That is vLLM's id of the configuration, but where several API server processes each make their
    own: then it is the folder that vLLM makes for the metrics of them all.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is not None and vllm_config.parallel_config._api_process_count > 1:
        return Path(folder).name
    return vllm_config.instance_id


def path_of(instance: str, engine: int, rank: int) -> Path:
    """File of one worker.

    Args:
        instance: From `instance_of`.
        engine: Data-parallel rank.
        rank: Rank of the worker within its engine.
    """
    return directory() / f"vllm_kcache.{instance}.{engine}.{rank}"


class Counters:
    """The array of one worker. Only the worker and its GPU write; anyone may read.

    Args:
        path: File to create; None keeps the array private to the process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        if path is None:
            self._map = mmap.mmap(-1, FILE_BYTES)
        else:
            with open(path, "w+b") as file:
                file.truncate(FILE_BYTES)
                self._map = mmap.mmap(file.fileno(), FILE_BYTES)
            atexit.register(self.close)
        self._values = np.frombuffer(self._map, dtype=np.float64, count=NUM_VALUES + 1)

    def close(self) -> None:
        """Remove the file. The array stays readable in this process."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def gpu_words(self, row_bytes: int) -> torch.Tensor:
        """The part of the file that a GPU writes, once its page is locked.

        Args:
            row_bytes: Bytes of a V block.

        Returns:
            [COUNTER_WORDS] int64, host, at the file's memory: room for `HotCache.counters`. From
            now on `read` takes the counts of selected and fetched blocks from here; by name they
            stay 0.
        """
        self._values[_ROW_BYTES_AT] = row_bytes
        words = np.frombuffer(self._map, np.int64, count=COUNTER_WORDS, offset=_WORDS_OFFSET)
        return torch.from_numpy(words)

    def lock(self, owner: object, words: torch.Tensor) -> None:
        """Lock the page of the words for the GPU, or warn of what it costs that it is not locked.

        A file that is not in shared memory is one that a driver may refuse. Figures alone are no
        reason not to serve.

        Args:
            owner: Holds `words`: the lock ends with it.
            words: From `gpu_words`.
        """
        try:
            page_lock(owner, words)
        except HostMemoryError as error:
            logger.warning(
                "KCache: %s. It holds the counters, in %s: without the lock every step waits until "
                "the GPU has written them. Give the server /dev/shm.",
                error,
                self.path,
            )

    def read(self) -> np.ndarray:
        """[NUM_VALUES] float64: what was counted until now, as a copy."""
        return _read(self._map[:])

    def __getitem__(self, name: str) -> float:
        return float(self._values[SCALARS.index(name)])

    def __setitem__(self, name: str, value: float) -> None:
        self._values[SCALARS.index(name)] = value

    def add_selection(self, counts: torch.Tensor, mass: torch.Tensor, row_bytes: int) -> None:
        """Count one layer of one decode step on the CPU, where every selected block is fetched.

        Args:
            counts: [B, Hkv] int32, host. V blocks of each list.
            mass: [B, Hkv] float32, host. Covered mass of each list.
            row_bytes: Bytes of a V block.
        """
        listed = counts[counts > 0]
        dropped = np.clip(1.0 - mass[counts > 0].numpy(), 0.0, 1.0)
        self["selected_lists"] += listed.numel()
        self["selected_blocks"] += int(listed.sum())
        self["fetched_bytes"] += int(listed.sum()) * row_bytes
        self["decode_layer_steps"] += 1
        buckets = np.searchsorted(DROPPED_BOUNDS, dropped, side="left")
        buckets = buckets.clip(max=len(DROPPED_BOUNDS) - 1)
        self._values[_DROPPED_AT:NUM_VALUES] += np.bincount(buckets, minlength=len(DROPPED_BOUNDS))


def _read(data: bytes) -> np.ndarray:
    """[NUM_VALUES] float64 out of the bytes of a file."""
    values = np.frombuffer(data, dtype=np.float64, count=NUM_VALUES + 1).copy()
    row_bytes = values[_ROW_BYTES_AT]
    if row_bytes > 0:
        words = np.frombuffer(data, np.int64, count=COUNTER_WORDS, offset=_WORDS_OFFSET)
        lists, selected, hits, misses, direct = words[: len(COUNTER_NAMES)]
        counted = {
            "selected_lists": lists,
            "selected_blocks": selected,
            "hot_cache_hits": hits,
            "hot_cache_misses": misses,
            "direct_host_reads": direct,
            "fetched_bytes": (misses + direct) * row_bytes,
        }
        for name, value in counted.items():
            values[SCALARS.index(name)] = value
        values[_DROPPED_AT:NUM_VALUES] = words[FIRST_DROPPED_BUCKET:]
    return values[:NUM_VALUES]


def dropped_mass(values: np.ndarray) -> np.ndarray:
    """Lists by dropped mass: [len(DROPPED_BOUNDS)], not cumulative.

    Args:
        values: [NUM_VALUES] float64, one worker's array or a sum of several.
    """
    return values[_DROPPED_AT:NUM_VALUES]


def read_all(instance: str, engine: int) -> list[np.ndarray]:
    """Arrays of all workers of an engine, as copies; empty where none runs."""
    pattern = f"vllm_kcache.{instance}.{engine}.*"
    arrays = []
    for path in sorted(directory().glob(pattern)):
        data = path.read_bytes()
        if len(data) == FILE_BYTES:
            arrays.append(_read(data))
    return arrays


def remove_all(instance: str) -> None:
    """Remove the files of all workers of an instance.

    vLLM ends workers with SIGKILL when it stops, so they cannot remove their own.
    """
    for path in directory().glob(f"vllm_kcache.{instance}.*"):
        path.unlink(missing_ok=True)


def summed(arrays: list[np.ndarray]) -> np.ndarray:
    """One array for an engine: counts add over its ranks, the pool's blocks do not.

    Tensor-parallel ranks share one block id space, so the number of blocks is the least of theirs.
    """
    total = np.sum(arrays, axis=0) if arrays else np.zeros(NUM_VALUES)
    if arrays:
        at = SCALARS.index("host_pool_blocks")
        total[at] = min(array[at] for array in arrays)
    return total

# SPDX-License-Identifier: Apache-2.0
"""Figures of a worker, in a small file that the API server maps and reads.

A worker cannot reach the server's metrics registry. It adds to a fixed array in shared memory, one
file per rank, and the server reads the files of its engine when it is scraped.
"""

from __future__ import annotations

import atexit
import mmap
import tempfile
from pathlib import Path

import numpy as np
import torch

SELECTED_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DROPPED_BOUNDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)

SCALARS = (
    "host_pool_blocks",
    "host_pool_bytes",
    "fetched_bytes",
    "decode_layer_steps",
    "eager_decode_steps",
    "hot_cache_hits",
    "hot_cache_misses",
    "direct_host_reads",
    "selected_blocks_sum",
    "dropped_mass_sum",
)
_SELECTED_AT = len(SCALARS)
_DROPPED_AT = _SELECTED_AT + len(SELECTED_BOUNDS) + 1
NUM_VALUES = _DROPPED_AT + len(DROPPED_BOUNDS) + 1


def directory() -> Path:
    """Where the files lie: shared memory where the system has it."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def path_of(instance_id: str, engine: int, rank: int) -> Path:
    """File of one worker.

    Args:
        instance_id: vLLM's id of the engine's configuration.
        engine: Data-parallel rank.
        rank: Rank of the worker within its engine.
    """
    return directory() / f"vllm_kcache.{instance_id}.{engine}.{rank}"


class Counters:
    """The array of one worker. Only its worker writes; anyone may read.

    Args:
        path: File to create; None keeps the array private to the process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        if path is None:
            self.values = np.zeros(NUM_VALUES)
            return
        size = NUM_VALUES * 8
        with open(path, "w+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.values = np.frombuffer(self._map, dtype=np.float64)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove the file. The array stays readable in this process."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def __getitem__(self, name: str) -> float:
        return float(self.values[SCALARS.index(name)])

    def __setitem__(self, name: str, value: float) -> None:
        self.values[SCALARS.index(name)] = value

    def add_selection(self, counts: torch.Tensor, mass: torch.Tensor, row_bytes: int) -> None:
        """Count one layer of one decode step on the CPU, where every selected block is fetched.

        Args:
            counts: [B, Hkv] int32, host. V blocks of each list.
            mass: [B, Hkv] float32, host. Covered mass of each list.
            row_bytes: Bytes of a V block.
        """
        listed = counts.flatten().numpy()
        listed = listed[listed > 0]
        dropped = np.clip(1.0 - mass[counts > 0].flatten().numpy(), 0.0, 1.0)
        self["selected_blocks_sum"] += float(listed.sum())
        self["dropped_mass_sum"] += float(dropped.sum())
        self["fetched_bytes"] += float(listed.sum()) * row_bytes
        self["decode_layer_steps"] += 1
        self._add_histogram(_SELECTED_AT, SELECTED_BOUNDS, listed)
        self._add_histogram(_DROPPED_AT, DROPPED_BOUNDS, dropped)

    def _add_histogram(self, first: int, bounds: tuple, samples: np.ndarray) -> None:
        buckets = np.searchsorted(bounds, samples, side="left")
        self.values[first : first + len(bounds) + 1] += np.bincount(
            buckets, minlength=len(bounds) + 1
        )


def histograms(values: np.ndarray) -> dict[str, tuple[tuple, np.ndarray]]:
    """Bounds and counts (not cumulative, the last one unbounded) of each histogram.

    Args:
        values: [NUM_VALUES] float64, one worker's array or a sum of several.
    """
    return {
        "selected_blocks": (SELECTED_BOUNDS, values[_SELECTED_AT:_DROPPED_AT]),
        "dropped_mass": (DROPPED_BOUNDS, values[_DROPPED_AT:NUM_VALUES]),
    }


def read_all(instance_id: str, engine: int) -> list[np.ndarray]:
    """Arrays of all workers of an engine, as copies; empty where none runs."""
    pattern = f"vllm_kcache.{instance_id}.{engine}.*"
    arrays = []
    for path in sorted(directory().glob(pattern)):
        data = path.read_bytes()
        if len(data) == NUM_VALUES * 8:
            arrays.append(np.frombuffer(data, dtype=np.float64))
    return arrays


def summed(arrays: list[np.ndarray]) -> np.ndarray:
    """One array for an engine: counts add over its ranks, the pool's blocks do not.

    Tensor-parallel ranks share one block id space, so the number of blocks is the least of theirs.
    """
    total = np.sum(arrays, axis=0) if arrays else np.zeros(NUM_VALUES)
    if arrays:
        at = SCALARS.index("host_pool_blocks")
        total[at] = min(array[at] for array in arrays)
    return total

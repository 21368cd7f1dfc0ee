# SPDX-License-Identifier: Apache-2.0
"""Figures of a worker, in a small file that the API server reads.

A worker cannot reach the server's metrics registry. It adds to a fixed array in shared memory, one
file per rank, and the server reads the files of its own ranks when it is scraped. What the kernels
of a GPU count, the GPU writes there itself.

Everybody on a machine may write to the folder of shared memory. So a file is made, never taken
over, under a name that nobody else can know, for its owner only; and a reader believes no name: it
looks at what it has opened.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import secrets
import stat
import tempfile
from pathlib import Path

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_kcache.cache.host_memory import HostMemoryError
from vllm_kcache.cache.host_pool import page_lock
from vllm_kcache.cache.hot_cache import (
    COUNTER_NAMES,
    COUNTER_WORDS,
    DROPPED_MASS_EDGES,
    ESTIMATE_ERROR_EDGES,
    FIRST_DROPPED_BUCKET,
    FIRST_ESTIMATE_BUCKET,
)

logger = init_logger(__name__)

# Upper bounds of the dropped mass and of |estimate - refined|, the same on CPU and GPU.
DROPPED_BOUNDS, ESTIMATE_BOUNDS = DROPPED_MASS_EDGES, ESTIMATE_ERROR_EDGES

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
_ESTIMATES_AT = _DROPPED_AT + len(DROPPED_BOUNDS)
NUM_VALUES = _ESTIMATES_AT + len(ESTIMATE_BOUNDS)
# Codes that are so far off for so many blocks, of at least so many, are worth a warning: a block is
# taken for e times what it is.
ESTIMATE_FAR = 1.0
ESTIMATE_FAR_SHARE = 0.05
ESTIMATE_LEAST_BLOCKS = 10_000

# A file: the values, then the bytes of a V block, both float64, then the words of a GPU, int64; 0
# to its end. It is a whole memory page, which can be locked for the GPU to write to.
_ROW_BYTES_AT = NUM_VALUES
_WORDS_OFFSET = 8 * (NUM_VALUES + 1)
FILE_BYTES = mmap.PAGESIZE
assert _WORDS_OFFSET + 8 * COUNTER_WORDS <= FILE_BYTES


def directory() -> Path:
    """Where the files lie: shared memory where the system has it."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def new_instance() -> str:
    """A name for all processes of one server, which no other server has and nobody can guess."""
    return secrets.token_hex(16)


def path_of(instance: str, engine: int, rank: int) -> Path:
    """File of one worker.

    Args:
        instance: From `new_instance`, the same in all processes of a server.
        engine: Data-parallel rank.
        rank: Rank of the worker within its engine.
    """
    # Where Ray starts the engines, vLLM gives the id of each a suffix.
    server = instance.partition("_dp")[0]
    return directory() / f"vllm_kcache.{server}.{engine}.{rank}"


class Counters:
    """The array of one worker. Only the worker and its GPU write; anyone may read.

    Args:
        path: File to make; None keeps the array private to the process.

    Raises:
        HostMemoryError: The file cannot be made; the message says what to change.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._has_warned = False
        if path is None:
            self._map = mmap.mmap(-1, FILE_BYTES)
        else:
            self._map, self._file = _make(path)
            atexit.register(self.close)
        self._values = np.frombuffer(self._map, dtype=np.float64, count=NUM_VALUES + 1)

    def close(self) -> None:
        """Remove the file. The array stays readable in this process."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._file:
                self.path.unlink()
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
        dropped_mass(self._values)[:] += np.bincount(buckets, minlength=len(DROPPED_BOUNDS))

    def add_estimate_errors(self, errors: torch.Tensor) -> None:
        """Count on the CPU how far estimates from K codes were from the truth, and warn where they
        are far.

        Args:
            errors: [n] float32, host. |estimate - refined| of selected blocks and query heads.
        """
        found = estimate_errors(self._values)
        buckets = np.searchsorted(ESTIMATE_BOUNDS, errors.numpy(), side="left")
        # What is no number sorts behind infinity.
        buckets = buckets.clip(max=len(ESTIMATE_BOUNDS) - 1)
        found += np.bincount(buckets, minlength=len(ESTIMATE_BOUNDS))
        self.warn_of_estimates()

    def warn_of_estimates(self) -> None:
        """Say once where estimates from K codes are far off, by what was counted until now."""
        if self._has_warned:
            return
        found = estimate_errors(self.read())
        blocks, far = found.sum(), found[ESTIMATE_BOUNDS.index(ESTIMATE_FAR) + 1 :].sum()
        is_far = blocks >= ESTIMATE_LEAST_BLOCKS and far > ESTIMATE_FAR_SHARE * blocks
        if is_far:
            self._has_warned = True
            logger.warning(
                "KCache: for %.0f%% of the selected blocks the estimate from 4-bit K codes is off "
                "by more than a factor of e: the selection may miss blocks that matter. Set "
                "kcache_config.k_bits to 16 for this model.",
                100 * far / blocks,
            )


def _read(data: bytes) -> np.ndarray:
    """[NUM_VALUES] float64 out of the bytes of a file."""
    values = np.frombuffer(data, dtype=np.float64, count=NUM_VALUES + 1).copy()
    row_bytes = float(values[_ROW_BYTES_AT])
    if row_bytes > 0:
        words = np.frombuffer(data, np.int64, count=COUNTER_WORDS, offset=_WORDS_OFFSET)
        lists, selected, hits, misses, direct = words[: len(COUNTER_NAMES)].tolist()
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
        dropped_mass(values)[:] = words[FIRST_DROPPED_BUCKET:FIRST_ESTIMATE_BUCKET]
        estimate_errors(values)[:] = words[FIRST_ESTIMATE_BUCKET:]
    return values[:NUM_VALUES]


def dropped_mass(values: np.ndarray) -> np.ndarray:
    """Lists by dropped mass: [len(DROPPED_BOUNDS)], not cumulative.

    Args:
        values: [NUM_VALUES] float64, one worker's array or a sum of several.
    """
    return values[_DROPPED_AT:_ESTIMATES_AT]


def estimate_errors(values: np.ndarray) -> np.ndarray:
    """Selected blocks and query heads by |estimate - refined|: [len(ESTIMATE_BOUNDS)], not
    cumulative.

    Args:
        values: as for `dropped_mass`.
    """
    return values[_ESTIMATES_AT:NUM_VALUES]


def _make(path: Path) -> tuple[mmap.mmap, tuple[int, int]]:
    """A new file of its owner alone, with its memory reserved: its bytes, device and number.

    Memory that is not reserved is missing when it is first written to, which ends the process.
    """
    try:
        descriptor = os.open(
            path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            os.posix_fallocate(descriptor, 0, FILE_BYTES)
            made = os.fstat(descriptor)
            return mmap.mmap(descriptor, FILE_BYTES), (made.st_dev, made.st_ino)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostMemoryError(
            f"KCache: {path}, which holds the counters, cannot be made ({error.strerror}): "
            f"{path.parent} must be writable and have {FILE_BYTES} bytes left (docker --shm-size)"
        ) from error


def _load(path: Path) -> np.ndarray:
    """[NUM_VALUES] float64 out of a worker's file.

    Raises:
        OSError: There is none.
        ValueError: It is not one of our workers'; the message says how one can tell.
    """
    # Nothing here may wait, as the opening of a pipe does.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no file")
        if found.st_uid != os.geteuid():
            raise ValueError(f"it belongs to user {found.st_uid}")
        if found.st_size != FILE_BYTES:
            raise ValueError(f"it has {found.st_size} bytes in place of {FILE_BYTES}")
        data = os.pread(descriptor, FILE_BYTES, 0)
    finally:
        os.close(descriptor)
    values = _read(data)
    # Also false for what is no number.
    if not ((values >= 0) & (values < 2.0**63)).all():
        raise ValueError("it holds what no worker counts")
    return values


def read_all(instance: str, engine: int, ranks: int) -> list[np.ndarray]:
    """Arrays of the workers of an engine, as copies, without those that cannot be read.

    Args:
        instance: From `new_instance`.
        engine: Data-parallel rank.
        ranks: Workers of the engine.
    """
    arrays = []
    for rank in range(ranks):
        path = path_of(instance, engine, rank)
        try:
            arrays.append(_load(path))
        except FileNotFoundError:
            # Its worker has not started, has ended or runs on another machine.
            continue
        except (OSError, ValueError) as error:
            logger.warning_once(
                "KCache: the counters in %s cannot be read (%s): /metrics goes without them.",
                path,
                error,
            )
    return arrays


def remove_all(instance: str) -> None:
    """Remove the files of all workers of a server.

    vLLM ends workers with SIGKILL when it stops, so they cannot remove their own.
    """
    for path in directory().glob(f"vllm_kcache.{instance}.*"):
        with contextlib.suppress(OSError):
            path.unlink()


def summed(arrays: list[np.ndarray]) -> np.ndarray:
    """One array for an engine: counts add over its ranks, the pool's blocks do not.

    Tensor-parallel ranks share one block id space, so the number of blocks is the least of theirs.
    """
    total = np.sum(arrays, axis=0) if arrays else np.zeros(NUM_VALUES)
    if arrays:
        at = SCALARS.index("host_pool_blocks")
        total[at] = min(array[at] for array in arrays)
    return total

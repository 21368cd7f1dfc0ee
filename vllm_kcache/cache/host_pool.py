# SPDX-License-Identifier: Apache-2.0
"""The host pool: a row of bytes for each block of tokens of a KV head, in host memory.

A layer is `[num_rows, row_bytes]`. Row r holds what the host keeps of physical block r; what its
bytes mean is the row format's business. The pool is always complete. With `pinned=True` the memory
is page-locked and mapped: GPU kernels read and write it at the same address as the host does.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import logging
import mmap
import os
import time
import weakref

import torch

from vllm_kcache.cache import numa
from vllm_kcache.cache.host_memory import HostMemoryError, check_host_memory, memlock_limit_bytes

logger = logging.getLogger(__name__)

_PAGE_BYTES = mmap.PAGESIZE
_TOUCH_BYTES = 256 << 20
_REGISTER_PORTABLE, _REGISTER_MAPPED = 1, 2
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class HostPool:
    """Host memory for the rows of all layers, zeroed, of the exact size.

    Args:
        num_layers: layers whose rows live in the pool.
        num_rows: rows of one layer, one for each physical block.
        row_bytes: bytes of a row.
        pinned: page-lock and map the memory for the current CUDA device. Without it the pool is
            pageable memory for the CPU implementation.
        numa_node: node whose memory is wanted. None: the current CUDA device's when `pinned`, else
            no node in particular.

    Attributes:
        num_layers, num_rows, row_bytes, pinned: as given.
        layer_bytes: bytes of one layer's rows.
        bytes: bytes of the whole pool; each layer starts on a memory page.

    Memory that a node is wanted for is touched at once. Where it lies is logged; that it lies
    elsewhere is a warning (see `numa`).

    Raises HostMemoryError when the host, its control group or the NUMA nodes this process is bound
    to have not enough memory, or when the driver refuses to lock it; the message names the limit
    and what to change. Memory is returned by `close()`, when the pool is collected and at
    interpreter exit; the mapping is private and anonymous, so the kernel also takes it back from a
    process that dies by a signal.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        row_bytes: int,
        pinned: bool,
        numa_node: int | None = None,
    ) -> None:
        shape = {"num_layers": num_layers, "num_rows": num_rows, "row_bytes": row_bytes}
        for name, value in shape.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if pinned and not torch.cuda.is_available():
            raise HostMemoryError("pinned=True: needs a CUDA device; use pinned=False on the CPU")
        self.num_layers = num_layers
        self.num_rows = num_rows
        self.row_bytes = row_bytes
        self.pinned = pinned
        self.layer_bytes = num_rows * row_bytes
        # Each layer starts on a memory page: page-locking works on whole pages, and a copy must
        # not cross two registrations.
        self._layer_stride = -(-self.layer_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self.bytes = num_layers * self._layer_stride
        check_host_memory(self.bytes)
        numa.check_node_memory(self.bytes)

        mapping = _map_zeroed(self.bytes)
        self._mapping: mmap.mmap | None = mapping
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        registered: list[int] = []
        # Also runs at interpreter exit.
        self._finalizer = weakref.finalize(self, _release, registered)
        node = numa.gpu_node() if pinned and numa_node is None else numa_node
        if pinned or node is not None:
            try:
                self._fill(registered, node)
            except BaseException:
                self.close()
                raise
        flat = torch.frombuffer(mapping, dtype=torch.uint8)
        self._layers = [
            flat[i * self._layer_stride : i * self._layer_stride + self.layer_bytes].view(
                num_rows, row_bytes
            )
            for i in range(num_layers)
        ]

    def layer(self, index: int) -> torch.Tensor:
        """One layer: [num_rows, row_bytes] uint8, host. The GPU sees it there when `pinned`."""
        if not self._layers:
            raise RuntimeError("the host pool is closed")
        return self._layers[index]

    def close(self) -> None:
        """Give the memory back. No kernel or copy that uses it may still be running."""
        self._layers = []
        self._finalizer()
        # Tensors handed out keep the mapping alive; without any it is unmapped here and now.
        self._mapping = None

    def _fill(self, registered: list[int], node: int | None) -> None:
        """Touch the memory from several threads and page-lock it, layer by layer."""
        cpus = os.sched_getaffinity(0)
        if node is not None:
            cpus = numa.place(self._base, self.bytes, node)
        if self.pinned:
            self._warn_of_lock_limit()
            torch.cuda.current_stream()  # makes the context of this device current
        start = last = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(
            min(16, len(cpus)), initializer=os.sched_setaffinity, initargs=(0, cpus)
        ) as executor:
            touched = [
                [
                    executor.submit(_touch, self._base + offset, length)
                    for offset, length in self._pieces(i)
                ]
                for i in range(self.num_layers)
            ]
            for i, pieces in enumerate(touched):
                for piece in pieces:
                    piece.result()
                if not self.pinned:
                    continue
                _register(
                    self._base + i * self._layer_stride,
                    self._layer_stride,
                    advice=", or set kcache_config.host_memory_gib lower",
                )
                registered.append(self._base + i * self._layer_stride)
                now = time.monotonic()
                if i + 1 == self.num_layers or now - last > 5.0:
                    last = now
                    done = (i + 1) * self._layer_stride
                    logger.info(
                        "host pool: %.1f of %.1f GiB page-locked in %.1f s (%.1f GB/s)",
                        done / 2**30,
                        self.bytes / 2**30,
                        now - start,
                        done / 1e9 / max(now - start, 1e-9),
                    )
        if node is not None:
            numa.report(self._base, self.bytes, node)

    def _warn_of_lock_limit(self) -> None:
        limit = memlock_limit_bytes()
        if limit is not None and limit < self.bytes:
            logger.warning(
                "RLIMIT_MEMLOCK is %d bytes, the host pool %d: the driver may refuse to lock it",
                limit,
                self.bytes,
            )

    def _pieces(self, layer: int) -> list[tuple[int, int]]:
        begin, end = layer * self._layer_stride, (layer + 1) * self._layer_stride
        return [(o, min(_TOUCH_BYTES, end - o)) for o in range(begin, end, _TOUCH_BYTES)]


def _map_zeroed(size: int) -> mmap.mmap:
    """Private anonymous memory: zero, and not yet backed by pages."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages make touching and locking quicker. Locked pages must not become copy-on-write by
    # a fork.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):  # an old kernel lacks one
            mapping.madvise(getattr(mmap, advice))
    return mapping


def _touch(address: int, length: int) -> None:
    """Back the range with zeroed pages. ctypes gives up the GIL, so pieces run in parallel."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(address, length, _MADV_POPULATE_WRITE) != 0:
        ctypes.memset(address, 0, length)


def _register(address: int, length: int, advice: str = "") -> None:
    cudart = torch.cuda.cudart()
    result = int(cudart.cudaHostRegister(address, length, _REGISTER_PORTABLE | _REGISTER_MAPPED))
    if result != 0:
        limit = memlock_limit_bytes()
        lock = "unlimited" if limit is None else f"{limit} bytes"
        raise HostMemoryError(
            f"the CUDA driver could not page-lock {length} bytes (error {result}; RLIMIT_MEMLOCK "
            f"is {lock}): raise the limit (ulimit -l unlimited, docker --ulimit memlock=-1){advice}"
        )
    mapped = ctypes.c_uint64()
    driver = ctypes.CDLL("libcuda.so.1")
    error = driver.cuMemHostGetDevicePointer_v2(
        ctypes.byref(mapped), ctypes.c_void_p(address), ctypes.c_uint(0)
    )
    if error != 0 or mapped.value != address:
        cudart.cudaHostUnregister(address)
        raise HostMemoryError(
            f"this GPU maps host memory {address:#x} at {mapped.value:#x} (driver error {error}): "
            "kernels need one address on both sides (unified addressing, a 64-bit Linux host)"
        )


def page_lock(owner: object, memory: torch.Tensor) -> None:
    """Lock the memory pages that a tensor lies in, for as long as `owner` lives.

    Args:
        owner: Holds the tensor. When it is collected, or at exit, the pages are released.
        memory: Contiguous, host. The current CUDA device reads and writes it at its address; so it
            does everything else in those pages.

    Raises:
        HostMemoryError: The driver refused; the message names the limit.
    """
    begin = memory.data_ptr() // _PAGE_BYTES * _PAGE_BYTES
    end = -(-(memory.data_ptr() + memory.nbytes) // _PAGE_BYTES) * _PAGE_BYTES
    _register(begin, end - begin)
    weakref.finalize(owner, _release, [begin])


def _release(registered: list[int]) -> None:
    if registered:
        cudart = torch.cuda.cudart()
        while registered:
            cudart.cudaHostUnregister(registered.pop())

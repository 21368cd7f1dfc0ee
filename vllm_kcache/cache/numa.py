# SPDX-License-Identifier: Apache-2.0
"""The NUMA node that host memory comes from: the GPU's own, on machines of two sockets.

Memory of the other socket is reached over the link between the sockets, which is slower than the
GPU's own and shared. Only the two system calls that containers grant together (docker's
`--cap-add SYS_NICE`) are used: `mbind` to choose and `get_mempolicy` to look.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
import random
from pathlib import Path
from typing import Any

import torch

from vllm_kcache.cache.host_memory import HostMemoryError

logger = logging.getLogger(__name__)

_ROOT = Path("/")
_SYSCALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}  # mbind, get_mempolicy
_MPOL_DEFAULT, _MPOL_PREFERRED, _MPOL_BIND = 0, 1, 2
_MPOL_MODE = 0xFF  # without the mode's flags
_MPOL_F_NODE, _MPOL_F_ADDR = 1, 2
_MAX_NODES = 1024  # no kernel is built for more

_SAMPLES = 1024
_GOOD_SHARE = 0.95


def gpu_node(device: int | None = None, root: Path = _ROOT) -> int | None:
    """NUMA node of a GPU, from its PCI address. Says so in the log where it is not known.

    Args:
        device: CUDA device, None for the current one.
        root: The file system's root, another one in tests.

    Returns:
        The node, or None: the machine has one node, or does not tell.
    """
    nodes = _node_list(root, "has_memory")
    if len(nodes) < 2:
        logger.info("NUMA: this machine has one memory node")
        return None
    if device is None:
        device = torch.cuda.current_device()
    properties: Any = torch.cuda.get_device_properties(device)  # the stubs lack pci_...
    address = (
        f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
        f":{properties.pci_device_id:02x}.0"
    )
    try:
        node = int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        node = -1
    # A node without CPUs is a GPU's own memory (Grace Hopper).
    if node < 0 or node not in _node_list(root, "has_cpu"):
        logger.warning(
            "NUMA: the node of GPU %s is not known (/sys/bus/pci/devices/%s/numa_node): the host "
            "pool may lie on any of the nodes %s; numactl --membind before the command decides",
            address,
            address,
            _listing(nodes),
        )
        return None
    return node


def check_node_memory(needed_bytes: int, root: Path = _ROOT) -> None:
    """Raise HostMemoryError unless the nodes this process is bound to have that much to give.

    A control group's cpuset and a binding policy (`numactl --membind`, vLLM's `--numa-bind`) keep
    memory to some nodes; the kernel kills a process that asks them for more than they have.

    Args:
        needed_bytes: Memory about to be taken.
        root: The file system's root, another one in tests.
    """
    every = _node_list(root, "has_memory")
    bound = every & _allowed_nodes(root)
    try:
        mode, nodes = process_policy()
    except OSError:  # no policy can have been set, either
        mode, nodes = _MPOL_DEFAULT, set()
    if mode == _MPOL_BIND:
        bound &= nodes
    if not bound or bound == every:
        return
    left = sum(_available_bytes(root, node) for node in bound)
    if needed_bytes > left:
        raise HostMemoryError(
            f"the host pool needs {needed_bytes / 2**30:.2f} GiB, but this process is bound to "
            f"NUMA node {_listing(bound)}, which has {left / 2**30:.2f} GiB available: bind it to "
            "more nodes (numactl --membind, --numa-bind, cpuset.mems), or set "
            "kcache_config.host_memory_gib lower"
        )


def place(address: int, length: int, node: int, root: Path = _ROOT) -> set[int]:
    """Have a range of memory come from a node, unless the user has decided otherwise.

    Logs what stands in the way: a cpuset without that node, a memory policy of the process, a
    kernel or container that refuses. None of these is an error.

    Args:
        address: Begin of the range, on a memory page, which nothing has touched yet.
        length: Bytes.
        node: The node wanted.
        root: The file system's root, another one in tests.

    Returns:
        The CPUs to touch the range from. They are the node's where it is wanted and has any:
        that is quicker, and decides where the pages lie when the system call is refused.
    """
    cpus = os.sched_getaffinity(0)
    allowed = _allowed_nodes(root)
    if node not in allowed:
        logger.info(
            "NUMA: node %d is wanted, this process may use %s (Mems_allowed): left as it is",
            node,
            _listing(allowed),
        )
        return cpus
    local = cpus & _cpus(root, node)
    try:
        mode, _ = process_policy()
        if mode != _MPOL_DEFAULT:
            logger.info(
                "NUMA: this process has a memory policy (numactl, --numa-bind): left as it is"
            )
            return cpus
        prefer_node(address, length, node)
    except OSError as error:
        logger.info(
            "NUMA: node %d cannot be chosen here (%s; docker needs --cap-add SYS_NICE): the memory "
            "is touched from its CPUs, of which this process may use %d",
            node,
            error.strerror,
            len(local),
        )
    return local or cpus


def report(address: int, length: int, node: int) -> None:
    """Log how much of a touched range lies on a node: one line, a warning under 95%.

    Args:
        address: Begin of the range, on a memory page.
        length: Bytes.
        node: The node wanted.
    """
    try:
        nodes = nodes_of(address, length, _SAMPLES)
    except OSError as error:
        logger.info(
            "NUMA: where the host pool lies cannot be read here (%s); numastat -p %d tells",
            error.strerror,
            os.getpid(),
        )
        return
    share = nodes.count(node) / len(nodes)
    if share >= _GOOD_SHARE:
        logger.info("NUMA: %.1f%% of the host pool lies on node %d", 100 * share, node)
    else:
        logger.warning(
            "NUMA: only %.1f%% of the host pool lies on node %d, the GPU's; the rest is read "
            "over the link between the sockets, which is slower. That node is full, or this "
            "process is bound to another",
            100 * share,
            node,
        )


def prefer_node(address: int, length: int, node: int) -> None:
    """Have pages of a range come from a node as they are first touched.

    The policy is MPOL_PREFERRED: when the node is full, the rest comes from the others. MPOL_BIND
    would have the process killed there, and a pool may be meant to be larger than a node.

    Args:
        address: Begin of the range, on a memory page.
        length: Bytes.
        node: The node.

    Raises:
        OSError: The kernel has no NUMA, does not permit it, or knows no such node.
    """
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    mbind, _ = _numbers()
    _call(mbind, address, length, _MPOL_PREFERRED, ctypes.addressof(mask), _MAX_NODES + 1, 0)


def nodes_of(address: int, length: int, samples: int) -> list[int]:
    """NUMA nodes that pages of a range lie on.

    Args:
        address: Begin of the range, on a memory page. All of it has been touched: the kernel maps
            pages that were not, wherever it likes.
        length: Bytes.
        samples: Most pages to look at: one from each of as many equal parts, at random, so that
            no period of the placement (an interleaved one's) hides.

    Returns:
        The node of each page looked at.

    Raises:
        OSError: The kernel has no NUMA or does not permit it.
    """
    pages = -(-length // mmap.PAGESIZE)
    samples = min(samples, pages)
    node = ctypes.c_int(-1)
    found = []
    _, get_mempolicy = _numbers()
    flags = _MPOL_F_NODE | _MPOL_F_ADDR
    draw = random.Random(0)
    for sample in range(samples):
        page = (sample * pages + draw.randrange(pages)) // samples
        at = address + page * mmap.PAGESIZE
        _call(get_mempolicy, ctypes.addressof(node), 0, 0, at, flags)
        found.append(node.value)
    return found


def process_policy() -> tuple[int, set[int]]:
    """Memory policy of this thread, which others inherit: its mode (MPOL_...) and its nodes.

    Raises:
        OSError: The kernel has no NUMA or does not permit it.
    """
    mode = ctypes.c_int(-1)
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    _, get_mempolicy = _numbers()
    _call(get_mempolicy, ctypes.addressof(mode), ctypes.addressof(mask), _MAX_NODES + 1, 0, 0)
    nodes = {node for node in range(_MAX_NODES) if mask[node // 64] >> node % 64 & 1}
    return mode.value & _MPOL_MODE, nodes


def _numbers() -> tuple[int, int]:
    if platform.machine() not in _SYSCALLS:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _SYSCALLS[platform.machine()]


def _call(number: int, *arguments: int) -> None:
    """A system call: glibc has no functions for these, and libnuma is not everywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(value) for value in arguments)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _node_list(root: Path, name: str) -> set[int]:
    """Nodes of one kind (`has_memory`, `has_cpu`); none on a kernel without NUMA."""
    path = root / "sys/devices/system/node" / name
    return _parse_list(path.read_text()) if path.exists() else set()


def _cpus(root: Path, node: int) -> set[int]:
    path = root / f"sys/devices/system/node/node{node}/cpulist"
    return _parse_list(path.read_text()) if path.exists() else set()


def _allowed_nodes(root: Path) -> set[int]:
    """Nodes of this process's cpuset; every node on a kernel without cpusets."""
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith("Mems_allowed_list:"):
            return _parse_list(line.split(":")[1])
    return set(range(_MAX_NODES))


def _available_bytes(root: Path, node: int) -> int:
    """What a node can still give: free memory, the page cache and reclaimable kernel memory."""
    path = root / f"sys/devices/system/node/node{node}/meminfo"
    kib = {}
    for line in path.read_text().splitlines():
        _, _, name, value = line.split()[:4]
        kib[name.rstrip(":")] = int(value)
    return 1024 * (kib["MemFree"] + kib["FilePages"] - kib["Shmem"] + kib.get("SReclaimable", 0))


def _parse_list(text: str) -> set[int]:
    """The kernel's lists of numbers: "0-1,3"."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _listing(numbers: set[int]) -> str:
    return ",".join(str(number) for number in sorted(numbers))

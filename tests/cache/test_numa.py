# SPDX-License-Identifier: Apache-2.0
"""Where host memory lies: the GPU's node found, wanted of the kernel, measured; the user's own
binding and a kernel that refuses are left alone.

The system calls are real, on every node that this machine has.
"""

import ctypes
import errno
import logging
import mmap
import os
import platform
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_kcache.cache import HostMemoryError, HostPool, numa

PAGE = mmap.PAGESIZE
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
GIB = 2**30


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger=numa.logger.name)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.fixture
def real_nodes():
    """Nodes that memory can be had from. Skips where the kernel does not let a process choose."""
    try:
        mode, _ = numa.process_policy()
    except OSError as error:
        pytest.skip(f"no memory policies here: {error}")
    if mode != 0:
        pytest.skip("these tests run under a memory policy")
    root = Path("/")
    return sorted(numa._node_list(root, "has_memory") & numa._allowed_nodes(root))


class Mapping:
    """Private anonymous memory, which nothing has touched."""

    def __init__(self, pages: int) -> None:
        self.length = pages * PAGE
        self.memory = mmap.mmap(-1, self.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # No neighbour of the same kind: the kernel would show the two as one.
        self.memory.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def touch(self) -> None:
        ctypes.memset(self.address, 1, self.length)


def kernel_policy(address: int) -> tuple[str, bool]:
    """What /proc/self/numa_maps says of the mapping: its policy, and whether it has pages."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        begin, policy, *rest = line.split()
        if int(begin, 16) == address:
            return policy, any(word.startswith("anon=") for word in rest)
    raise AssertionError(f"no mapping begins at {address:#x}")


def in_thread(function):
    """Memory policy and system-call filter belong to a thread, and end with it."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def deny_policies() -> None:
    """Have this thread's memory-policy calls fail with EPERM, as docker's seccomp profile does."""

    class Instruction(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),
            ("if_false", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction)))

    mbind, get_mempolicy = numa._numbers()
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = (Instruction * 5)(
        (0x20, 0, 0, 0),  # load the call's number
        (0x15, 2, 0, mbind),
        (0x15, 1, 0, get_mempolicy),
        (0x06, 0, 0, allow),
        (0x06, 0, 0, deny),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    wide = ctypes.c_ulong
    no_new_privileges = libc.prctl(38, wide(1), wide(0), wide(0), wide(0))
    pointer = ctypes.byref(Program(5, program))
    if no_new_privileges or libc.prctl(22, wide(2), pointer, wide(0), wide(0)):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def fake_root(tmp_path: Path, nodes: str = "0-1", mems_allowed: str = "0-1", **files: str) -> Path:
    cpus = sorted(os.sched_getaffinity(0))
    node = "sys/devices/system/node"
    meminfo = (
        "Node {0} MemTotal: 9000000 kB\nNode {0} MemFree: 4000000 kB\n"
        "Node {0} FilePages: 2000000 kB\nNode {0} Shmem: 500000 kB\n"
        "Node {0} SReclaimable: 100000 kB\n"
    )
    tree = {
        "proc/self/status": f"Name: x\nMems_allowed:\t3\nMems_allowed_list:\t{mems_allowed}\n",
        f"{node}/has_memory": nodes + "\n",
        f"{node}/has_cpu": nodes + "\n",
        f"{node}/node0/cpulist": "100000-100001\n",
        f"{node}/node1/cpulist": f"{cpus[-1]},100002\n",
        f"{node}/node0/meminfo": meminfo.format(0),
        f"{node}/node1/meminfo": meminfo.format(1),
    }
    for name, text in (tree | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0\n", {0}), ("0-1,3", {0, 1, 3}), ("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("\n", set())],
)
def test_lists_of_the_kernel(text, numbers):
    assert numa._parse_list(text) == numbers


def test_mems_allowed(tmp_path):
    assert numa._allowed_nodes(fake_root(tmp_path, mems_allowed="0-1,3")) == {0, 1, 3}
    (tmp_path / "proc/self/status").write_text("Name: x\n")
    assert numa._allowed_nodes(tmp_path) == set(range(1024))


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, at 0000:3b:00.0 and 0001:d8:01.0; the second is the current one."""
    found = [
        SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0),
        SimpleNamespace(pci_domain_id=1, pci_bus_id=0xD8, pci_device_id=1),
    ]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device])


FIRST = "sys/bus/pci/devices/0000:3b:00.0/numa_node"
SECOND = "sys/bus/pci/devices/0001:d8:01.0/numa_node"


def test_node_of_a_gpu_comes_from_its_pci_address(tmp_path, gpus, lines):
    root = fake_root(tmp_path, **{FIRST: "0\n", SECOND: "1\n"})
    assert (numa.gpu_node(0, root), numa.gpu_node(1, root), numa.gpu_node(root=root)) == (0, 1, 1)
    assert lines() == []


@pytest.mark.parametrize("files", [{}, {SECOND: "-1\n"}, {SECOND: "x"}, {SECOND: "2\n"}])
def test_an_unknown_node_is_said(tmp_path, gpus, lines, files):
    """Node 2 has no CPUs: such a node is a GPU's own memory."""
    root = fake_root(tmp_path, **files, **{"sys/devices/system/node/has_memory": "0-2\n"})
    assert numa.gpu_node(root=root) is None
    ((level, line),) = lines()
    assert level == "WARNING"
    assert "/sys/bus/pci/devices/0001:d8:01.0/numa_node" in line
    assert "any of the nodes 0,1,2" in line


def test_one_node_takes_one_quiet_line(tmp_path, gpus, lines):
    assert numa.gpu_node(root=fake_root(tmp_path, nodes="0", **{SECOND: "-1\n"})) is None
    assert lines() == [("INFO", "NUMA: this machine has one memory node")]


def test_a_kernel_without_nodes_is_one_node(tmp_path, gpus, lines):
    assert numa.gpu_node(root=tmp_path) is None
    assert lines() == [("INFO", "NUMA: this machine has one memory node")]


def test_pages_come_from_the_node_preferred(real_nodes):
    for node in real_nodes:
        mapping = Mapping(64)
        assert kernel_policy(mapping.address) == ("default", False)
        numa.prefer_node(mapping.address, mapping.length, node)
        assert kernel_policy(mapping.address) == (f"prefer:{node}", False)
        mapping.touch()
        assert numa.nodes_of(mapping.address, mapping.length, 1000) == 64 * [node]
        assert numa.nodes_of(mapping.address, mapping.length, 10) == 10 * [node]


@pytest.fixture
def looked_at(monkeypatch):
    """Pages that `nodes_of` asks the kernel about; they lie on node 0 and 1 in turn."""
    pages = []

    def look(number, node, mask, most, at, flags):
        page, rest = divmod(at - 0x100000, PAGE)
        assert rest == 0
        pages.append(page)
        ctypes.c_int.from_address(node).value = page % 2

    monkeypatch.setattr(numa, "_call", look)
    return pages


def test_samples_are_spread_over_all_of_the_range(looked_at):
    numa.nodes_of(0x100000, 1001 * PAGE - 1, 7)
    assert [page // 143 for page in looked_at] == list(range(7))
    looked_at.clear()
    numa.nodes_of(0x100000, 5 * PAGE, 7)
    assert looked_at == list(range(5))


def test_samples_do_not_follow_an_interleaved_placement(looked_at):
    nodes = numa.nodes_of(0x100000, 50 * 1024 * PAGE, 1024)
    assert 0.45 < sum(nodes) / 1024 < 0.55


def test_no_such_node_is_an_error(real_nodes):
    mapping = Mapping(1)
    with pytest.raises(OSError, match="Invalid argument"):
        numa.prefer_node(mapping.address, mapping.length, 1023)


def test_a_pool_is_placed_before_it_is_touched(real_nodes, lines, monkeypatch):
    place, seen = numa.place, []

    def look(address, length, node):
        seen.append(kernel_policy(address))
        cpus = place(address, length, node)
        seen.append(kernel_policy(address))
        return cpus

    monkeypatch.setattr(numa, "place", look)
    for node in real_nodes:
        pool = HostPool(2, 33, 8192, pinned=False, numa_node=node)
        address = pool.layer(0).data_ptr()
        assert seen == [("default", False), (f"prefer:{node}", False)]
        assert kernel_policy(address) == (f"prefer:{node}", True)
        assert set(numa.nodes_of(address, pool.bytes, 1000)) == {node}
        assert lines()[-1] == ("INFO", f"NUMA: 100.0% of the host pool lies on node {node}")
        assert not pool.layer(0).any()
        assert not pool.layer(1).any()
        pool.close()
        seen.clear()


def test_placed_memory_is_touched_from_its_node(tmp_path, monkeypatch, lines):
    asked = []
    monkeypatch.setattr(numa, "process_policy", lambda: (0, set()))
    monkeypatch.setattr(numa, "prefer_node", lambda *arguments: asked.append(arguments))
    root = fake_root(tmp_path)
    assert numa.place(PAGE, 2 * PAGE, 1, root) == {max(os.sched_getaffinity(0))}
    # None of node 0's CPUs is this process's.
    assert numa.place(PAGE, 2 * PAGE, 0, root) == os.sched_getaffinity(0)
    assert asked == [(PAGE, 2 * PAGE, 1), (PAGE, 2 * PAGE, 0)]
    assert lines() == []


def test_a_cpuset_without_the_node_is_left_alone(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(numa, "prefer_node", lambda *_: pytest.fail("bound all the same"))
    root = fake_root(tmp_path, mems_allowed="0,2")
    assert numa.place(PAGE, PAGE, 1, root) == os.sched_getaffinity(0)
    ((level, line),) = lines()
    assert level == "INFO"
    assert "node 1 is wanted, this process may use 0,2 (Mems_allowed)" in line


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_policy_of_the_user_is_left_alone(mode, real_nodes, lines):
    """As numactl --preferred, --membind and --interleave set it before the command."""
    mapping = Mapping(4)
    node = real_nodes[-1]

    def place():
        mask = ctypes.c_ulong(1 << node)
        number = SET_MEMPOLICY[platform.machine()]
        numa._call(number, mode, ctypes.addressof(mask), 64)
        assert numa.process_policy() == (mode, {node})
        assert numa.place(mapping.address, mapping.length, node) == os.sched_getaffinity(0)

    in_thread(place)
    assert kernel_policy(mapping.address)[0] == "default"
    ((level, line),) = lines()
    assert level == "INFO"
    assert "memory policy (numactl, --numa-bind): left as it is" in line
    assert numa.process_policy() == (0, set())


def test_a_container_that_denies_the_calls_is_no_error(real_nodes, lines):
    def make():
        deny_policies()
        with pytest.raises(PermissionError):
            numa.process_policy()
        pool = HostPool(2, 33, 4096, pinned=False, numa_node=real_nodes[0])
        assert not pool.layer(1).any()
        pool.close()

    in_thread(make)
    (_, chosen), (_, found) = lines()
    assert {level for level, _ in lines()} == {"INFO"}
    assert "cannot be chosen here (Operation not permitted; docker needs --cap-add SYS_NICE)" in (
        chosen
    )
    assert f"cannot be read here (Operation not permitted); numastat -p {os.getpid()}" in found


def test_without_the_calls_memory_is_touched_from_its_node(tmp_path, monkeypatch, lines):
    """The kernel takes memory from the node of the CPU that touches it first."""
    monkeypatch.setattr(numa, "_SYSCALLS", {})
    assert numa.place(PAGE, PAGE, 1, fake_root(tmp_path)) == {max(os.sched_getaffinity(0))}
    ((level, line),) = lines()
    assert level == "INFO"
    assert "(Function not implemented; " in line
    assert "from its CPUs, of which this process may use 1" in line


@pytest.mark.parametrize(("there", "level"), [(100, "INFO"), (95, "INFO"), (94, "WARNING")])
def test_memory_that_lies_elsewhere_is_a_warning(monkeypatch, lines, there, level):
    monkeypatch.setattr(numa, "nodes_of", lambda *_: [1] * there + [0] * (100 - there))
    numa.report(PAGE, 100 * PAGE, 1)
    ((found, line),) = lines()
    assert found == level
    assert f"{there}.0% of the host pool lies on node 1" in line


# Of fake_root's meminfo: free + page cache - shared memory + reclaimable.
LEFT = (4000000 + 2000000 - 500000 + 100000) * 1024


@pytest.mark.parametrize(
    ("mems_allowed", "policy", "left", "bound"),
    [
        ("0", (0, set()), LEFT, "0"),
        ("0-1", (2, {1}), LEFT, "1"),
        ("0-1", (0, set()), None, ""),
        ("0-1", (1, {1}), None, ""),  # preferred: the rest comes from the other node
        ("0-1", (2, {0, 1}), None, ""),
    ],
)
def test_bound_nodes_must_have_the_memory(tmp_path, monkeypatch, mems_allowed, policy, left, bound):
    monkeypatch.setattr(numa, "process_policy", lambda: policy)
    root = fake_root(tmp_path, mems_allowed=mems_allowed)
    if left is None:
        numa.check_node_memory(1 << 50, root)
        return
    numa.check_node_memory(left, root)
    with pytest.raises(
        HostMemoryError, match=rf"bound to NUMA node {bound}, .*numa-bind.*host_memory_gib"
    ):
        numa.check_node_memory(left + 1, root)


def test_a_refused_policy_leaves_the_cpuset_as_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "_SYSCALLS", {})
    root = fake_root(tmp_path, mems_allowed="1")
    numa.check_node_memory(LEFT, root)
    with pytest.raises(HostMemoryError, match="bound to NUMA node 1, "):
        numa.check_node_memory(LEFT + 1, root)

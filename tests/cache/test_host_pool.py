# SPDX-License-Identifier: Apache-2.0
"""The host pool: exact size, zeroed, separate layers, on the NUMA node wanted, bounded by the
machine and its control group.
"""

import os
from pathlib import Path

import pytest
import torch

from vllm_kcache.cache import HostMemoryError, HostPool, host_pool, numa
from vllm_kcache.cache.host_memory import check_host_memory, host_budget_bytes, host_memory


def make_pool(**changes):
    arguments = {"num_layers": 3, "num_rows": 21, "row_bytes": 2080, "pinned": False}
    return HostPool(**(arguments | changes))


@pytest.mark.parametrize("numa_node", [None, 0])
def test_layers_are_zeroed_contiguous_and_apart(numa_node):
    pool = make_pool(numa_node=numa_node)
    for i in range(3):
        layer = pool.layer(i)
        assert layer.shape == (21, 2080)
        assert layer.dtype == torch.uint8
        assert layer.is_contiguous()
        assert layer.data_ptr() % 4096 == 0
        assert not layer.any()
        layer.fill_(i + 1)
    assert [pool.layer(i).unique().tolist() for i in range(3)] == [[1], [2], [3]]
    pool.close()


def test_size_is_exact_up_to_one_memory_page_a_layer():
    pool = make_pool()
    assert (pool.num_layers, pool.num_rows, pool.row_bytes) == (3, 21, 2080)
    assert pool.layer_bytes == 21 * 2080
    assert 3 * pool.layer_bytes <= pool.bytes < 3 * (pool.layer_bytes + 4096)
    pool.close()


def test_closed_pool_refuses_and_closes_twice():
    pool = make_pool()
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.layer(0)


@pytest.mark.parametrize("name", ["num_layers", "num_rows", "row_bytes"])
def test_bad_shape_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        make_pool(**{name: 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device can pin")
def test_pinned_needs_cuda():
    with pytest.raises(HostMemoryError, match="pinned=True: needs a CUDA device"):
        make_pool(pinned=True)


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(HostMemoryError, match=r"MemAvailable.*host_memory_gib"):
        make_pool(num_rows=1 << 40)


def test_more_than_the_bound_nodes_have_is_refused(monkeypatch):
    asked = []

    def refuse(needed_bytes):
        asked.append(needed_bytes)
        raise HostMemoryError("bound")

    monkeypatch.setattr(numa, "check_node_memory", refuse)
    with pytest.raises(HostMemoryError, match="bound"):
        make_pool(row_bytes=4096)
    assert asked == [3 * 21 * 4096]


def test_a_pinned_pool_is_placed_then_touched_then_locked(monkeypatch):
    """By the GPU's node, and from the CPUs that the placement names."""
    cpu = max(os.sched_getaffinity(0))
    calls = []

    def place(address, length, node):
        calls.append(("place", node, length))
        return {cpu}

    def touch(address, length):
        calls.append(("touch", os.sched_getaffinity(0)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(numa, "gpu_node", lambda: 1)
    monkeypatch.setattr(numa, "place", place)
    monkeypatch.setattr(
        numa, "report", lambda address, length, node: calls.append(("report", node))
    )
    monkeypatch.setattr(host_pool, "_touch", touch)
    monkeypatch.setattr(host_pool, "_register", lambda *_, advice: calls.append(("lock",)))
    monkeypatch.setattr(host_pool, "_release", lambda begins: calls.append(("free", len(begins))))
    before = os.sched_getaffinity(0)
    pool = make_pool(pinned=True)
    pool.close()
    touches = [call for call in calls if call[0] == "touch"]
    rest = [call for call in calls if call[0] != "touch"]
    assert calls[:2] == [("place", 1, pool.bytes), ("touch", {cpu})]
    assert touches == 3 * [("touch", {cpu})]
    assert rest == [("place", 1, pool.bytes), *3 * [("lock",)], ("report", 1), ("free", 3)]
    assert calls.index(("lock",)) < calls.index(("report", 1))
    assert os.sched_getaffinity(0) == before


def test_a_pool_without_a_node_is_neither_placed_nor_touched(monkeypatch):
    def no(*_):
        raise AssertionError

    monkeypatch.setattr(numa, "place", no)
    monkeypatch.setattr(numa, "report", no)
    monkeypatch.setattr(host_pool, "_touch", no)
    make_pool().close()


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"} | files
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_without_control_groups(tmp_path):
    memory = host_memory(fake_root(tmp_path, {}))
    assert memory.cgroup_bytes is None
    assert memory.available_bytes == 8000 * 1024


def test_cgroup_v2_takes_the_tightest_ancestor(tmp_path):
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "5000000\n",
            "sys/fs/cgroup/a/memory.current": "2000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
    )
    assert host_memory(root).cgroup_bytes == 3500000
    check_host_memory(3500000, root)
    with pytest.raises(HostMemoryError, match="control group"):
        check_host_memory(3500001, root)


def test_cgroup_v1_inside_a_container(tmp_path):
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
        },
    )
    assert host_memory(root).cgroup_bytes == 3000000


def test_cgroup_v1_without_limit(tmp_path):
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert host_memory(root).cgroup_bytes is None


def test_ranks_and_engines_share_a_budget(tmp_path: Path):
    """An engine asks the host for its own share: the others may have theirs already."""
    root = fake_root(tmp_path, {})
    available = host_memory(root).available_bytes
    assert host_budget_bytes("auto", 2, 3, root) == int(available * 0.85) // 6
    twice = 2 * available / 2**30
    with pytest.raises(HostMemoryError):
        host_budget_bytes(twice, 2, 1, root)
    assert host_budget_bytes(twice, 2, 2, root) == pytest.approx(available / 2, abs=2)
    with pytest.raises(ValueError, match="engines=0"):
        host_budget_bytes("auto", 1, 0, root)


def test_a_page_lock_holds_whole_pages_as_long_as_its_owner(monkeypatch):
    calls = []
    monkeypatch.setattr(host_pool, "_register", lambda begin, length: calls.append((begin, length)))
    monkeypatch.setattr(host_pool, "_release", lambda begins: calls.append(begins))

    class Owner:
        pass

    page = host_pool._PAGE_BYTES
    memory = torch.zeros(4 * page, dtype=torch.uint8)
    first = -memory.data_ptr() % page
    owner = Owner()
    host_pool.page_lock(owner, memory[first + 8 : first + 16])
    host_pool.page_lock(owner, memory[first + page - 1 : first + page + 1])
    begin = memory.data_ptr() + first
    assert calls == [(begin, page), (begin, 2 * page)]
    del owner
    assert calls[2:] == [[begin], [begin]]

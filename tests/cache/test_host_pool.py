# SPDX-License-Identifier: Apache-2.0
"""The host V pool: exact size, zeroed, separate layers, bounded by the machine and its control
group.
"""

from pathlib import Path

import pytest
import torch

from vllm_kcache.cache import HostMemoryError, HostPool, host_pool
from vllm_kcache.cache.host_memory import check_host_memory, host_budget_bytes, host_memory


def make_pool(**changes):
    arguments = {
        "num_layers": 3,
        "num_pages": 5,
        "num_kv_heads": 2,
        "page_tokens": 16,
        "head_size": 80,
        "dtype": torch.float32,
        "pinned": False,
    }
    return HostPool(**(arguments | changes))


def test_layers_are_zeroed_contiguous_and_apart():
    pool = make_pool()
    for i in range(3):
        layer = pool.layer(i)
        assert layer.shape == (5, 2, 16, 80)
        assert layer.dtype == torch.float32
        assert layer.is_contiguous()
        assert not layer.any()
        layer.fill_(i + 1)
    assert [pool.layer(i).unique().tolist() for i in range(3)] == [[1], [2], [3]]
    pool.close()


def test_size_is_exact_up_to_one_memory_page_a_layer():
    pool = make_pool()
    exact = 3 * 5 * 2 * 16 * 80 * 4
    assert exact <= pool.bytes < exact + 3 * 4096
    pool.close()


def test_closed_pool_refuses_and_closes_twice():
    pool = make_pool()
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.layer(0)


@pytest.mark.parametrize(
    "name", ["num_layers", "num_pages", "num_kv_heads", "page_tokens", "head_size"]
)
def test_bad_shape_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        make_pool(**{name: 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device can pin")
def test_pinned_needs_cuda():
    with pytest.raises(HostMemoryError, match="pinned=True: needs a CUDA device"):
        make_pool(pinned=True)


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(HostMemoryError, match=r"MemAvailable.*host_memory_gib"):
        make_pool(num_pages=1 << 40)


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

# SPDX-License-Identifier: Apache-2.0
"""How much host memory this process may take: the machine, its control group, its own limits."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from pathlib import Path


class HostMemoryError(RuntimeError):
    """The host pool cannot be had; the message names the limit and what to change."""


@dataclass(frozen=True)
class HostMemory:
    """Host memory this process can still take, in bytes.

    Attributes:
        machine_bytes: MemAvailable of the machine.
        cgroup_bytes: what the tightest control group above the process leaves, None without a
            limit.
        process_bytes: what the limits of the process (RLIMIT_AS, RLIMIT_DATA) leave, None without
            one.
    """

    machine_bytes: int
    cgroup_bytes: int | None = None
    process_bytes: int | None = None

    @property
    def available_bytes(self) -> int:
        limits = (self.machine_bytes, self.cgroup_bytes, self.process_bytes)
        return min(limit for limit in limits if limit is not None)

    def limit(self) -> tuple[str, str]:
        """What bounds the memory, as the end of a sentence, and what a user can do about it."""
        gib, left = 2**30, self.available_bytes
        if left == self.process_bytes:
            return (
                f"the address-space limit of this process leaves {left / gib:.2f} GiB",
                "raise that limit (ulimit -v unlimited, ulimit -d unlimited)",
            )
        if left == self.cgroup_bytes:
            return (
                f"the memory limit of this control group leaves {left / gib:.2f} GiB",
                "raise that limit (docker --memory, MemoryMax=)",
            )
        return (
            f"this machine has {left / gib:.2f} GiB available (MemAvailable)",
            "free host memory",
        )


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read the limits. `root` is the file system's root, another one in tests."""
    machine = None
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            machine = int(line.split()[1]) * 1024
    if machine is None:
        raise HostMemoryError(
            "/proc/meminfo has no MemAvailable line: Linux 3.14 or newer is needed"
        )
    limits = [left for left in (_cgroup_v2(root), _cgroup_v1(root)) if left is not None]
    return HostMemory(machine, min(limits, default=None), _process_limit(root))


def check_host_memory(needed_bytes: int, root: Path = Path("/")) -> None:
    """Raise HostMemoryError unless `needed_bytes` more host memory can be taken."""
    memory = host_memory(root)
    if needed_bytes <= memory.available_bytes:
        return
    limit, remedy = memory.limit()
    raise HostMemoryError(
        f"the host pool needs {needed_bytes / 2**30:.2f} GiB, but {limit}: {remedy}, "
        "or set kcache_config.host_memory_gib lower"
    )


def memlock_limit_bytes() -> int | None:
    """RLIMIT_MEMLOCK of this process, None when unlimited.

    NVIDIA's driver locks pages without charging them to this limit on the systems seen, so a low
    value is no reason to refuse beforehand; it is named when the driver does refuse.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _process_limit(root: Path) -> int | None:
    """Least memory that this process may still map."""
    status = root / "proc/self/status"
    sizes = {}
    for line in status.read_text().splitlines() if status.exists() else ():
        name, _, value = line.partition(":")
        if name in ("VmSize", "VmData"):
            sizes[name] = int(value.split()[0]) * 1024
    left = [
        max(0, soft - sizes[name])
        for name, kind in (("VmSize", resource.RLIMIT_AS), ("VmData", resource.RLIMIT_DATA))
        if (soft := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY and name in sizes
    ]
    return min(left, default=None)


def _membership(root: Path) -> dict[str, str]:
    """Control-group path by controller; the unified hierarchy (v2) has the key ''."""
    groups: dict[str, str] = {}
    path = root / "proc/self/cgroup"
    if path.exists():
        for line in path.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = group
    return groups


def _cgroup_v2(root: Path) -> int | None:
    group = _membership(root).get("")
    if group is None:
        return None
    return _tightest(root / "sys/fs/cgroup", group, "memory.max", "memory.current", "inactive_file")


def _cgroup_v1(root: Path) -> int | None:
    group = _membership(root).get("memory")
    if group is None:
        return None
    return _tightest(
        root / "sys/fs/cgroup/memory",
        group,
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    )


def _tightest(mount: Path, group: str, limit: str, usage: str, cache: str) -> int | None:
    """Least memory left over the group and its ancestors.

    Inside a container the group's own path may not be mounted: then the mount is the group.
    """
    parts = [part for part in group.split("/") if part not in ("", "..")]
    tightest = None
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        if not (folder / limit).exists():
            continue
        text = (folder / limit).read_text().strip()
        if text == "max" or int(text) >= 1 << 60:
            continue
        used = int((folder / usage).read_text())
        reclaimable = 0
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.split()[0] == cache:
                reclaimable = int(line.split()[1])
        left = max(0, int(text) - used + reclaimable)
        tightest = left if tightest is None else min(tightest, left)
    return tightest


# Left to the operating system, to page tables and to the rest of the server when the budget is
# "auto".
AUTO_SHARE = 0.85


def host_budget_bytes(
    host_memory_gib: float | str, ranks: int, engines: int = 1, root: Path = Path("/")
) -> int:
    """Host memory that one rank may take for its rows.

    Args:
        host_memory_gib: `kcache_config.host_memory_gib`: GiB for all ranks of this host together,
            or "auto" for 85% of what is available now.
        ranks: ranks of one engine on this host.
        engines: engines on this host that share the budget (data parallelism). They start each on
            its own, so what the others have taken is no longer available: only the share of this
            one is asked of the host.
        root: the file system's root, another one in tests.

    Returns bytes. Raises HostMemoryError when more is asked for than the host can give.
    """
    if min(ranks, engines) < 1:
        raise ValueError(f"ranks={ranks}, engines={engines}: must be at least 1")
    if host_memory_gib == "auto":
        return int(host_memory(root).available_bytes * AUTO_SHARE) // (ranks * engines)
    budget = int(float(host_memory_gib) * 2**30) // engines
    check_host_memory(budget, root)
    return budget // ranks


def too_little_for_one_request(
    host_memory_gib: float | str, tokens: int, needed_bytes: int, root: Path = Path("/")
) -> str:
    """What to say where a host pool cannot hold the longest request that is allowed.

    Args:
        host_memory_gib: `kcache_config.host_memory_gib`.
        tokens: Tokens of that request.
        needed_bytes: What it takes of the budget, on all ranks of this host together.
        root: the file system's root, another one in tests.
    """
    needs = f"one request of max_model_len={tokens} needs"
    if host_memory_gib != "auto":
        # Rounded up, so that the number that is shown is enough.
        gib = math.ceil(needed_bytes / 2**30 * 10_000) / 10_000
        return (
            f"kcache_config.host_memory_gib={host_memory_gib}: {needs} {gib} GiB of host memory; "
            "set it to that at least, or lower --max-model-len"
        )
    limit, remedy = host_memory(root).limit()
    return (
        f"kcache_config.host_memory_gib='auto': {needs} {needed_bytes / AUTO_SHARE / 2**30:.2f} "
        f"GiB of host memory to be available, but {limit}: {remedy}, or lower --max-model-len"
    )

"""What is said to be available is what the system and a container's limits leave."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from vmq.memory import available

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names[:2], "memory.stat"), (limit, used, f"anon 1\n{names[2]} {cached}"), strict=True):
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1000 kB available, and no limits."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:cpu:/\n0::/\n")
    return tmp_path


def test_without_limits_it_is_what_the_system_says(root: Path):
    assert available(root) == 1_024_000
    assert available(root / "nowhere") == math.inf
    (root / "proc" / "self" / "cgroup").unlink()
    assert available(root) == 1_024_000


def test_version_2(root: Path):
    (root / "proc" / "self" / "cgroup").write_text("0::/pod/me\n")
    groups = root / "sys" / "fs" / "cgroup"
    group(groups / "pod" / "me", V2, "max", 100)
    assert available(root) == 1_024_000
    group(groups / "pod", V2, 700_000, 300_000, cached=50_000)            # a limit above its own
    assert available(root) == 450_000
    group(groups / "pod" / "me", V2, 200_000, 300_000)                    # over its limit
    assert available(root) == 0
    group(groups / "pod" / "me", V2, 9_000_000, 0)
    group(groups / "pod", V2, 9_000_000, 0)
    assert available(root) == 1_024_000


def test_version_1(root: Path):
    (root / "proc" / "self" / "cgroup").write_text("9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    group(root / "sys" / "fs" / "cgroup" / "memory", V1, 600_000, 200_000, cached=1000)   # all that a container sees
    assert available(root) == 401_000


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_here():
    assert 0 < available() < math.inf

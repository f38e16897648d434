"""Memory that can still be taken: what the system has left, and what a container's limits leave of it.

Linux grants memory that it does not have, and ends the process that writes to it; so it is asked before. A container's
limits are those of control groups, of version 1 or 2, from a process's own up to the root; files that are only cached
count as used there, but make room when it is needed.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path, PurePosixPath

_FILES = {False: ("memory.max", "memory.current", "inactive_file"),
          True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
"""Limit, what is used, and by which name memory.stat tells what is cached: of version 2, and of version 1."""


def available(root: Path = Path("/")) -> float:
    """Bytes that can be taken; infinite where the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(OSError, KeyError):
        found.append(1024 * _numbers(root / "proc" / "meminfo")["MemAvailable:"])
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    for _, kinds, name in (group.split(":", 2) for group in groups):
        if kinds and "memory" not in kinds.split(","):
            continue
        limit, used, cached = _FILES[bool(kinds)]
        own = PurePosixPath(name.lstrip("/"))
        for group in (own, *own.parents):                # in a container the first ones may not be seen
            folder = root / "sys" / "fs" / "cgroup" / ("memory" if kinds else "") / group
            with contextlib.suppress(OSError, ValueError):       # "max" is no limit
                most, taken = (int((folder / file).read_text(encoding="utf-8")) for file in (limit, used))
                found.append(most - taken + _numbers(folder / "memory.stat").get(cached, 0))
    return max(0, min(found))


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}

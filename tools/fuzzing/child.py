"""One command in a child process, under a limit of memory and time, and how it ended."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from vmq.cli import main as vmq_main

UNCLEAR = re.compile(r"\b(Type|Key|Index|Attribute|Value|Runtime|Assertion|ZeroDivision|Overflow|Recursion|Unicode\w*)"
                     r"Error\b|Traceback|object has no attribute|NoneType|out of memory")
"""What a person should not have to read."""


def be_the_child(command: list[str], said: Path, memory: int, seconds: float) -> None:
    """Run a command of vmq under the limits, what it says going to a file, and end this process with its exit code."""
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))        # libraries do not count
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(said.parent)
        code = vmq_main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, until: float) -> int | None:
    """Exit status of a child; None for one that had to be killed."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def verdict(status: int | None, said: str) -> str:
    """What an exit status, or None for one that was killed, and what was said amount to; see `Outcome` of fuzz.py."""
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return "takes too long"
    if os.WIFSIGNALED(status):
        return f"dies of {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    if code == 0:
        return "done"
    if code != 2:
        return f"exit code {code}"
    lines = said.strip().splitlines()
    if len(lines) != 1 or not lines[0].startswith("vmq: error: ") or len(lines[0]) > 1500:
        return "not one line"
    return "unclear" if UNCLEAR.search(lines[0]) else "refused"

"""Progress of long work, as one line on stderr: what, how much of it, how fast, how long still.

On a terminal the line is redrawn in place and wiped at the end; into a file or a pipe it goes at sparse intervals.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO


class Report(Protocol):
    """How work tells its progress: what is being done, how much of it is done, of how much (None: no end known)."""

    def __call__(self, what: str, done: float, total: float | None) -> None:
        """Say how far it is; a total of 1 stands for a share."""


def silent(what: str, done: float, total: float | None) -> None:
    """Report nothing."""


class Progress:
    """Shows what it is told; use it in a `with`, so that the line is wiped when the work ends.

    Args:
        quiet: show nothing.
        unit: of what is counted.
        stream: where to; default: stderr as it is when the work begins.
        clock: seconds, monotonic.
    """

    def __init__(self, *, quiet: bool = False, unit: str = "frames", stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._unit, self._clock = quiet, unit, clock
        self._live = self._stream.isatty()
        self._interval = 0.2 if self._live else 15.0
        self._width = 0
        self._start = clock()
        self._shown = self._start - (self._interval if self._live else 0.0)  # a terminal shows the first call
        self._base = self._done = 0.0
        self._total: float | None = None

    def __call__(self, what: str, done: float, total: float | None) -> None:
        """Show where the work is; a smaller `done` or another total begins a new estimate."""
        now = self._clock()
        if done < self._done or total != self._total:
            self._start, self._base = now, done
        self._done, self._total = done, total
        if not self._quiet and now - self._shown >= self._interval:
            self._shown = now
            self._draw(f"{what}: {self._text(now)}")

    def _text(self, now: float) -> str:
        seconds = now - self._start
        speed = (self._done - self._base) / seconds if seconds > 0 else 0.0
        if self._total == 1:
            parts = [f"{self._done:.0%}"]
        else:
            of = "" if self._total is None else f" of {self._total:.0f}"
            parts = [f"{self._done:.0f}{of} {self._unit}"] + ([f"{speed:.1f} {self._unit}/s"] if speed else [])
        if self._total is not None and speed and self._done < self._total:
            parts.append(f"{clock_time((self._total - self._done) / speed)} left")
        return ", ".join(parts)

    def _draw(self, line: str) -> None:
        if self._live:
            most = shutil.get_terminal_size().columns - 1
            line = line if len(line) <= most else f"...{line[len(line) - most + 3:]}"  # numbers stand at its end
            self._stream.write(f"\r{line:<{self._width}}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def wipe(self) -> None:
        """Take the line off the terminal, to print something else."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.wipe()


def clock_time(seconds: float) -> str:
    """Seconds as `0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

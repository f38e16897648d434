"""Hostile models, media, recipes, dumps: the answer is a result or one clear line, soon and in bounded memory.

Each case is made from its number: a small network with changed bytes or a changed structure, a picture or video or
recipe that is broken, a dump with a broken file, or any of these far larger than it should be (sparse, so that it takes
no room). A child process, forked from this one after the imports, gives it to `vmq compile`, `run`, `eval` or `inspect`
under a limit of memory and time. A find is a case that ends in another way than exit code 0 or 2 with one line, or
takes longer, or whose one line only repeats what Python said, or that it is out of memory. `--case N` runs a single
case again and shows what is said. tools/fuzzing/ holds the parts.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzzing.cases import Seeds, make_case
from fuzzing.child import be_the_child, verdict, wait


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "done", "refused", or what is wrong with it; and what was said."""

    kind: str
    verdict: str
    said: str
    seconds: float

    @property
    def is_find(self) -> bool:
        """Whether something is wrong."""
        return self.verdict not in ("done", "refused")


def run_case(number: int, seeds: Seeds, *, memory: int, seconds: float) -> Outcome:
    """Run a case in a child process with so many bytes of memory more than it starts with, and so much time."""
    folder = Path(tempfile.mkdtemp(prefix="vmq-fuzz-"))
    try:
        kind, command = make_case(number, seeds, folder)
        started, said = time.monotonic(), folder / "said"
        child = os.fork()
        if child == 0:
            be_the_child(command, said, memory, seconds)
        status = wait(child, started + 4 * seconds)
        elapsed = time.monotonic() - started
        words = said.read_text(errors="replace") if said.exists() else ""
        return Outcome(kind, verdict(status, words), words, elapsed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=(__doc__ or "").partition("\n")[0],
                                     epilog="Exit code: 0 nothing found, 1 something was.")
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, metavar="N", help="how long (default: 10)")
    add("--cases", type=int, metavar="N", help="stop after so many cases")
    add("--first", type=int, default=0, metavar="N", help="number of the first case (default: 0)")
    add("--case", type=int, metavar="N", help="run this case alone, and show what is said")
    add("--memory", type=float, default=4.0, metavar="GIB", help="what a case may use (default: 4)")
    add("--seconds", type=float, default=60.0, metavar="N", help="processor time that a case may take (default: 60)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vmq-fuzz-") as folder:
        seeds = Seeds.make(Path(folder))
    limits = {"memory": int(args.memory * 2**30), "seconds": args.seconds}
    if args.case is not None:
        outcome = run_case(args.case, seeds, **limits)
        print(f"case {args.case} ({outcome.kind}): {outcome.verdict}, {outcome.seconds:.1f} s\n{outcome.said}")
        return int(outcome.is_find)
    started, number, stopped = time.monotonic(), args.first, list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))       # count what was done until then
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    while time.monotonic() < started + 60.0 * args.minutes and number - args.first != args.cases and not stopped:
        outcome = run_case(number, seeds, **limits)
        counts[outcome.kind, outcome.verdict] += 1
        if outcome.is_find:
            last = outcome.said.strip().splitlines()[-1:] or [""]
            print(f"case {number} ({outcome.kind}): {outcome.verdict}, {outcome.seconds:.1f} s: {last[0][:400]}",
                  flush=True)
        number += 1
    print(f"{number - args.first} cases in {(time.monotonic() - started) / 60.0:.1f} minutes: " + ", ".join(
        f"{count} {kind} {verdict}" for (kind, verdict), count in sorted(counts.items())))
    return int(any(verdict not in ("done", "refused") for _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())

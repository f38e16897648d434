"""The same inputs, seed, machine and number of processors give the same bytes; with another number, how far it is.

Compiles on one processor twice and on `--processors` twice, each in a process of its own that may use no more, and
compares the files: byte by byte, and where they differ, constant by constant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmq.graph import Graph

ROOT = Path(__file__).resolve().parents[1]


def compile_on(processors: int, arguments: Sequence[str], output: Path) -> Graph:
    """Run `vmq compile` on so many processors.

    Raises:
        RuntimeError: it failed; holds what it said.
    """
    free = sorted(os.sched_getaffinity(0))[:processors]
    environment = {**os.environ, "OMP_NUM_THREADS": str(processors),
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "vmq", "compile", *arguments, "-o", str(output), "-q"]
    done = subprocess.run(command, env=environment,
                          preexec_fn=lambda: os.sched_setaffinity(0, free), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return Graph.load(output)


def difference(one: Graph, other: Graph) -> str:
    """In words: the same bytes, or how many constants differ, and by how much."""
    if one.to_bytes() == other.to_bytes():
        return "the same bytes"
    ours, theirs = ({c.name: np.asarray(c.values) for c in g.constants()} for g in (one, other))
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    if len(shared) < max(len(ours), len(theirs)):
        return f"other graphs: {len(shared)} constants in common of {len(ours)} and {len(theirs)}"
    values = sum(ours[n].size for n in shared)
    differ = {n: ours[n].astype(np.float64) - theirs[n].astype(np.float64) for n in shared
              if not np.array_equal(ours[n], theirs[n])}
    integers = [d for n, d in differ.items() if ours[n].dtype.kind in "iuV"]
    floats = [np.abs(d) / np.maximum(np.abs(theirs[n].astype(np.float64)), 1e-12)
              for n, d in differ.items() if ours[n].dtype.kind == "f"]
    parts = [f"{len(differ)} of {len(shared)} constants differ, {sum(int((d != 0).sum()) for d in differ.values())} of "
             f"{values} values"]
    if integers:
        parts.append(f"integers by at most {max(float(np.abs(d).max()) for d in integers):.0f}")
    if floats:
        parts.append(f"scales by at most {max(float(d.max()) for d in floats):.2e} of their size")
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/determinism", description=(__doc__ or "").partition("\n")[0],
                                     epilog="What follows MODEL goes to `vmq compile`. Exit code: 1 if two runs on the "
                                            "same number of processors differ.")
    parser.add_argument("--processors", type=int, default=2, metavar="N", help="the other number (default: 2)")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    args, rest = parser.parse_known_args(arguments)
    here = len(os.sched_getaffinity(0))
    if not 2 <= args.processors <= here:
        print(f"tools/determinism: error: --processors {args.processors}: {here} can be used here, and it takes 2 or "
              "more to compare with one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vmq-determinism-") as folder:
        made: dict[int, Graph] = {}
        differs = False
        for count in (1, args.processors):
            try:
                made[count], again = (compile_on(count, [args.model, *rest], Path(folder) / "out.onnx")
                                      for _ in range(2))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 2
            said = difference(made[count], again)
            differs |= said != "the same bytes"
            print(f"{count} processor{'s' * (count > 1)}, twice: {said}", flush=True)
        print(f"1 and {args.processors} processors: {difference(made[1], made[args.processors])}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())

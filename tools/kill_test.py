"""A compile that is killed again and again and resumed writes the bytes of one that was left alone.

Compiles once undisturbed and takes the time. Then the same with `kill -9` at random points of that time, each followed
by `--resume`; a run that ends before its kill begins anew, so that early and late stages are hit alike. After every
kill the output must not be there, and beside it nothing but the folder of unfinished work (with `--dump` the dump, too,
which the next run replaces); at the end the bytes are compared. Which pass a kill hit is read off the progress line.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class KillError(Exception):
    """What a killed or resumed compile did wrong; one line."""


def compile_until(arguments: Sequence[str], output: Path, seconds: float | None, *, resume: bool) -> str | None:
    """Run `vmq compile`, killed after so many seconds; returns the stage it was at, None if it had ended before."""
    command = [sys.executable, "-m", "vmq", "compile", *arguments, "-o", str(output), *["--resume"] * resume]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                   "COLUMNS": "300"}
    ours, theirs = pty.openpty()                # to a terminal the progress line is written five times a second
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said, reader = bytearray(), threading.Thread(target=lambda: said.extend(_read_all(ours)))
    reader.start()
    try:
        child.wait(timeout=seconds)
        killed = False
    except subprocess.TimeoutExpired:
        killed = True
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        reader.join()
        os.close(ours)
    words = said.decode(errors="replace")
    if not killed and child.returncode:
        raise KillError(f"vmq compile ended with {child.returncode}: {' '.join(words.split())[-300:]}")
    return stage(words) if killed else None


def _read_all(terminal: int) -> bytes:
    """What comes over a terminal until nobody holds its other end."""
    content = bytearray()
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:                         # Linux says so that the other end is closed
            return bytes(content)
        if not piece:
            return bytes(content)
        content += piece


def stage(said: str) -> str:
    """The pass that the last progress line names."""
    lines = re.findall(r"\r(\w+ \(\d+ of \d+\))", said)
    return lines[-1] if lines else "before the first pass"


def check_killed(output: Path, *expected: str) -> int:
    """Look at what is left behind, beside what is expected; returns how many finished pieces of work are kept."""
    folder = Path(f"{output}.unfinished")
    others = sorted({p.name for p in output.parent.iterdir()} - {folder.name, *expected})
    ours = tuple(f".{name}." for name in (output.name, *expected))            # locks and temporary files
    if any(not name.startswith(ours) for name in others):
        raise KillError(f"{', '.join(others)} was left behind")
    return len(list(folder.glob("[!.]*.npz"))) if folder.is_dir() else 0


def files(dump: Path) -> dict[str, str | None]:
    """The files of a dump: of models the hash of their content; of the others, which tell times and places, none."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() if p.suffix == ".onnx" else None
            for p in dump.iterdir() if not p.name.startswith(".")}


def run(arguments: Sequence[str], kills: int, seed: int, folder: Path, *, dump: bool = False) -> None:
    """Compile, kill, resume and compare in a folder, with a dump or without; prints a line a kill.

    Raises:
        KillError: something was left behind that should not, or the bytes differ.
    """
    alone, output = folder / "alone" / "out.onnx", folder / "killed" / "out.onnx"
    alone.parent.mkdir()
    output.parent.mkdir()
    dumps = ["dump"] * dump

    def compile_(to: Path, seconds: float | None, *, resume: bool) -> str | None:
        more = [a for name in dumps for a in ("--dump", str(to.with_name(name)))]
        return compile_until([*arguments, *more], to, seconds, resume=resume)

    started = time.monotonic()
    compile_(alone, None, resume=False)
    whole = time.monotonic() - started
    want = hashlib.sha256(alone.read_bytes()).hexdigest()
    print(f"undisturbed: {whole:.1f} s, sha256 {want[:16]}", flush=True)
    rng, done, resumes, finished = random.Random(seed), 0, False, 0
    while True:
        seconds = rng.uniform(0.0, whole) if done < kills else None
        at = compile_(output, seconds, resume=resumes)
        if at is None:
            if hashlib.sha256(output.read_bytes()).hexdigest() != want:
                raise KillError(f"other bytes after {done} kills")
            if check_killed(output, output.name, *dumps):
                raise KillError("a finished compile left its unfinished work")
            if dump and files(output.with_name("dump")) != files(alone.with_name("dump")):
                raise KillError(f"another dump after {done} kills")
            finished += 1
            if done >= kills:
                break
            output.unlink()
            resumes = False
            continue
        done, resumes = done + 1, True
        print(f"kill {done} after {seconds:.1f} s, in {at}: {check_killed(output, *dumps)} finished pieces kept",
              flush=True)
    print(f"{done} kills, {finished} compiles that came to their end: the same bytes every time")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/kill_test", description=(__doc__ or "").partition("\n")[0],
                                     epilog="What follows MODEL goes to `vmq compile`, such as --bits 4 --effort fast.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--dump", action="store_true", help="let the compiles write a dump, and compare that, too")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    args, rest = parser.parse_known_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="vmq-kill-"))
    try:
        run([args.model, *rest], args.kills, args.seed, folder, dump=args.dump)
    except KillError as error:
        print(f"tools/kill_test: FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

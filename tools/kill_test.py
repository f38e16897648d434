"""A compile that is killed again and again and resumed writes the bytes of one that was left alone.

Compiles once undisturbed and takes the time. Then the same with `kill -9` at random points of that time, each followed
by `--resume`; a run that ends before its kill begins anew, so that early and late stages are hit alike. After every
kill the output must not be there, and beside it nothing but the folder of unfinished work; at the end the bytes are
compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class KillError(Exception):
    """What a killed or resumed compile did wrong; one line."""


def compile_until(arguments: Sequence[str], output: Path, seconds: float | None, *, resume: bool) -> bool:
    """Run `vmq compile`, killed after so many seconds; returns whether it came to its end before."""
    command = [sys.executable, "-m", "vmq", "compile", *arguments, "-o", str(output), "-q", *["--resume"] * resume]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        return False
    finally:
        child.kill()
    if child.returncode:
        raise KillError(f"vmq compile ended with {child.returncode}: {' '.join(said.split())[-300:]}")
    return True


def check_killed(output: Path, *expected: str) -> int:
    """Look at what is left behind, beside what is expected; returns how many finished pieces of work are kept."""
    folder = Path(f"{output}.unfinished")
    others = sorted({p.name for p in output.parent.iterdir()} - {folder.name, *expected})
    if any(not name.startswith(f".{output.name}.") for name in others):       # the lock and temporary files
        raise KillError(f"{', '.join(others)} was left behind")
    return len(list(folder.glob("[!.]*.npz"))) if folder.is_dir() else 0


def run(arguments: Sequence[str], kills: int, seed: int, folder: Path) -> None:
    """Compile, kill, resume and compare in a folder; prints a line a kill.

    Raises:
        KillError: something was left behind that should not, or the bytes differ.
    """
    alone, output = folder / "alone" / "out.onnx", folder / "killed" / "out.onnx"
    alone.parent.mkdir()
    output.parent.mkdir()
    started = time.monotonic()
    compile_until(arguments, alone, None, resume=False)
    whole = time.monotonic() - started
    want = hashlib.sha256(alone.read_bytes()).hexdigest()
    print(f"undisturbed: {whole:.1f} s, sha256 {want[:16]}", flush=True)
    rng, done, resumes, finished = random.Random(seed), 0, False, 0
    while True:
        seconds = rng.uniform(0.0, whole) if done < kills else None
        if compile_until(arguments, output, seconds, resume=resumes):
            if hashlib.sha256(output.read_bytes()).hexdigest() != want:
                raise KillError(f"other bytes after {done} kills")
            if check_killed(output, output.name):
                raise KillError("a finished compile left its unfinished work")
            finished += 1
            if done >= kills:
                break
            output.unlink()
            resumes = False
            continue
        done, resumes = done + 1, True
        print(f"kill {done} after {seconds:.1f} s: {check_killed(output)} finished pieces kept", flush=True)
    print(f"{done} kills, {finished} compiles that came to their end: the same bytes every time")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/kill_test", description=(__doc__ or "").partition("\n")[0],
                                     epilog="What follows MODEL goes to `vmq compile`, such as --bits 4 --effort fast.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    args, rest = parser.parse_known_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="vmq-kill-"))
    try:
        run([args.model, *rest], args.kills, args.seed, folder)
    except KillError as error:
        print(f"tools/kill_test: FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

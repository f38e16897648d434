"""Do the tests pass with the oldest and with the newest release of every dependency that pyproject.toml admits?

Each pair of a Python and an end of the ranges has an environment of its own in a cache folder, made at first use.
`oldest` takes every dependency at its lower bound, `newest` lets pip choose, anew every day. Then, if a compiled model
is given, tools/check_runtimes says whether it gives the same alpha on the oldest ONNX Runtime for it and on the newest.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
ENDS = ("oldest", "newest")
LIMIT = 5400
"""Seconds that the tests may take: a crash in a worker can leave the others waiting."""


def oldest(project: str) -> list[str]:
    """The lower bound of every dependency of a pyproject.toml, extras for tests included, as pins.

    Raises:
        ValueError: a dependency has none.
    """
    table = tomllib.loads(project)["project"]
    pins = []
    for line in (*table["dependencies"], *table["optional-dependencies"]["test"]):
        found = re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][0-9A-Za-z.]*)(\s*;.*)?", line)
        if found is None:
            raise ValueError(f"{line!r} has no lower bound")
        # the first release that begins so: 4.10 stands for 4.10.0.82
        pins.append(f"{found[1]}>={found[2]},<{_next(found[2])}{found[3] or ''}")
    return pins


def _next(version: str) -> str:
    """The first version after all that begin with this one: 1.26 -> 1.27, 0.5.8 -> 0.5.9."""
    *front, last = version.split(".")
    return ".".join([*front, str(int(last) + 1)])


def environment(python: str, end: str, cache: Path) -> Path:
    """The interpreter of an environment with vmq and its dependencies at one end of their ranges.

    Raises:
        subprocess.CalledProcessError: pip finds no such releases, or cannot install them.
    """
    pins = oldest((ROOT / "pyproject.toml").read_text(encoding="utf-8")) if end == "oldest" else []
    folder = cache / f"versions-{python}-{end}"
    stamp, project = folder / "stamp", (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = "\n".join(pins) or f"{datetime.date.today()}\n{project}"        # what is newest today may not be tomorrow
    interpreter = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([f"python{python}", "-m", "venv", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", str(constraints), "-e", f"{ROOT}[test]"], check=True)
        if subprocess.run([str(interpreter), "-c", "import cv2"], capture_output=True, check=False).returncode:
            pip = [str(interpreter), "-m", "pip", "uninstall", "--quiet", "--yes", "opencv-python"]
            subprocess.run(pip, check=True)           # no libGL here
            headless = [p.replace("python", "python-headless", 1) for p in pins if p.startswith("opencv-python")]
            subprocess.run([*install, *(headless or ["opencv-python-headless"])], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return interpreter


def runs(python: str) -> bool:
    """Whether there is such a Python: a name alone may be a shim of pyenv that ends with an error."""
    try:
        return not subprocess.run([f"python{python}", "--version"], capture_output=True, check=False).returncode
    except OSError:
        return False


def check(python: str, end: str, cache: Path, arguments: Sequence[str]) -> str | None:
    """Run the tests in one environment; returns a line of what they said, None where there is no such Python."""
    if not runs(python):
        return None
    try:
        interpreter = environment(python, end, cache)
    except subprocess.CalledProcessError as error:
        return f"failed: {' '.join(map(str, error.cmd))[:200]}"
    try:
        done = subprocess.run([str(interpreter), "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", *arguments],
                              cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"failed: the tests did not end in {LIMIT // 60} minutes"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line}", flush=True)
    said = lines[-1].strip("= ") if lines else " ".join(done.stderr.split())[-200:]
    return said if done.returncode == 0 else f"failed: {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/check_versions", description=(__doc__ or "").partition("\n")[0],
                                     epilog="Other options go to pytest: tools/check_versions -k states. Exit code: "
                                            "0 all that ran has passed, 1 something failed, or nothing ran.")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y", help="default: 3.11 3.12 3.13")
    parser.add_argument("--ends", nargs="+", default=ENDS, choices=ENDS, help="default: both")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vmq",
                        metavar="DIR", help="where environments are kept (default: ~/.cache/vmq)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a compiled model to run on other releases, too")
    args, rest = parser.parse_known_args(arguments)
    cache, counts = args.cache.expanduser(), collections.Counter[str]()
    for python in args.python:
        for end in args.ends:
            said = check(python, end, cache, rest)
            counts["skipped" if said is None else "failed" if said.startswith("failed") else "passed"] += 1
            print(f"Python {python}, {end}: {said or f'skipped: no python{python} here'}", flush=True)
    if args.model:
        done = subprocess.run([str(ROOT / "tools" / "check_runtimes"), str(args.model)], check=False)
        counts["failed" if done.returncode else "passed"] += 1
    print(", ".join(f"{counts[what]} {what}" for what in ("passed", "failed", "skipped")))
    return int(counts["failed"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())

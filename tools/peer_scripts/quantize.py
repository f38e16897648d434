"""Runs one peer inside its own environment: `python quantize.py PEER VARIANT MODEL FRAMES OUTPUT`.

A peer is a file with_PEER.py here, with a function `quantize(variant, model, frames, output)` that calls the tool's
documented API and writes OUTPUT. What happened is written to OUTPUT.json: the error as one line, if there was one,
and the versions in this environment. Nothing here knows vmq, which is not installed where this runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import sys
import traceback
from pathlib import Path

LONGEST = 300
"""Characters of an error that are kept."""


def main(peer: str, variant: str, model: str, frames: str, output: str) -> int:
    """Run the peer; returns 0 if it wrote its model, 1 if it failed."""
    _end_with_parent()
    error = None
    try:
        script = importlib.import_module(f"with_{peer}")
        script.quantize(variant, Path(model), Path(frames), Path(output))
        if not Path(output).is_file():
            error = "it ended without an error and without a model"
    except BaseException as raised:      # a row of the table, whatever it is
        traceback.print_exc()
        error = one_line(raised)
    found = {"error": error, "versions": versions()}
    Path(f"{output}.json").write_text(json.dumps(found), encoding="utf-8")
    return int(error is not None)


def one_line(error: BaseException) -> str:
    """Type and message of an error in one line; where it was raised if it has no message (a bare assert)."""
    message = " ".join(str(error).split())
    if not message and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"(no message; {Path(frame.filename).name} line {frame.lineno}: {frame.line})"
    return f"{type(error).__name__}: {message}"[:LONGEST]


def versions() -> dict[str, str]:
    """What this environment holds of the packages that matter to a result."""
    found = {}
    for name in ("onnx", "onnxruntime", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _end_with_parent() -> None:
    """End when the process that started this one does; be the one that ends where memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

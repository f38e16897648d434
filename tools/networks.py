"""One table for several networks: compiled at every width, how far alpha is from the float network's, and how fast.

Fidelity is the distance of alpha to the float network's on clips that calibration did not see, each network in its own
closed loop (MAD and MSE x 1e3, dtSSD x 1e2). Latency is measured in turn: one frame of each model, round by round, and
the ratio of medians. What is compiled stays in --work and is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime as ort

import vmq
from vmq.bench import processor
from vmq.clips import Clip, Frame, open_clips
from vmq.errors import VmqError
from vmq.evaluate import evaluate
from vmq.runtime import Session
from vmq.synthetic import synthetic_clips

BITS = ("8", "w4a8", "4")
NAMES = {"8": "W8A8", "w4a8": "W4A8", "4": "W4A4"}
HEAD = """| network | bits | recipe | MB | x smaller | MAD | MSE | dtSSD | x faster | compile s | layers wider |
|---|---|---|---|---|---|---|---|---|---|---|"""


def compiled(model: Path, bits: str, recipe: str, options: argparse.Namespace) -> Path:
    """The compiled file, made now or before; what compiling it said stands beside it as JSON."""
    name = f"{model.stem}_{NAMES[bits].lower()}_{recipe}_{options.effort}"
    output = options.work / f"{name}.onnx"
    if not output.exists():
        print(f"compiling {name}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        result = vmq.compile(model, bits=bits, recipe=recipe, effort=options.effort, calib=options.calib,
                             output=output)
        said = result.to_json() | {"seconds": time.perf_counter() - started}
        output.with_suffix(".json").write_text(json.dumps(said), encoding="utf-8")
    return output


def latencies(models: Sequence[Path], frame: Frame, rounds: int, threads: int) -> list[float]:
    """Median seconds of a frame for each model; one frame of each in turn, after two to warm up."""
    sessions = [Session(m, threads=threads) for m in models]
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 2):
        for session, seen in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.step(frame)
            if number >= 2:
                seen.append(time.perf_counter() - started)
    return [float(np.median(t)) for t in times]


def held_out(model: Path, options: argparse.Namespace) -> list[Clip]:
    """The clips of --eval at the model's size, or built-in ones of another seed than calibration's."""
    height, width = (n or d for n, d in zip(Session(model).size, (288, 512), strict=True))
    clips = open_clips(options.eval, (height, width)) if options.eval else synthetic_clips((height, width), seed=99)
    return [clip.part(0, options.frames) for clip in clips[:options.clips]]


def rows(model: Path, options: argparse.Namespace) -> list[str]:
    """The lines of one network: a line a width and recipe."""
    clips = held_out(model, options)
    made = [(bits, recipe, compiled(model, bits, recipe, options)) for bits in options.bits
            for recipe in options.recipes]
    files = [model, *(path for _, _, path in made)]
    scores = evaluate([str(f) for f in files[1:]], clips, reference=str(model), threads=options.threads)
    exact, *ours = latencies(files, next(clips[0].frames()), options.rounds, options.threads)
    lines = [f"| {model.stem} | float32 | | {model.stat().st_size / 1e6:.2f} | | 0 | 0 | 0 "
             f"| {exact * 1e3:.0f} ms | | |"]
    for (bits, recipe, path), seconds in zip(made, ours, strict=True):
        away = scores[str(path)].fidelity or {}
        said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        wider = said["passes"]["insert_qdq"]["report"]["wider"]
        lines.append(f"| {model.stem} | {NAMES[bits]} | {recipe} | {path.stat().st_size / 1e6:.2f} "
                     f"| {model.stat().st_size / path.stat().st_size:.1f} | {away['MAD']:.2f} | {away['MSE']:.2f} "
                     f"| {away['dtSSD']:.2f} | {exact / seconds:.2f} | {said['seconds']:.0f} "
                     f"| {len(wider)} of {said['passes']['insert_qdq']['report']['layers']} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Compile networks at every width and print a Markdown table of fidelity and speed.",
        epilog="example: tools/networks rvm.onnx modnet.onnx --calib calib/ --eval eval/ --work networks/")
    add = parser.add_argument
    add("models", nargs="+", type=Path, help="float ONNX files")
    add("--calib", nargs="*", type=Path, default=[], help="as vmq compile takes it (default: built-in clips)")
    add("--eval", nargs="*", type=Path, default=[], help="held-out clips, alpha not needed (default: built-in clips)")
    add("--clips", type=int, default=4, help="of --eval, at most (default 4)")
    add("--frames", type=int, default=32, help="of each clip, at most (default 32)")
    add("--bits", nargs="+", choices=BITS, default=list(BITS))
    add("--recipes", nargs="+", default=["vmq", "mse"])
    add("--effort", default="fast")
    add("--rounds", type=int, default=20, help="frames that latency is the median of (default 20)")
    add("--threads", type=int, default=1)
    add("--work", type=Path, default=Path("networks"), help="folder for compiled files (default networks/)")
    options = parser.parse_args(arguments)
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        print(f"{date.today()}, {processor()}, {options.threads} thread(s), ONNX Runtime {ort.__version__}\n")
        print(HEAD, flush=True)
        for model in options.models:
            print("\n".join(rows(model, options)), flush=True)
    except (VmqError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

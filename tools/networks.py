"""One table for several networks: compiled at every width, how far alpha is from the float network's, and how fast.

Fidelity is the distance of alpha to the float network's on clips that calibration did not see, each network in its own
closed loop (MAD and MSE x 1e3, dtSSD x 1e2). Latency is measured in turn: one frame of each model, round by round, and
the ratio of medians. What is compiled stays in --work and is not compiled again for the same weights, footage and
options; a compile that was stopped goes on (its seconds are then those of the last run). A network that fails has the
error in its line, and the others follow.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import vmq
from vmq.bench import processor
from vmq.clips import Clip, fingerprint, open_clips
from vmq.errors import VmqError
from vmq.evaluate import evaluate
from vmq.files import write_atomic
from vmq.graph import Graph
from vmq.pictures import Frame
from vmq.proto import file_size
from vmq.recipe import Recipe
from vmq.runtime import Session
from vmq.synthetic import synthetic_clips

BITS = ("8", "w4a8", "4")
NAMES = {"8": "W8A8", "w4a8": "W4A8", "4": "W4A4"}
ERROR = "error: "
HEAD = """| network | bits | recipe | MB | x smaller | MAD | MSE | dtSSD | x faster | compile s | layers wider |
|---|---|---|---|---|---|---|---|---|---|---|"""


def compiled(model: Path, bits: str, recipe: str, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The compiled file, made now or before, and what compiling it said, which stands beside it as JSON."""
    work = [hashlib.sha256(Graph.load(model).to_bytes()).hexdigest(), bits, repr(Recipe.load(recipe)), options.effort,
            sorted(fingerprint(options.calib).items()), vmq.__version__]
    key = hashlib.sha256(repr(work).encode()).hexdigest()[:12]
    output = options.work / f"{model.stem}_{NAMES[bits].lower()}_{Path(recipe).stem}_{options.effort}_{key}.onnx"
    said = output.with_suffix(".json")
    if not (output.exists() and said.exists()):
        print(f"compiling {output.stem}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        result = vmq.compile(model, bits=bits, recipe=recipe, effort=options.effort, calib=options.calib,
                             output=output, resume=True)
        text = json.dumps(result.to_json() | {"seconds": time.perf_counter() - started})
        write_atomic(said, text.encode())
    return output, json.loads(said.read_text(encoding="utf-8"))


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


def rows(model: Path, options: argparse.Namespace) -> Iterator[str]:
    """The lines of one network, each as soon as it is measured: a line a width and recipe, errors among them.

    Raises:
        VmqError, OSError: the float network cannot be run, or the clips not be read.
    """
    clips = held_out(model, options)
    frame, size = next(clips[0].frames()), file_size(model)
    exact, = latencies([model], frame, options.rounds, options.threads)
    yield f"| {model.stem} | float32 | | {size / 1e6:.2f} | | 0 | 0 | 0 | {exact * 1e3:.0f} ms | | |"
    for bits, recipe in itertools.product(options.bits, options.recipes):
        begin = f"| {model.stem} | {NAMES[bits]} | {Path(recipe).stem} |"
        try:
            path, said = compiled(model, bits, recipe, options)
            scores = evaluate([str(path)], clips, reference=str(model), threads=options.threads)
            exact, seconds = latencies([model, path], frame, options.rounds, options.threads)
        except (VmqError, OSError) as error:
            yield failed(begin, error)
            continue
        away, placed = scores[str(path)].fidelity or {}, said["passes"]["insert_qdq"]["report"]
        yield (f"{begin} {file_size(path) / 1e6:.2f} | {size / file_size(path):.1f} | {away['MAD']:.2f} "
               f"| {away['MSE']:.2f} | {away['dtSSD']:.2f} | {exact / seconds:.2f} | {said['seconds']:.0f} "
               f"| {len(placed['wider'])} of {placed['layers']} |")


def failed(begin: str, error: Exception) -> str:
    """A line that begins so, and ends with an error, which is told at once as well."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return f"{begin} {ERROR}{str(error).replace('|', '/')} | | | | | | | |"


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
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{date.today()}, {processor()}, {options.threads} thread(s), ONNX Runtime {ort.__version__}\n")
    print(HEAD, flush=True)
    wrong = False
    for model in options.models:
        try:
            for line in rows(model, options):
                print(line, flush=True)
                wrong |= ERROR in line
        except (VmqError, OSError) as error:
            print(failed(f"| {model.stem} | | |", error), flush=True)
            wrong = True
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

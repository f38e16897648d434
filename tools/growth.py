"""How time and memory of a compile grow with frames, with the size of a frame and with blocks, and where the time goes.

Every compile is a process of its own on the built-in clips, so that its peak memory is its own. Blocks are those of
one compile: when each was done, and the peak until then. The profile is torch's own, of a few steps of every block.
"""

# ruff: noqa: ARG002  (the methods of Observer have one signature)

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import vmq
from vmq.bench import processor
from vmq.crops import resized
from vmq.errors import OptionError, VmqError
from vmq.graph import Graph
from vmq.pipeline import Observer, Pass, PassResult
from vmq.runtime import Session
from vmq.spec import EFFORTS, Effort
from vmq.synthetic import synthetic_clips

FRAMES = (32, 64, 128, 256)
"""Calibration frames; sequences of eight frames for the blocks come out of as many."""
SIZES = (0.5, 1.0, 2.0)
"""Sizes of the frame, relative to the model's."""
ERROR = "tools/growth: error: "
HEAD = "| seconds | of these for learning blocks | peak MiB |\n|---|---|---|---|"
KINDS = (("convolution, backward", ("convolution_backward",)),
         ("convolution, forward", ("convolution",)),
         ("fake quantizers", ("_FakeQuantize", "round", "clamp", "hardtanh", "div", "where", "SoftRounding")),
         ("random dropping", ("random_", "lerp", "lt", "view")),
         ("copies, sums, losses", ("copy_", "add", "sub", "mul", "sum", "cat", "stack", "pow", "mean", "dot", "fill_")))


def effort_of(frames: int, steps: int) -> Effort:
    """`standard` with so many frames, and so many steps a block: those do not grow with frames."""
    return replace(EFFORTS["standard"], name=f"{frames} frames", calibration=frames, bias_frames=max(8, frames // 4),
                   sequences=frames // 8, frames=8, block_iterations=steps, loop_frames=min(frames, 64))


class _Watch(Observer):
    """Seconds of every pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:
        """Note the time."""
        self.seconds[step.name] = seconds


class _Profile:
    """Seconds of torch's operators in the last steps of every block, from the second on: the first one warms up.

    A profile of all the rest as well would not fit into memory.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.seconds = steps, Counter[str](), Counter[str]()
        self._running: Any = None

    def step(self, block: str) -> None:
        """A block has made a step."""
        self.done[block] += 1
        if self.done[block] == 1 and self.steps > 1:
            config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            self._running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                   experimental_config=config)
            self._running.__enter__()
        elif self.done[block] == self.steps and self._running is not None:
            self._running.__exit__(None, None, None)
            self.seconds.update({e.key: e.self_cpu_time_total / 1e6 for e in self._running.key_averages()})


def measure(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """Compile as a job says, in this process; seconds, and peak memory in MiB."""
    graph = Graph.load(model)
    if job["scale"] != 1.0:
        graph = resized(graph, job["scale"])
    effort = effort_of(job["frames"], job["steps"])
    watch, profile, blocks = _Watch(), _Profile(job["steps"]), dict[str, tuple[float, float]]()

    def progress(what: str, _share: float) -> None:
        if what.startswith("block") and "error" in what:
            blocks.setdefault(what, (time.perf_counter() - started, _peak()))
        elif what.startswith("block") and job["profile"]:
            profile.step(what)

    started = time.perf_counter()
    vmq.compile(graph, bits=job["bits"], recipe=job["recipe"], effort=effort, calib=job["footage"], observers=[watch],
                progress=progress)
    return {"seconds": time.perf_counter() - started, "peak": _peak(), "passes": watch.seconds,
            "blocks": list(blocks.values()), "operators": profile.seconds}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_footage(path: Path, size: tuple[int, int], frames: int) -> str:
    """A video of the built-in clips, over and over, of (H, W) and so many frames; returns its path."""
    clips = synthetic_clips(size)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, size[::-1])
    for number in range(0, frames, len(clips[0])):
        for frame in clips[number // len(clips[0]) % len(clips)].frames(0, min(len(clips[0]), frames - number)):
            video.write(np.ascontiguousarray(frame[::-1].transpose(1, 2, 0)))
    video.release()
    return str(path)


class _Bench:
    """Runs jobs, each in a process of its own."""

    def __init__(self, model: Path, bits: str, recipe: str, steps: int, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.job = {"bits": bits, "recipe": recipe, "steps": steps, "scale": 1.0, "profile": False}
        graph = Graph.load(model)
        frame = next(v for v in graph.inputs if v.name == Session(graph, optimize=False).frame_input)
        self.size = (int(frame.shape[2]), int(frame.shape[3]))
        self.done: dict[str, dict[str, Any]] = {}

    def __call__(self, frames: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        height, width = (round(side * scale) for side in self.size)
        footage = self.folder / f"{width}x{height}x{frames}.mp4"
        job = json.dumps({**self.job, "frames": frames, "scale": scale, "footage": str(footage), **more})
        if job not in self.done:
            if not footage.exists():
                write_footage(footage, (height, width), frames)
            child = subprocess.run([sys.executable, __file__, str(self.model), "--job", job], capture_output=True,
                                   text=True, check=False)
            if child.returncode:
                said = child.stderr.strip().splitlines() or ["ended without a word"]
                raise VmqError(said[-1].removeprefix(ERROR))
            self.done[job] = json.loads(child.stdout.splitlines()[-1])
        return self.done[job]


def tables(bench: _Bench, frames: Sequence[int], scales: Sequence[float], profile: bool) -> Iterator[str]:
    """The lines to print, as they are found."""
    height, width = bench.size
    yield f"### Frames, at {width}x{height}\n\n| frames {HEAD}"
    for count in frames:
        yield f"| {count} {_cells(bench(count))}"
    yield f"\n### Size of a frame, {min(frames)} frames\n\n| size {HEAD}"
    for scale in scales:
        yield f"| {round(width * scale)}x{round(height * scale)} {_cells(bench(min(frames), scale))}"
    made = bench(max(frames))
    count = len(made["blocks"])
    if count:
        yield (f"\n### Blocks, {max(frames)} frames\n\n| blocks done | seconds since the start | peak MiB |\n"
               "|---|---|---|")
        for number in sorted({max(1, count * k // 6) for k in range(1, 7)}):
            seconds, peak = made["blocks"][number - 1]
            yield f"| {number} | {seconds:.1f} | {peak:.0f} |"
    if profile:
        made = bench(min(frames), profile=True)
        whole = sum(made["passes"].values())
        yield "\n### Passes\n\n| pass | share of the time |\n|---|---|"
        for name, seconds in sorted(made["passes"].items(), key=lambda item: -item[1]):
            if seconds >= 0.01 * whole:
                yield f"| {name} | {seconds / whole:.1%} |"
        yield "\n### Operators in the steps of blocks (torch's profiler)\n\n| operators | share |\n|---|---|"
        yield from _kinds(made["operators"])


def _cells(made: Mapping[str, Any]) -> str:
    return f"| {made['seconds']:.1f} | {made['passes']['reconstruct_blocks']:.1f} | {made['peak']:.0f} |"


def _kinds(operators: Mapping[str, float]) -> Iterator[str]:
    whole, shares = sum(operators.values()), dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for name, seconds in operators.items():
        plain = name.removeprefix("aten::")
        shares[next((kind for kind, parts in KINDS if any(part in plain for part in parts)), "other")] += seconds
    for kind, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        yield f"| {kind} | {seconds / max(whole, 1e-9):.1%} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/growth", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a float ONNX file with static shapes")
    parser.add_argument("--bits", default="4", help="as for vmq compile (default: 4)")
    parser.add_argument("--recipe", default="vmq", help="as for vmq compile (default: vmq)")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, metavar="N", help="calibration frames")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="S", help="relative to the model's")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps a block takes (default: 10)")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        if min(args.frames) < 8:
            raise OptionError(f"--frames {min(args.frames)}: give 8 or more, the length of a sequence")
        if args.job:
            print(json.dumps(measure(str(args.model), json.loads(args.job))))
            return 0
        with tempfile.TemporaryDirectory(prefix="vmq-growth-") as folder:
            bench = _Bench(args.model, args.bits, args.recipe, args.steps, Path(folder))
            print(f"{date.today()}, {processor()}, {os.cpu_count()} processors; {args.recipe} {args.bits}, "
                  f"{args.steps} steps a block\n")
            for line in tables(bench, args.frames, args.sizes, args.profile):
                print(line, flush=True)
    except VmqError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

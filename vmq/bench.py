"""What `vmq bench` does: time models against each other on this machine, and say where their time goes.

Every model has a process of its own, and a round is one frame of each, so that whatever else the machine does meets
all alike. A speed-up is the median over rounds of (time of the baseline / time of the model): both were measured
within the same moment, which makes it steadier than a ratio of medians on a machine that is slower for a while.

Two small convolutions, well aligned and large enough to keep the kernels busy, run in the same rounds: one in float32
and one in int8 (uint8 x int8). What they reach is the peak P of this processor with this runtime, in multiply-adds a
second. A model of n multiply-adds cannot be faster than n / P: that is its roofline.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from vmq.bench_child import Kernel, serve
from vmq.cost import Cost, cost_of, fill_shapes
from vmq.errors import ModelError, OptionError
from vmq.graph import Graph
from vmq.progress import Report, silent
from vmq.proto import file_size
from vmq.runtime import Session, default_ratio

FREE_SIZE = (288, 512)
"""(H, W) of the frames for models that take any size."""
WARM_UP = 5
"""Rounds that are not counted: the runtime lays out its memory in the first, states fill, clocks rise."""
PROFILED = 11
"""Runs under the runtime's profiler, of which the first is not counted."""
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512bw", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
"""Instruction sets that decide how fast 8-bit arithmetic is, as Linux calls them on x86-64 and on Arm."""

CHANNELS, SIDES = 128, (36, 64)
PROBE = SIDES[0] * SIDES[1] * CHANNELS**2 * 9
"""Multiply-adds of a probe of the peak, a 3x3 convolution."""
PROBES = ("float32", "int8")

Times = NDArray[np.float64]
"""Milliseconds of a frame, a value a round."""

Ask = Callable[[Any], Any]


@dataclass(frozen=True)
class Measured:
    """What was found out about one model.

    Attributes:
        times: milliseconds of a frame, by round.
        frame: (W, H) of the frames; `free` where the model would take others.
        kernels: what the runtime runs after optimization.
        cost: arithmetic of a frame.
        size_bytes: of the file, with its external data.
        memory_bytes: what loading and running added to its process at the peak.
        minimum_runtime: oldest ONNX Runtime that runs it, where the file says so.
    """

    times: Times
    frame: tuple[int, int]
    free: bool
    kernels: Sequence[Kernel]
    cost: Cost
    size_bytes: int
    memory_bytes: int
    minimum_runtime: str | None

    def share(self, kind: str) -> float:
        """Share of run time in kernels of a kind: integer, quantize, float or other."""
        return _milliseconds(k for k in self.kernels if kind_of(k) == kind) / (_milliseconds(self.kernels) or 1.0)

    @property
    def qdq_nodes(self) -> int:
        """Quantize- and DequantizeLinear nodes that survive optimization."""
        return sum(kind_of(k) == "quantize" for k in self.kernels)

    @property
    def float_operators(self) -> list[tuple[str, float, int]]:
        """(operator, share of run time, count) of what runs in float, most expensive first."""
        left = [k for k in self.kernels if kind_of(k) == "float"]
        total = _milliseconds(self.kernels) or 1.0
        rows = [(op, _milliseconds(k for k in left if k.op == op) / total, sum(k.op == op for k in left))
                for op in sorted({k.op for k in left})]
        return sorted(rows, key=lambda row: -row[1])


@dataclass(frozen=True)
class Result:
    """A comparison: the models by path, which of them is the baseline, and the probes' times."""

    models: Mapping[str, Measured]
    baseline: str
    probes: Mapping[str, Times]
    threads: int

    def speedup(self, path: str) -> float:
        """How many times as fast as the baseline a model is: median over rounds."""
        return float(np.median(self.models[self.baseline].times / self.models[path].times))

    def peak(self, probe: str) -> float:
        """Multiply-adds a second that this processor reaches at best, in float32 or int8."""
        return PROBE / float(np.median(self.probes[probe])) * 1e3

    def ideal(self, path: str, probe: str) -> float:
        """Milliseconds that a model's multiply-adds take at the peak."""
        return self.models[path].cost.multiply_adds / self.peak(probe) * 1e3

    def reached(self, path: str, probe: str) -> float:
        """Share of the peak that a model reaches: median over rounds."""
        model = self.models[path]
        return float(np.median(self.probes[probe] / model.times)) * model.cost.multiply_adds / PROBE


def bench(models: Sequence[str], *, baseline: str | None = None, threads: int = 0, runs: int = 50,
          report: Report = silent) -> Result:
    """Time models in turn, each in a process of its own, and profile them.

    Args:
        models: ONNX files; one that is named twice is measured once.
        baseline: what speed-ups refer to; measured first if it is not among the models. Default: the first of them.
        threads: of each model; 0 leaves the choice to ONNX Runtime.
        runs: rounds that count, 1 or more.
        report: told after each frame.

    Raises:
        ModelError: a file is missing, is no model, or ONNX Runtime does not run it.
        OptionError: `threads` or `runs` is out of range.
    """
    if runs < 1:
        raise OptionError(f"--runs {runs}: give 1 or more")
    if threads < 0:
        raise OptionError(f"--threads {threads}: give 0 (all) or more")
    paths = list(dict.fromkeys(([baseline] if baseline is not None and baseline not in models else []) + [*models]))
    plans = {path: _Plan(path) for path in paths}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        asks: dict[str, Ask] = {}
        for path, plan in plans.items():
            asks[path] = stack.enter_context(_child(path, path, threads, plan.feeds, plan.states))
        for probe in PROBES:
            file = Path(folder) / f"{probe}.onnx"
            file.write_bytes(_probe(probe).SerializeToString())
            kind = np.float32 if probe == "float32" else np.uint8
            frame = np.random.default_rng(0).integers(0, 256, (1, CHANNELS, *SIDES)).astype(kind)
            asks[probe] = stack.enter_context(_child(f"the {probe} probe", str(file), threads, {"x": frame}, {}))
        times = _rounds(asks, runs, report)
        measured = {}
        for number, (path, plan) in enumerate(plans.items()):
            report(f"profiling {path}", number / len(plans), 1)
            measured[path] = Measured(
                times=times[path], frame=plan.frame, free=plan.free, cost=plan.cost, minimum_runtime=plan.minimum,
                memory_bytes=asks[path]("memory"), kernels=asks[path](PROFILED), size_bytes=file_size(path))
    return Result(measured, baseline if baseline is not None else paths[0], {p: times[p] for p in PROBES}, threads)


def kind_of(kernel: Kernel) -> str:
    """What a kernel computes in: integer, float, quantize (Quantize- or DequantizeLinear), or other (indices).

    Operators that have an integer form of their own are told by name; what only hands values on, by their type.
    """
    if kernel.op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return "quantize"
    if kernel.op.startswith("QLinear") or kernel.op in (
            "ConvInteger", "MatMulInteger", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return "integer"
    if any(kind in ("float", "float16", "double", "bfloat16") for kind in (kernel.reads, kernel.gives)):
        return "float"
    return "integer" if kernel.gives in ("uint8", "int8", "uint4", "int4", "uint16", "int16") else "other"


def processor() -> str:
    """The processor's name, as well as the system knows it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Those of INSTRUCTIONS that the processor has; none where the system does not say."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in INSTRUCTIONS if name in flags]


def to_json(result: Result) -> dict[str, Any]:
    """The result in the shape that `vmq bench --json` prints."""
    models = {}
    for path, model in result.models.items():
        low, middle, high = np.percentile(model.times, (25, 50, 75))
        models[path] = {
            "median_ms": float(middle), "quartiles_ms": [float(low), float(high)],
            "fastest_ms": float(model.times.min()), "speedup": result.speedup(path),
            "size_bytes": model.size_bytes, "memory_bytes": model.memory_bytes,
            "integer_share": model.share("integer"), "float_share": model.share("float"),
            "qdq_share": model.share("quantize"), "qdq_nodes": model.qdq_nodes,
            "float_operators": [{"op": op, "share": share, "count": n} for op, share, n in model.float_operators],
            "multiply_adds": model.cost.multiply_adds, "bops": model.cost.bops, "gflops": model.cost.gflops,
            "ideal_ms": {probe: result.ideal(path, probe) for probe in PROBES},
            "share_of_peak": {probe: result.reached(path, probe) for probe in PROBES},
            "frame": list(model.frame), "minimum_onnxruntime": model.minimum_runtime}
    return {"models": models, "baseline": result.baseline, "threads": result.threads,
            "rounds": len(result.models[result.baseline].times),
            "peak": {probe: result.peak(probe) for probe in PROBES},
            "machine": {"processor": processor(), "instructions": instructions(), "cores": _cores(),
                        "onnxruntime": ort.__version__}}


def to_lines(result: Result) -> list[str]:
    """The result as a table of all models and a paragraph on each; docs/bench.md says how to read them."""
    rounds = len(result.models[result.baseline].times)
    threads = {0: "as many threads as it likes", 1: "1 thread"}.get(result.threads, f"{result.threads} threads")
    lines = [f"{processor()} ({', '.join(instructions()) or 'instruction sets unknown'}), {_cores()} cores; "
             f"ONNX Runtime {ort.__version__}, {threads}; {rounds} rounds, a frame of each in turn",
             "at its best: " + ", ".join(f"{result.peak(p) / 1e9:.1f} G multiply-adds/s in {p}" for p in PROBES), ""]
    width = max(map(len, result.models))
    lines.append(f"{'':<{width}}{'ms':>9}{'quartiles':>17}{'speed-up':>10}{'integer':>9}{'MB':>8}{'memory MB':>11}")
    for path, model in result.models.items():
        low, middle, high = np.percentile(model.times, (25, 50, 75))
        lines.append(f"{path:<{width}}{middle:>9.2f}{f'{low:.2f}-{high:.2f}':>17}{result.speedup(path):>8.2f} x"
                     f"{model.share('integer'):>9.1%}{model.size_bytes / 1e6:>8.2f}{model.memory_bytes / 1e6:>11.1f}")
    for path in result.models:
        lines += ["", path, *(f"  {line}" for line in _paragraph(result, path))]
    return [*lines, "", f"speed-up: against {result.baseline}, the median over rounds of its time / the model's"]


def _paragraph(result: Result, path: str) -> list[str]:
    model, cost = result.models[path], result.models[path].cost
    pace = cost.multiply_adds / float(np.median(model.times)) / 1e6
    operators = [f"{op} {share:.1%} ({count})" for op, share, count in model.float_operators]
    lines = [
        f"frame      {model.frame[0]}x{model.frame[1]}"
        + (", as an example: the model takes any size" if model.free else ""),
        f"run time   {model.share('integer'):.1%} in integer kernels, {model.share('quantize'):.1%} in "
        f"{model.qdq_nodes} Quantize- and DequantizeLinear nodes, {model.share('float'):.1%} in float",
        f"in float   {', '.join(operators) or 'nothing'}",
        f"arithmetic {cost.multiply_adds / 1e9:.3g} G multiply-adds, {cost.bops / 1e9:.4g} GBOPs, {cost.gflops:.3g} "
        "GFLOPs in the paper's count",
        "at best    " + ", ".join(f"{result.ideal(path, p):.2f} ms in {p} (reached: {result.reached(path, p):.0%})"
                                  for p in PROBES) + f"; {pace:.1f} G multiply-adds/s"]
    if model.minimum_runtime:
        lines.append(f"needs      ONNX Runtime {model.minimum_runtime} or newer")
    return lines


class _Plan:
    """What is known of a model before it runs: what to feed it, and its arithmetic."""

    def __init__(self, path: str) -> None:
        session = Session(path, threads=1)
        height, width = session.size
        size = (height or FREE_SIZE[0], width or FREE_SIZE[1])
        session.downsample_ratio = default_ratio(size)
        frame = np.random.default_rng(0).random((1, 3, *size), np.float32)
        graph = Graph.load(path)
        fill_shapes(graph, session, frame)
        self.frame, self.free = (size[1], size[0]), None in (height, width)
        self.feeds = session.feeds(frame)
        self.states = {pair.input: pair.output for pair in session.state_pairs}
        self.cost = cost_of(graph)
        self.minimum = graph.metadata.get("vmq.minimum_onnxruntime")


@contextmanager
def _child(label: str, path: str, threads: int, feeds: Mapping[str, Any], states: Mapping[str, str],
           ) -> Iterator[Ask]:
    """A process that runs one model; yields the function that asks it something and returns the answer."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, path, threads, feeds, states), daemon=True)
    process.start()
    theirs.close()

    def ask(request: Any) -> Any:
        try:
            ours.send(request)
            answer = ours.recv()
        except (EOFError, OSError) as error:
            process.join(1)
            raise ModelError(f"{label}: the process that runs it ended, exit code {process.exitcode} (negative: by "
                             "that signal; -9 is often want of memory)") from error
        if isinstance(answer, str):
            raise ModelError(f"{label} cannot be run by ONNX Runtime {ort.__version__}: {answer}")
        return answer

    try:
        yield ask
    finally:
        ours.close()
        process.join(5)
        process.kill()
        process.join()
        process.close()


def _rounds(asks: Mapping[str, Ask], runs: int, report: Report) -> dict[str, Times]:
    """Milliseconds of every model and probe in every round that counts; every other round goes the other way."""
    rows: list[dict[str, float]] = []
    order, done, total = list(asks), 0, (WARM_UP + runs) * len(asks)
    for _ in range(WARM_UP + runs):
        row = {}
        for name in order:
            row[name] = asks[name]("frame") * 1e3
            done += 1
            report("timing", done, total)
        rows.append(row)
        order.reverse()
    return {name: np.array([row[name] for row in rows[WARM_UP:]]) for name in asks}


def _probe(kind: str) -> onnx.ModelProto:
    """A 3x3 convolution of CHANNELS to CHANNELS in float32, or of uint8 with int8 in QLinearConv."""
    shape, rng = f"1, {CHANNELS}, {SIDES[0]}, {SIDES[1]}", np.random.default_rng(0)
    weights = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3))
    if kind == "float32":
        weights, element, call = weights.astype(np.float32), "float", "Conv <pads = [1, 1, 1, 1]> (x, w)"
    else:
        weights, element = weights.astype(np.int8), "uint8"
        call = "QLinearConv <pads = [1, 1, 1, 1]> (x, one, zero, w, one, none, large, zero)"
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> probe ({element}[{shape}] x)
        => ({element}[{shape}] y) <float one = {{1.0}}, float large = {{1000.0}}, uint8 zero = {{128}},
        int8 none = {{0}}> {{ y = {call} }}""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return model


def _milliseconds(kernels: Any) -> float:
    return sum(k.milliseconds for k in kernels)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""

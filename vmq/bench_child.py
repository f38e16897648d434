"""One model in a process of its own: it times a frame when it is asked to, and profiles itself at the end.

It loads nothing but numpy and ONNX Runtime, so that its memory is the model's. Every frame is the same; states go
from each run into the next. Neither frame nor states are copied: ONNX Runtime takes and gives memory as it is.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


@dataclass(frozen=True)
class Kernel:
    """A node as ONNX Runtime runs it.

    Attributes:
        op: its operator, after optimization.
        reads, gives: element type of its first input and output that are tensors, as profiles name them.
        milliseconds: median time of a run.
    """

    op: str
    reads: str
    gives: str
    milliseconds: float


def serve(connection: Connection, path: str, threads: int, feeds: Mapping[str, Any], states: Mapping[str, str]) -> None:
    """Answer requests until the other side hangs up.

    "frame" is answered with the seconds that a run took; "memory" with the bytes that loading and running took at
    their peak; a number with the kernels of so many runs. A refusal of the runtime is answered by its text.

    Args:
        connection: to the process that asks.
        path: the model.
        threads: intra-op threads; 0 leaves the choice to ONNX Runtime.
        feeds: what the first run is fed, by input.
        states: outputs that the next run is fed, by the input they go to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C is the other side's to answer
    try:
        before = _memory("VmRSS")
        model = _Model(path, threads, feeds, states)
        while True:
            request = connection.recv()
            if request == "frame":
                connection.send(model.run())
            elif request == "memory":
                connection.send(max(0, _memory("VmHWM") - before))
            else:
                connection.send(_profile(path, threads, feeds, states, request))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # onnxruntime raises bare classes of its own
        connection.send(" ".join(str(error).split())[:300])


class _Model:
    def __init__(self, path: str, threads: int, feeds: Mapping[str, Any], states: Mapping[str, str],
                 profile: str = "") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # as `vmq run`
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self.session.get_outputs()]
        self._feeds, self._states = dict(feeds), dict(states)

    def run(self) -> float:
        start = time.perf_counter()
        outputs = dict(zip(self._names, self.session.run(None, self._feeds), strict=True))
        seconds = time.perf_counter() - start
        self._feeds |= {name: outputs[source] for name, source in self._states.items()}
        return seconds


def _profile(path: str, threads: int, feeds: Mapping[str, Any], states: Mapping[str, str], runs: int) -> list[Kernel]:
    """Run a second session under the runtime's own profiler; the first run of `runs` is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        model = _Model(path, threads, feeds, states, profile=str(Path(folder) / "profile"))
        for _ in range(runs):
            model.run()
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = {}
    kinds: dict[tuple[str, str], tuple[str, str, str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            said = event["args"]
            key = event["name"], said["node_index"]
            times.setdefault(key, []).append(event["dur"] / 1e3)
            kinds[key] = said["op_name"], _type(said["input_type_shape"]), _type(said["output_type_shape"])
    return [Kernel(*kinds[key], float(np.median(row[1:] or row))) for key, row in times.items()]


def _type(tensors: list[dict[str, Any]]) -> str:
    """Element type of the first tensor of a list as profiles write it, [{"uint8": [1, 3, 4, 4]}, ...]."""
    return next((name for tensor in tensors for name in tensor), "")


def _memory(what: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM); elsewhere than on Linux the most so far."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

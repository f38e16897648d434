"""A compiled model in closed loop on some execution provider of ONNX Runtime, beside the CPU's. Needs numpy alone.

tools/check_targets.py runs this file in environments of their own, where vmq is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Frames = NDArray[np.float32]
STATES_KEY = "vmq.states"
REFUSED = 1


class Loop:
    """A session, its states, and the time of each frame in seconds."""

    def __init__(self, session: Any, pairs: dict[str, str]) -> None:
        self.session, self.pairs, self.seconds = session, pairs, list[float]()
        self.feeds = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
        self.frame = next(n for n, v in self.feeds.items() if v.ndim == 4 and n not in pairs)
        self.names = [o.name for o in session.get_outputs()]

    def step(self, frame: Frames) -> dict[str, Frames]:
        """All outputs of a frame [3,H,W], by name."""
        self.feeds[self.frame] = frame[None]
        started = time.perf_counter()
        values = self.session.run(self.names, self.feeds)
        self.seconds.append(time.perf_counter() - started)
        found = dict(zip(self.names, values, strict=True))
        self.feeds |= {name: found[source] for name, source in self.pairs.items()}
        return found

    def alpha_of(self, outputs: dict[str, Frames]) -> Frames:
        """The output with one channel of the frame's size."""
        want = (1, 1, *self.feeds[self.frame].shape[2:])
        states = set(self.pairs.values())
        return next(outputs[n] for n in sorted(self.names, key=states.__contains__) if outputs[n].shape == want)


def open_session(model: str, provider: str, threads: int, soc_model: int = 57) -> Any:
    """A session on "cpu", "qnn" (no node may fall back to the CPU) or "openvino"."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if provider == "qnn":
        import onnxruntime_qnn

        ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
        npu = next(d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider")
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([npu], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(),
                                                 "soc_model": str(soc_model)})
        return ort.InferenceSession(model, options)
    if provider == "openvino":
        settings = {"device_type": "CPU", "num_of_threads": str(threads or 1)}
        return ort.InferenceSession(model, options, providers=[("OpenVINOExecutionProvider", settings)])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare(args: argparse.Namespace) -> int:
    """Run the model on the provider and on the CPU in turn, each on its own states; print how alpha differs."""
    started = time.perf_counter()
    try:
        tested = open_session(args.model, args.provider, args.threads, args.soc_model)
    except Exception as error:  # onnxruntime raises bare classes of its own
        print(f"refused: {' '.join(str(error).split())}")
        return REFUSED
    print(f"accepted: session in {time.perf_counter() - started:.1f} s, providers {', '.join(tested.get_providers())}",
          flush=True)
    plain = open_session(args.model, "cpu", args.threads)
    pairs = json.loads(plain.get_modelmeta().custom_metadata_map[STATES_KEY])
    ours, cpu = Loop(tested, pairs), Loop(plain, pairs)
    exact = Loop(open_session(args.reference, "cpu", args.threads), pairs) if args.reference else None
    sums = dict.fromkeys(("cpu", "float", "cpu_float"), 0.0)
    frames = np.load(args.frames)
    for number, frame in enumerate(frames, 1):
        a, b = (loop.alpha_of(loop.step(frame)) for loop in (ours, cpu))
        apart = np.abs(a - b)
        sums["cpu"] += float(apart.mean())
        print(f"frame {number}: alpha {apart.mean() * 1e3:.2f}e-3 from the CPU run on average, {apart.max():.3f} at "
              f"most, {np.mean(np.rint(a * 255) != np.rint(b * 255)):.1%} of 8-bit values differ; "
              f"{ours.seconds[-1] * 1e3:,.0f} ms, CPU {cpu.seconds[-1] * 1e3:,.0f} ms", flush=True)
        if exact:
            want = exact.alpha_of(exact.step(frame))
            sums["float"] += float(np.abs(a - want).mean())
            sums["cpu_float"] += float(np.abs(b - want).mean())
    mean = {name: total / len(frames) * 1e3 for name, total in sums.items()}
    print(f"mean of {len(frames)} frames in closed loop: {mean['cpu']:.2f}e-3 between {args.provider} and CPU")
    if exact:
        print(f"from the float network: {args.provider} {mean['float']:.2f}e-3, CPU {mean['cpu_float']:.2f}e-3")
    if args.provider == "openvino":
        median, base = (float(np.median(loop.seconds[1:] or loop.seconds)) for loop in (ours, cpu))
        print(f"median time in turn, {args.threads or 1} thread(s): {median * 1e3:.1f} ms, CPU {base * 1e3:.1f} ms: "
              f"{base / median:.2f} x")
    return 0


def record(args: argparse.Namespace) -> int:
    """Run the model on the CPU and keep all outputs of all frames."""
    session = open_session(args.model, "cpu", args.threads)
    loop = Loop(session, json.loads(session.get_modelmeta().custom_metadata_map[STATES_KEY]))
    kept: dict[str, list[Frames]] = {name: [] for name in (*loop.names, "alpha")}
    given = dict(np.load(args.given)) if args.given else {}
    for number, frame in enumerate(np.load(args.frames)):
        loop.feeds |= {name: values[number] for name, values in given.items()}
        outputs = loop.step(frame)
        for name, value in (*outputs.items(), ("alpha", loop.alpha_of(outputs))):
            kept[name].append(value)
    np.savez(args.record, **{name: np.stack(values) for name, values in kept.items()})  # type: ignore[arg-type]
    return 0


def main() -> int:
    """Run one of the above; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("frames", help="a .npy of float32 [T,3,H,W], 0 to 1")
    parser.add_argument("--provider", choices=("cpu", "qnn", "openvino"), default="cpu")
    parser.add_argument("--record", metavar="OUT.npz")
    parser.add_argument("--given", metavar="IN.npz", help="with --record: more inputs, by name, [T,...]")
    parser.add_argument("--reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--soc-model", type=int, default=57)
    args = parser.parse_args()
    return record(args) if args.record else compare(args)


if __name__ == "__main__":
    sys.exit(main())

"""What tools/check_runtimes runs in environments that have numpy and one release of ONNX Runtime, and nothing else.

`run MODEL OUT.npz` keeps the alpha of a few frames of noise and all other outputs; `compare FOLDER` tells how far those
of every release are from newest.npz.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

STEP, SHARE = 1 / 255, 0.01
"""Alpha may be more than a step off in this share of its values."""


def run(model: str, output: str) -> None:
    """Run a compiled model over four frames in closed loop."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    pairs, grids = (json.loads(metadata.get(key, "{}")) for key in ("vmq.states", "vmq.quantized_states"))
    feeds = {i.name: np.full(i.shape, grids[i.name]["zero_point"], np.uint8) if i.name in grids
             else np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    frame = next(i for i in session.get_inputs() if len(i.shape) == 4 and i.name not in pairs)
    outputs = [o.name for o in session.get_outputs()]
    pictures = [o.name for o in session.get_outputs() if o.shape == [1, 1, *frame.shape[2:]]]
    alpha = min(pictures, key=lambda name: name in pairs.values())
    rng, found, alphas = np.random.default_rng(0), [], []
    for _ in range(4):
        feeds[frame.name] = (rng.integers(0, 256, frame.shape) / 255).astype(np.float32)
        values = dict(zip(outputs, session.run(None, feeds), strict=True))
        feeds |= {name: values[source] for name, source in pairs.items()}
        found.append(np.concatenate([v.ravel() for v in values.values()]))
        alphas.append(values[alpha][0, 0])
    np.savez(output, alpha=np.stack(alphas), all=np.stack(found))
    print(f"onnxruntime {ort.__version__}: runs", flush=True)


def compare(folder: Path) -> bool:
    """Compare every release with the newest, a line each; returns whether alpha is as near as it should be."""
    newest, near = np.load(folder / "newest.npz"), True
    for file in sorted(folder.glob("*.npz")):
        if file.stem == "newest":
            continue
        values = np.load(file)
        off = np.abs(values["alpha"].astype(np.float64) - newest["alpha"])
        far = float(np.mean(~(off <= STEP)))                   # NaN is far
        near &= far <= SHARE
        print(f"{file.stem} against newest: {np.mean(values['all'] != newest['all']):.4%} of all output values differ, "
              f"largest difference {np.abs(values['all'] - newest['all']).max():.3g}; alpha is more than an 8-bit step "
              f"off in {far:.4%} of its values{'' if far <= SHARE else f' (FAILED: at most {SHARE:.0%})'}")
    return near


def main(arguments: Sequence[str] | None = None) -> int:
    what, *rest = sys.argv[1:] if arguments is None else arguments
    if what == "run":
        run(*rest)
        return 0
    return 0 if compare(Path(rest[0])) else 1


if __name__ == "__main__":
    sys.exit(main())

"""PPQ, and ESP-PPQ that came of it, for their platform ONNXRUNTIME; the opset that they write is mended.

A variant is the name of the package.
"""

import importlib
from pathlib import Path

import frames as calibration
import onnx
import torch


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:
    platform = importlib.import_module(f"{variant}.core").TargetPlatform.ONNXRUNTIME
    ppq = importlib.import_module(f"{variant}.api")
    data = [{name: torch.from_numpy(value) for name, value in inputs.items()} for inputs in calibration.load(frames)]
    graph = ppq.quantize_onnx_model(str(model), data, len(data), None, platform, inputs=data[0], device="cpu")
    ppq.export_ppq_graph(graph, platform, str(output))
    written = onnx.load(output)
    needed = next(o.version for o in onnx.load(model).opset_import if not o.domain)
    for opset in written.opset_import:      # they write 13 whatever they read, and HardSwish needs 14
        if not opset.domain:
            opset.version = max(opset.version, needed)
    onnx.save(written, output)

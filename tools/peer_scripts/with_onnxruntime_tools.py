"""onnxruntime-tools: ONNX Runtime's quantizer of 2021, which old guides still name."""

from pathlib import Path

from frames import Reader
from onnxruntime_tools.quantization import quantize_static


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:    # noqa: ARG001  (it has one variant)
    quantize_static(str(model), str(output), Reader(frames))

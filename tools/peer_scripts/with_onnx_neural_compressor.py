"""Intel's neural compressor for ONNX Runtime, its static quantization with default settings."""

from pathlib import Path

import frames as calibration
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import config
from onnx_neural_compressor.quantization import quantize as run


class Reader(calibration.Reader, data_reader.CalibrationDataReader):
    pass


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:    # noqa: ARG001  (it has one variant)
    run(str(model), str(output), config.StaticQuantConfig(calibration_data_reader=Reader(frames)))

"""ONNX Runtime's own quantizer: quantize_static, calibrated by minimum and maximum, weights per channel."""

from pathlib import Path

import onnx
from frames import Reader
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

TYPES = {"u8s8": (QuantType.QUInt8, QuantType.QInt8), "w4a8": (QuantType.QUInt8, QuantType.QInt4),
         "w4a4": (QuantType.QUInt4, QuantType.QInt4)}


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:
    activations, weights = TYPES[variant]
    prepared = output.with_suffix(".prepared.onnx")
    source = onnx.load(model)
    if variant != "u8s8":       # 4-bit types exist from opset 21 on
        source = onnx.version_converter.convert_version(source, 21)
    onnx.save(source, prepared)
    quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(output), Reader(frames), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=activations, weight_type=weights, calibrate_method=CalibrationMethod.MinMax)
    prepared.unlink()

"""AIMET-ONNX: a simulation calibrated by minimum and maximum, with weights learned or not, exported as QDQ.

A variant is its bits (w4a8) and how weights are learned: seqmse-FRAMES or adaround-FRAMES-ITERATIONS, of a layer.
"""

from pathlib import Path

import aimet_onnx
import frames as calibration
import onnx
from aimet_onnx.quantsim import QuantizationSimModel


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:
    bits, *learned = variant.split("-")
    sim = QuantizationSimModel(onnx.load(model), param_type=f"int{bits[1]}", activation_type=f"int{bits[3]}")
    if learned:
        data = list(calibration.load(frames, int(learned[1])))
        if learned[0] == "seqmse":
            aimet_onnx.apply_seq_mse(sim, data)
        else:
            aimet_onnx.apply_adaround(sim, data, num_iterations=int(learned[2]))
    sim.compute_encodings(calibration.load(frames))
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True, export_int32_bias=True), output)

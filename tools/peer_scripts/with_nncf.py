"""NNCF: nncf.quantize, with the preset as it is by default (symmetric activations) or mixed (asymmetric)."""

from pathlib import Path

import frames as calibration
import nncf
import onnx


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:
    data = list(calibration.load(frames))
    preset = {"default": None, "mixed": nncf.QuantizationPreset.MIXED}[variant]
    onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(data), preset=preset, subset_size=len(data)), output)

"""AMD Quark. Its presets have signed activations, which ONNX Runtime does not fuse on x86; u8s8 is what fuses.

A variant is a preset of Quark's, u8s8, or u8s8-adaround-FRAMES-ITERATIONS, of a layer.
"""

from pathlib import Path

from frames import Reader
from quark.onnx import AdaRoundConfig, ModelQuantizer, QConfig
from quark.onnx.quantization.config.spec import CalibMethod, Int8Spec, QLayerConfig, QuantGranularity, UInt8Spec


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:
    name, *learned = variant.split("-")
    if name != "u8s8":
        config = QConfig.get_default_config(variant)
    else:
        config = QConfig(global_config=QLayerConfig(
            activation=UInt8Spec(calibration_method=CalibMethod.MinMax),
            weight=Int8Spec(calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel)),
            algo_config=[AdaRoundConfig(data_size=int(learned[1]), num_iterations=int(learned[2]))] if learned else [])
    ModelQuantizer(config).quantize_model(str(model), str(output), Reader(frames))

"""Olive: its pass around ONNX Runtime's static quantizer, fed by a data configuration of our own."""

import os
from pathlib import Path

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

import olive
from frames import Reader
from olive.data.config import DataComponentConfig, DataConfig
from olive.data.registry import Registry


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:    # noqa: ARG001  (it has one variant)
    @Registry.register_dataloader("recorded_frames")
    def recorded_frames(*_: object, **__: object) -> Reader:
        return Reader(frames)

    data = DataConfig(name="frames", type="DummyDataContainer",
                      dataloader_config=DataComponentConfig(type="recorded_frames"))
    settings = {"type": "OnnxStaticQuantization", "data_config": data, "quant_format": "QDQ", "per_channel": True,
                "activation_type": "uint8", "weight_type": "int8"}
    olive.run({"input_model": {"type": "ONNXModel", "model_path": str(model)}, "passes": {"quantize": settings},
               "output_dir": str(output)})

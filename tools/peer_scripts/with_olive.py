"""Olive: its pass around ONNX Runtime's static quantizer, in a workflow with a data set of our own."""

import os
import shutil
from pathlib import Path

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

import frames as calibration
import torch
from olive.data.registry import Registry
from olive.workflows import run


def quantize(variant: str, model: Path, frames: Path, output: Path) -> None:    # noqa: ARG001  (it has one variant)
    @Registry.register_dataset("recorded_frames")
    def recorded_frames(**_: object) -> list[tuple[dict[str, torch.Tensor], int]]:
        return [({name: torch.from_numpy(value[0]) for name, value in inputs.items()}, 0)    # the loader adds a batch
                for inputs in calibration.load(frames)]

    done = run({
        "input_model": {"type": "ONNXModel", "model_path": str(model)},
        "data_configs": [{"name": "frames", "load_dataset_config": {"type": "recorded_frames"}}],
        "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": "frames", "quant_format": "QDQ",
                                "calibrate_method": "MinMax", "per_channel": True, "activation_type": "uint8",
                                "precision": "int8"}},
        "output_dir": "olive", "cache_dir": "cache"})
    shutil.copyfile(done.get_best_candidate().model_path, output)

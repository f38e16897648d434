"""Mattes a clip with a model that vmq compiled: raw RGB frames of the model's size in, raw 8-bit alpha out.

python matte.py rvm_w4a4.onnx < talk.rgb > alpha.gray
"""

import json
import sys

import numpy as np
import onnxruntime as ort

session = ort.InferenceSession(sys.argv[1])
metadata = session.get_modelmeta().custom_metadata_map
pairs = json.loads(metadata["vmq.states"])                                       # {"r1i": "r1o", ...}
grids = json.loads(metadata.get("vmq.quantized_states", "{}"))                   # of states that are uint8
norm = json.loads(metadata.get("vmq.normalization", '{"mean": [0], "std": [1]}'))    # one number, or three
mean, std = (np.array(norm[name], np.float32) for name in ("mean", "std"))

# The frame is the input [1,3,H,W] that is no state, alpha the output [1,1,H,W] that is none.
frame = next(i for i in session.get_inputs() if i.name not in pairs and len(i.shape) == 4 and i.shape[1] == 3)
_, _, height, width = frame.shape
alpha = next(o.name for o in session.get_outputs()
             if o.name not in pairs.values() and list(o.shape) == [1, 1, height, width])

# Before the first frame every state is zero; other inputs (a downsample ratio that is bound already) are ignored.
feeds = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
feeds |= {state: np.full(feeds[state].shape, grid["zero_point"], np.uint8) for state, grid in grids.items()}
names = [o.name for o in session.get_outputs()]

while len(rgb := sys.stdin.buffer.read(3 * height * width)) == 3 * height * width:
    pixels = np.frombuffer(rgb, np.uint8).reshape(height, width, 3)
    normalized = (pixels.astype(np.float32) / 255 - mean) / std
    feeds[frame.name] = np.ascontiguousarray(normalized.transpose(2, 0, 1))[None]     # HWC -> CHW
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    feeds |= {state: outputs[source] for state, source in pairs.items()}
    sys.stdout.buffer.write(np.floor(outputs[alpha].astype(np.float64) * 255 + 0.5).astype(np.uint8).tobytes())

"""Small recurrent networks as ONNX text, for the tests of states and closures."""

from __future__ import annotations

import numpy as np
import onnx.parser

from vmq.graph import Graph


def read(text: str) -> Graph:
    """A graph from `(inputs) => (outputs) { nodes }`; inputs whose names begin with `w` become random weights."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> tiny {text}')
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.input if v.name.startswith("w")]:
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        whole = kind.elem_type != onnx.TensorProto.FLOAT
        array = np.array([shape[0] * [0], [1], [2]][0]) if whole else rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    return Graph.load(model)


GRU = """(float[1,3,8,8] src, float[1,4,8,8] r, float[4,3,3,3] w0, float[8,8,3,3] w1, float[4,8,3,3] w2,
          float[1,4,3,3] w3) => (float[1,1,8,8] pha, float[1,4,8,8] s) {
    e = Conv <pads = [1,1,1,1]> (src, w0)
    x = Relu (e)
    xr = Concat <axis = 1> (x, r)
    g = Conv <pads = [1,1,1,1]> (xr, w1)
    gates = Sigmoid (g)
    reset, update = Split <axis = 1, num_outputs = 2> (gates)
    kept = Mul (reset, r)
    xk = Concat <axis = 1> (x, kept)
    c = Conv <pads = [1,1,1,1]> (xk, w2)
    new = Tanh (c)
    delta = Sub (new, r)
    step = Mul (update, delta)
    s = Add (r, step)
    p = Conv <pads = [1,1,1,1]> (s, w3)
    pha = Sigmoid (p)
}"""

# W_x and W_h apart; the frame has the states' channels after the first conv.
LSTM = """(float[1,3,8,8] src, float[1,4,8,8] h, float[1,4,8,8] c, float[4,3,3,3] w0, float[16,4,3,3] w1,
           float[16,4,3,3] w2, float[1,4,1,1] w3) => (float[1,1,8,8] pha, float[1,4,8,8] h2, float[1,4,8,8] c2) {
    x = Conv <pads = [1,1,1,1]> (src, w0)
    wx = Conv <pads = [1,1,1,1]> (x, w1)
    wh = Conv <pads = [1,1,1,1]> (h, w2)
    sum = Add (wh, wx)
    i, f, o, g = Split <axis = 1, num_outputs = 4> (sum)
    si = Sigmoid (i)
    sf = Sigmoid (f)
    so = Sigmoid (o)
    tg = Tanh (g)
    keep = Mul (sf, c)
    put = Mul (si, tg)
    c2 = Add (keep, put)
    tc = Tanh (c2)
    h2 = Mul (so, tc)
    pha = Conv (h2, w3)
}"""

# Two states of one shape that are read and written together.
TWO_STATES = """(float[1,3,8,8] src, float[1,4,8,8] a, float[1,4,8,8] b, float[8,11,3,3] w0, float[1,8,1,1] w1)
        => (float[1,1,8,8] pha, float[1,4,8,8] a2, float[1,4,8,8] b2) {
    all = Concat <axis = 1> (b, src, a)
    d = Conv <pads = [1,1,1,1]> (all, w0)
    da, db = Split <axis = 1, num_outputs = 2> (d)
    a2 = Add (a, da)
    b2 = Add (b, db)
    both = Concat <axis = 1> (a2, b2)
    pha = Conv (both, w1)
}"""

# As above, but what is written does not say which of the two was read.
AMBIGUOUS = """(float[1,3,8,8] src, float[1,4,8,8] a, float[1,4,8,8] b, float[8,11,3,3] w0)
        => (float[1,4,8,8] a2, float[1,4,8,8] b2) {
    all = Concat <axis = 1> (b, src, a)
    d = Conv <pads = [1,1,1,1]> (all, w0)
    a2, b2 = Split <axis = 1, num_outputs = 2> (d)
}"""

FEED_FORWARD = """(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,4,3,3] w1, float[3,4,3,3] w2)
        => (float[1,3,8,8] fgr) {
    x = Conv <pads = [1,1,1,1]> (src, w0)
    y = Conv <pads = [1,1,1,1]> (x, w1)
    z = Conv <pads = [1,1,1,1]> (y, w2)
    fgr = Add (z, src)
}"""

TWO_IMAGES = """(float[1,3,8,8] src, float[1,3,8,8] background, float[4,6,3,3] w0, float[3,4,3,3] w1)
        => (float[1,3,8,8] fgr) {
    both = Concat <axis = 1> (src, background)
    x = Conv <pads = [1,1,1,1]> (both, w0)
    y = Conv <pads = [1,1,1,1]> (x, w1)
    fgr = Add (y, src)
}"""

LAST_ALPHA = """(float[1,3,8,8] src, float[1,1,8,8] last, float[4,4,3,3] w0, float[1,4,3,3] w1, float[3,4,3,3] w2)
        => (float[1,3,8,8] fgr, float[1,1,8,8] pha) {
    both = Concat <axis = 1> (src, last)
    x = Conv <pads = [1,1,1,1]> (both, w0)
    p = Conv <pads = [1,1,1,1]> (x, w1)
    pha = Sigmoid (p)
    f = Conv <pads = [1,1,1,1]> (x, w2)
    fgr = Add (f, src)
}"""

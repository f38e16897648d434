"""What is changed of a small network, in its bytes or in its structure, by a random generator alone."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.parser

EXTREMES = (0, 1, -1, 2, 7, 255, 65_536, 2**31 - 1, 2**31, -2**31, 2**40, 2**62, 2**63 - 1, -2**63)
NAMES = ("", "x", "src", "pha", "..", "../../etc/passwd", "a" * 100_000, "\0", "ä\u202e", "/dev/zero", "{}", "%s")
OPS = ("Conv", "Add", "Mul", "Concat", "Split", "Slice", "Resize", "Reshape", "Relu", "Sigmoid", "GlobalAveragePool",
       "Pad", "If", "Loop", "QuantizeLinear", "Gather", "MatMul", "Gemm", "Transpose", "Expand", "Tile", "Range",
       "ConstantOfShape", "Cast", "TopK", "NonZero", "LSTM", "SequenceEmpty", "StringNormalizer", "Nonsense",
       "BatchNormalization")

NETWORK = """<ir_version: 10, opset_import: ["": 17]> tiny (float[1,3,32,48] src, float[1,4,32,48] r)
        => (float[1,3,32,48] fgr, float[1,1,32,48] pha, float[1,4,32,48] s)
        <float[8,3,3,3] w0, float[8] b0, float[8,1,3,3] w1, float[4,12,3,3] w2, float[4,4,1,1] w3,
         int64[2] parts = {3, 1}> {
    first = Conv <pads = [1,1,1,1]> (src, w0, b0)
    a = HardSwish (first)
    deep = Conv <pads = [1,1,1,1], group = 8> (a, w1)
    b = Relu (deep)
    both = Concat <axis = 1> (b, r)
    mixed = Conv <pads = [1,1,1,1]> (both, w2)
    s = Tanh (mixed)
    head = Conv (s, w3)
    colour, alpha = Split <axis = 1> (head, parts)
    fgr = Add (src, colour)
    pha = Sigmoid (alpha)
}"""


def network() -> onnx.ModelProto:
    """The network that is changed: convolutions, a gate, a state."""
    text, rng = NETWORK, np.random.default_rng(0)
    weights = re.findall(r"float\[([\d,]+)\] (\w\d)", text)
    for _, name in weights:
        text = re.sub(rf",?\s*float\[[\d,]+\] {name}\b", "", text)
    model = onnx.parser.parse_model(text.replace("<,", "<"))
    for shape, name in weights:
        values = 0.3 * rng.normal(size=[int(n) for n in shape.split(",")])
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return model


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut out, repeat, overwrite or cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not content:
            break
        place, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:place + length]
        elif kind == 2:
            content[place:place] = content[place:place + length]
        elif kind == 3:
            content[place:place + length] = rng.randbytes(min(length, len(content) - place))
        elif kind == 4:
            content[place:place + 8] = (rng.choice(EXTREMES) % 2**64).to_bytes(8, "little")
        else:
            del content[place:]
    return bytes(content)


def change_structure(model: onnx.ModelProto, rng: random.Random) -> None:
    """One or a few changes of the graph."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        with contextlib.suppress(ValueError, TypeError, IndexError):       # what protobuf itself refuses
            rng.choice(CHANGES)(model, rng)


def _change_values(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = [n for m in model.graph.node for n in (*m.input, *m.output)] + list(NAMES)
    where = rng.choice((node.input, node.output))
    where[rng.randrange(len(where))] = rng.choice(names)


def _change_nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = model.graph.node
    node, kind = rng.choice(nodes), rng.randrange(6)
    if kind == 0:
        nodes.remove(node)
    elif kind == 1:
        nodes.append(node)
    elif kind == 2:
        node.op_type = rng.choice(OPS)
    elif kind == 3:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "evil", "ai.onnx"))
    elif kind == 4:
        del rng.choice((node.input, node.output))[rng.randrange(2):]
    else:
        node.input.extend([rng.choice(NAMES)] * rng.choice((1, 3, 1000)))


def _change_attributes(model: onnx.ModelProto, rng: random.Random) -> None:
    node, kind = rng.choice(model.graph.node), rng.randrange(4)
    attributes = node.attribute
    if kind == 0 or not attributes:
        name = rng.choice(("group", "axis", "pads", "strides", "dilations", "kernel_shape", "auto_pad", "to", "perm"))
        number = rng.choice(EXTREMES)
        value = rng.choice((number, [number] * rng.randrange(1, 6), "text", 1e30, float("nan")))
        attributes.append(onnx.helper.make_attribute(name, value))
        return
    attribute = rng.choice(attributes)
    if kind == 1:
        attributes.remove(attribute)
    elif kind == 2:
        attribute.type = rng.randrange(12)
    elif attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(EXTREMES)
    else:
        attribute.i = rng.choice(EXTREMES)


def _change_shapes(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    kind, dims = value.type.tensor_type, value.type.tensor_type.shape.dim
    what = rng.randrange(5)
    if what == 0:
        dims[rng.randrange(len(dims))].dim_value = rng.choice((*EXTREMES, 100_000, 30_000))
    elif what == 1:
        dims[rng.randrange(len(dims))].dim_param = rng.choice(NAMES)
    elif what == 2:
        kind.elem_type = rng.randrange(25)
    elif what == 3:
        dims.add().dim_value = rng.choice(EXTREMES)
    else:
        del dims[rng.randrange(len(dims)):]


def _change_weights(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor, kind = rng.choice(model.graph.initializer), rng.randrange(8)
    if kind == 0:
        model.graph.initializer.remove(tensor)
    elif kind == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(EXTREMES)
    elif kind == 2:
        tensor.raw_data = tensor.raw_data[:rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 3:
        tensor.data_type = rng.randrange(25)
    elif kind == 4:
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, 3e38, 1e-45, -1e30))
        tensor.raw_data = values.tobytes()
    elif kind == 5:
        tensor.raw_data = bytes(len(tensor.raw_data))
    elif kind == 6:
        tensor.name = rng.choice(NAMES)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, content in (("location", rng.choice((*NAMES, "/etc/passwd", "w.bin", "sub/../../w.bin", "link", "."))),
                             ("offset", str(rng.choice(EXTREMES))), ("length", str(rng.choice(EXTREMES)))):
            if rng.random() < 0.7:
                entry = tensor.external_data.add()
                entry.key, entry.value = key, content
        if rng.random() < 0.5:
            tensor.raw_data = b""


def _change_header(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        model.opset_import[0].version = rng.choice((*EXTREMES, 9, 11, 12, 13, 24))
    elif kind == 1:
        model.ir_version = rng.choice(EXTREMES)
    elif kind == 2:
        model.opset_import.add().domain = rng.choice(NAMES)
    elif kind == 3:
        states = rng.choice(('{"r": "s"}', "{", "[]", '{"a": 1}', "null", "1"))
        onnx.helper.set_model_props(model, {"vmq.states": states})
    else:
        del model.graph.output[rng.randrange(3):]


def _insert_growth(model: onnx.ModelProto, rng: random.Random) -> None:
    """A node that makes something huge of little."""
    place = rng.randrange(len(model.graph.node))
    node = model.graph.node[place]
    values = np.array([rng.choice((2, 1000, 100_000, 2**31, 2**40, -1, 0)) for _ in range(4)], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "grown_by"))
    op = rng.choice(("Expand", "Tile", "Reshape", "ConstantOfShape", "Resize", "Pad"))
    inputs = {"ConstantOfShape": ["grown_by"], "Resize": [node.input[0], "", "", "grown_by"]}.get(
        op, [node.input[0], "grown_by"])
    model.graph.node.insert(place, onnx.helper.make_node(op, inputs, ["grown"]))
    model.graph.node[place + 1].input[0] = "grown"


CHANGES: Sequence[Callable[[onnx.ModelProto, random.Random], None]] = (
    _change_values, _change_nodes, _change_attributes, _change_shapes, _change_weights, _change_header, _insert_growth)

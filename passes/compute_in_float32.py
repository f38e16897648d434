"""Compute in float32, in whatever float type the model was exported; what it takes and gives keeps its type.

Scales, biases and everything between integer kernels are float32. So constants become float32 (from float16 that is
exact), a Cast to another float type becomes one to float32, and inputs and outputs of another type get a Cast at the
model's edge:

    half -> network in half -> half      becomes      half -> Cast -> network in float32 -> Cast -> half

What a float16 model rounds on its way is no longer rounded. Shape arithmetic is constant by then, computed in its
own types.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx

from passes.fold_shapes import drop_noops
from vmq.graph import Graph, Variable
from vmq.pipeline import Context, Pass, PassResult

OTHERS = frozenset(np.dtype(t) for t in (np.float16, np.float64, ml_dtypes.bfloat16))
"""Float types that are not computed in."""
_TYPE_ATTRIBUTES = ("to", "dtype")
"""Attributes that say the type of a result, as a number of TensorProto."""


class ComputeInFloat32(Pass):
    """Turn float16 and float64 into float32, except where the model is fed and read."""

    name: ClassVar[str] = "compute_in_float32"

    def run(self, graph: Graph, context: Context) -> PassResult:
        inputs, outputs = ([v for v in values if _is_other(v.dtype)] for values in (graph.inputs, graph.outputs))
        changed = _constants(graph) + _attributes(graph)
        if not changed and not inputs and not outputs:
            return PassResult()
        for value in graph.values():
            if isinstance(value, Variable) and _is_other(value.dtype) and not _among(value, (*inputs, *outputs)):
                value.dtype = np.dtype(np.float32)
        for value in inputs:
            readers = list(value.outputs)
            graph.replace_uses(value, _cast(graph, value, f"{value.name}_float32", np.float32), readers)
        for value in outputs:
            maker, readers = value.inputs[0], list(value.outputs)
            inner = Variable(graph.unique(f"{value.name}_float32"), dtype=np.float32, shape=value.shape)
            maker.outputs = [inner if v is value else v for v in maker.outputs]
            graph.replace_uses(value, inner, readers)
            _cast(graph, inner, value, value.dtype)
        graph.sort()
        graph.infer_shapes()                     # and types
        dropped = drop_noops(graph)
        notes = [f"{v.name} is {np.dtype(v.dtype).name} and stays so; what is between is compiled in float32"
                 for v in (*inputs, *outputs)]
        return PassResult(modified=changed + dropped + len(inputs) + len(outputs), notes=tuple(notes[:1]), report={
            "changed": changed, "inputs": [v.name for v in inputs], "outputs": [v.name for v in outputs]})


def _is_other(dtype: Any) -> bool:
    return dtype is not None and np.dtype(dtype) in OTHERS


def _among(value: Any, values: Iterable[Any]) -> bool:
    return any(v is value for v in values)


def _constants(graph: Graph) -> int:
    """Turn constants into float32; returns how many."""
    count = 0
    largest = float(np.finfo(np.float32).max)
    for constant in list(graph.constants()):
        if _is_other(constant.dtype):
            constant.values = np.clip(np.asarray(constant.values, np.float64), -largest, largest).astype(np.float32)
            count += 1
    return count


def _attributes(graph: Graph) -> int:
    """Let nodes that say the type of their result say float32; returns how many."""
    count = 0
    for node in graph.nodes:
        for name in _TYPE_ATTRIBUTES:
            said = node.attrs.get(name)
            if isinstance(said, int) and said and _is_other(onnx.helper.tensor_dtype_to_np_dtype(said)):
                node.attrs[name] = onnx.TensorProto.FLOAT
                count += 1
        value = node.attrs.get("value")                   # of ConstantOfShape
        if value is not None and _is_other(value.values.dtype):
            value.values = value.values.astype(np.float32)
            count += 1
    return count


def _cast(graph: Graph, value: Any, output: Any, dtype: Any) -> Any:
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return graph.add("Cast", [value], output, {"to": to}, value.shape, dtype)

"""Refuse what must not be quantized: models that are quantized already, and weights that are NaN or infinite.

Found here, bad input is one clear line; found three passes later, it is a riddle.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.errors import ModelError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult

QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
                       "QLinearConv", "QLinearMatMul"})


class CheckInput(Pass):
    """Refuse models that are quantized already, or hold NaN."""

    name: ClassVar[str] = "check_input"
    changes: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in graph.nodes:
            if node.op in QUANTIZED:
                raise ModelError(f"the model is quantized already: node {node.name!r} is {node.op}; "
                                 "give the float model")
        for constant in graph.constants():
            _check_constant(constant)
        ops: dict[str, int] = {}
        for node in graph.nodes:
            ops[node.op] = ops.get(node.op, 0) + 1
        return PassResult(report={"nodes": len(graph.nodes), "ops": dict(sorted(ops.items()))})


def _check_constant(constant: Any) -> None:
    values = np.asarray(constant.values)
    if values.dtype.kind != "f":
        return
    reader = constant.outputs[0].name if constant.outputs else "no node"
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ModelError(f"weight {constant.name!r} (read by {reader!r}) holds {bad} values that are NaN or infinite; "
                         "export the model from a good checkpoint")

"""Bring the model to the opset that vmq works in: 21, the first in which Q and DQ know 4-bit integers."""

from __future__ import annotations

from typing import ClassVar

from onnx import version_converter

from vmq.errors import PassError
from vmq.graph import OPSET, Graph
from vmq.pipeline import Context, Pass, PassResult


class RaiseOpset(Pass):
    """Convert the model to opset 21, unless it has that or a later one."""

    name: ClassVar[str] = "raise_opset"

    def run(self, graph: Graph, context: Context) -> PassResult:
        before = graph.opset
        if before >= OPSET:
            return PassResult()
        try:
            converted = version_converter.convert_version(graph.to_proto(), OPSET)
        except (RuntimeError, version_converter.ConvertError) as error:
            raise PassError(f"opset {before} cannot be converted to {OPSET} ({' '.join(str(error).split())[:200]}); "
                            f"export the model with opset {OPSET}") from error
        graph.become(Graph.load(converted))
        return PassResult(modified=len(graph.nodes), report={"from": before, "to": OPSET})

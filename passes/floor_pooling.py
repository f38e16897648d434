"""Take ceil_mode off poolings in which it rounds nothing.

    size' = (size + pads - ((kernel - 1) * dilation + 1)) / stride + 1      rounded down, or up with ceil_mode

Where the division is exact in every dimension both are the same, and so is every window (ONNX, AveragePool and
MaxPool). Exporters write ceil_mode for odd sizes, and RVM's official file carries it; several runtimes refuse it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult

POOLINGS = frozenset({"AveragePool", "LpPool", "MaxPool"})


class FloorPooling(Pass):
    """Take ceil_mode off poolings whose windows fit exactly; some runtimes refuse it."""

    name: ClassVar[str] = "floor_pooling"

    def run(self, graph: Graph, context: Context) -> PassResult:
        modified, notes = 0, list[str]()
        for node in graph.nodes:
            if node.op not in POOLINGS or not node.attrs.get("ceil_mode", 0):
                continue
            if _fits(node):
                node.attrs["ceil_mode"] = 0
                modified += 1
            else:
                notes.append(f"{node.name} needs its ceil_mode at {node.inputs[0].shape}; some runtimes refuse it")
        return PassResult(modified, tuple(notes))


def _fits(node: Any) -> bool:
    """Whether the windows of a pooling end where its padded input ends, in every dimension."""
    kernel = node.attrs["kernel_shape"]
    sizes = (node.inputs[0].shape or [])[2:]
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or len(sizes) != len(kernel) \
            or not all(isinstance(size, int) for size in sizes):
        return False
    rank = len(kernel)
    strides, dilations = (node.attrs.get(key, [1] * rank) for key in ("strides", "dilations"))
    pads = node.attrs.get("pads", [0] * 2 * rank)
    return all((sizes[i] + pads[i] + pads[rank + i] - (kernel[i] - 1) * dilations[i] - 1) % strides[i] == 0
               for i in range(rank))

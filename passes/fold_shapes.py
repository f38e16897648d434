"""Compute what static shapes make constant, and take out nodes that hand on what they get.

With all sizes bound, Shape, Gather and the arithmetic that computes Resize sizes are constants, a Slice that
cuts nothing and an Expand that widens nothing are no-ops. None of this changes a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

# Operators that are the identity when their result has their first input's shape.
SAME_SHAPE = frozenset({"Expand", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Tile"})


class FoldShapes(Pass):
    """Fold shape arithmetic into constants; drop Identity, Dropout and no-op Slice, Expand, Reshape, Cast."""

    name: ClassVar[str] = "fold_shapes"

    def run(self, graph: Graph, context: Context) -> PassResult:
        before = len(graph.nodes)
        probe = graph.copy()          # folding rewrites in place: look first whether there is anything to do
        folded = probe.fold_constants()
        dropped = drop_noops(probe)
        probe.cleanup()
        if not folded and not dropped and len(probe.nodes) == before:
            return PassResult()
        graph.become(probe)
        return PassResult(modified=before - len(graph.nodes), report={"folded": folded, "no_ops": dropped})


def drop_noops(graph: Graph) -> int:
    """Take out nodes that hand on what they get; returns how many."""
    dropped = 0
    for node in list(graph.nodes):
        if _is_noop(graph, node) and not _between_input_and_output(graph, node):
            graph.replace_uses(node.outputs[0], node.inputs[0])
            graph.remove(node)
            dropped += 1
    graph.sort()
    return dropped


def _between_input_and_output(graph: Graph, node: Any) -> bool:
    """True when a model output would have to be an input, a constant or another output: the node stays."""
    if not any(o is node.outputs[0] for o in graph.outputs):
        return False
    source = node.inputs[0]
    return isinstance(source, Constant) or not source.inputs or any(o is source for o in graph.outputs)


def _is_noop(graph: Graph, node: Any) -> bool:
    source, result = (node.inputs[0] if node.inputs else None), node.outputs[0]
    if source is None or not source.name or isinstance(source, Constant):
        return False
    if node.op == "Identity":
        return True
    if node.op == "Dropout":
        mask_read = any(v.outputs or any(o is v for o in graph.outputs) for v in node.outputs[1:])
        return not mask_read and _constant(node, 2, lambda training: ~training.astype(bool))
    if node.op == "Concat":
        return len(node.inputs) == 1
    if node.op == "Cast":
        return source.dtype is not None and source.dtype == result.dtype
    if node.op == "Transpose":
        return list(node.attrs.get("perm", [])) == list(range(len(source.shape or [None])))
    if source.shape is None or not all(isinstance(d, int) for d in source.shape) \
            or list(source.shape) != list(result.shape or [None]):
        return False
    if node.op == "Slice":
        return _constant(node, 4, lambda steps: steps > 0)
    if node.op == "Pad":                    # of one shape is also what pads one end and cuts the other
        return _constant(node, 1, lambda pads: pads == 0)
    if node.op == "Resize":
        crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        return not crops and _constant(node, 2, lambda scales: scales == 1)
    return node.op in SAME_SHAPE


def _constant(node: Any, index: int, holds: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> bool:
    """Whether input `index` is left out, or a constant whose elements all satisfy `holds`."""
    if len(node.inputs) <= index or not node.inputs[index].name:
        return True
    value = node.inputs[index]
    return isinstance(value, Constant) and bool(holds(np.asarray(value.values)).all())

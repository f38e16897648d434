"""The stable text form of a graph, for printing, dumps, diffs and golden tests.

One line a node, in topological order; small constants by value, large ones by shape and a hash of their
content, so that two graphs with equal text compute the same.
"""

from __future__ import annotations

import difflib
import hashlib
from typing import Any

import numpy as np

from vmq.graph import Constant, Graph

SMALL = 4
"""Constants with up to this many elements are printed by value."""


def format_graph(graph: Graph) -> str:
    """The graph as text, ending in a newline."""
    lines = [f"opset {graph.opset}"]
    lines += [f"in  {v.name}: {_type(v)}" for v in graph.inputs]
    lines += [_node(n) for n in graph.nodes]
    lines += [f"out {v.name}: {_type(v)}" + (f" = {_operand(v)}" if isinstance(v, Constant) else "")
              for v in graph.outputs]
    return "\n".join(lines) + "\n"


def diff_graphs(before: str, after: str) -> str:
    """Unified diff of two texts from `format_graph`; empty when they are the same."""
    return "".join(difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True),
                                        "before", "after", n=0))


def _node(node: Any) -> str:
    outputs = ", ".join(f"%{v.name}" if v.name else "_" for v in node.outputs)
    inputs = ", ".join(_operand(v) for v in node.inputs)
    attrs = "".join(f" {key}={_attribute(value)}" for key, value in sorted(node.attrs.items()))
    return f"{outputs} = {node.op}({inputs}){attrs}"


def _operand(value: Any) -> str:
    if not isinstance(value, Constant):
        return f"%{value.name}" if value.name else "_"
    array = np.asarray(value.values)
    kind = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
    if array.size <= SMALL:
        wide = array.astype(np.int64) if array.dtype.name in ("int4", "uint4") else array
        digits = 17 if wide.dtype == np.float64 else 9       # as many as tell every two values apart
        return f"{kind}{{{', '.join(f'{x:.{digits}g}' if wide.dtype.kind == 'f' else str(x) for x in wide.ravel())}}}"
    return f"{kind}#{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]}"


def _attribute(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{value.tolist()}"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _type(value: Any) -> str:
    kind = np.dtype(value.dtype).name if value.dtype is not None else "?"
    shape = ",".join("?" if d is None else str(d) for d in value.shape) if value.shape is not None else "..."
    return f"{kind}[{shape}]"

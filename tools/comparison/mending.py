"""Other tools' models, made readable for vmq."""

from __future__ import annotations

from pathlib import Path

import onnx

from vmq.errors import ModelError

STANDARD_TYPES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32)
"""Types of a zero point that DequantizeLinear has taken since it is per channel (opset 13)."""


def mend(path: Path, reference: Path) -> None:
    """Make a peer's model readable for strict readers, without changing what it computes.

    It gets the names of the float network's inputs and outputs; those that are called otherwise are told by their
    order. Nodes that stand before those they read from move behind them. Where the runtime's own Quantize- and
    DequantizeLinear are used for types that the standard ones take as well, those are.

    Raises:
        ModelError: its inputs or outputs are not the network's, by number or by shape; or it has a cycle.
    """
    model, wanted = onnx.load(path), onnx.load(reference, load_external_data=False)
    names: dict[str, str] = {}
    for kind in ("input", "output"):
        ours, theirs = _values(wanted, kind), _values(model, kind)
        kept = {name: name for name in ours if name in theirs}
        others = zip((n for n in theirs if n not in kept), (n for n in ours if n not in kept), strict=False)
        found = kept | dict(others)
        if len(ours) != len(theirs) or any(theirs[there] != ours[here] for there, here in found.items()):
            raise ModelError(f"its {kind}s are not the network's: {', '.join(f'{n} {s}' for n, s in theirs.items())}")
        names |= {there: here for there, here in found.items() if there != here}
    graph = model.graph
    types = {value.name: value.data_type for value in graph.initializer}
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | set(types)
    for name in {*names.values()} & taken - names.keys():       # an inner value that has the name
        names[name] = next(free for n in range(len(taken) + 1) if (free := f"{name}_{n}") not in taken)
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in ("QuantizeLinear", "DequantizeLinear") \
                and types.get(node.input[-1]) in STANDARD_TYPES:
            node.domain = ""
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    _sort(graph)
    onnx.save(model, path)


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node behind those it reads from; nodes that stand right keep their order."""
    known = {"", *(value.name for value in (*graph.input, *graph.initializer))}
    ordered: list[onnx.NodeProto] = []
    left = list(graph.node)
    while left:
        waiting = []
        for node in left:
            if known.issuperset(node.input):
                ordered.append(node)
                known.update(node.output)
            else:
                waiting.append(node)
        if len(waiting) == len(left):
            raise ModelError(f"its node {left[0].name or left[0].op_type} reads what nothing before it gives")
        left = waiting
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(ordered)


def _values(model: onnx.ModelProto, kind: str) -> dict[str, list[int]]:
    """Shapes of the inputs or outputs by name."""
    constants = {value.name for value in model.graph.initializer}
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in getattr(model.graph, kind) if v.name not in constants}

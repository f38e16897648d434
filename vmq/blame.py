"""Blame: how much of the alpha error each closure causes, measured by taking its quantizers out.

For a closure K of the compiled graph, with d(...) the mean |alpha - float alpha| x 1e3 in closed loop:

    cost(K) = d(K alone quantized, everything else in float)
    gain(K) = d(everything quantized) - d(everything but K quantized)

Gains say what there is to win by keeping K wider, costs where error would come from in a network that is otherwise
exact. The two differ because errors cancel and saturate, and because learned layers make up for what layers before
them lost: costs are not shares of the whole error.

A grid may also be wrong rather than coarse. Of those that do not fit,

    refit(T) = d(everything quantized) - d(the same with the best step for T, by squared error)

says what there is to win without any wider type.

Masking a closure bypasses the Q/DQ pairs behind its tensors and gives its layers the float model's weights and biases.
What is left is a QDQ model like any other, and ONNX Runtime runs it. A tensor belongs to the closure that makes it;
weights, the frame and the states to the closure that reads them first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.layers import homes, quantizer_of, written_by
from vmq.runtime import Session
from vmq.tensors import scales_of

Frames = NDArray[np.uint8]
"""A clip, [T,3,H,W] RGB."""


@dataclass(frozen=True)
class Blame:
    """What one closure, or one tensor, does to alpha; all in mean |alpha - float alpha| x 1e3.

    Attributes:
        name: its name.
        cost: error when it alone is quantized.
        gain: by how much the error falls when it alone is kept in float.
    """

    name: str
    cost: float
    gain: float

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self)


def blame(quantized: Graph, reference: Graph, units: Mapping[str, Collection[str]], frames: Frames, *,
          session: Mapping[str, Any] | None = None, progress: Callable[[float], None] = lambda _share: None,
          ) -> tuple[float, list[Blame]]:
    """The error with everything quantized, which gains are of, and every closure's (or whatever the units are) cost
    and gain, where most is to gain first.

    Args:
        quantized: the compiled model.
        reference: the float model it was made from, with the same names of nodes.
        units: names of the DequantizeLinear nodes of each, as `closure_quantizers` gives them.
        frames: a clip that both run over in closed loop.
        session: further arguments of `Session`, such as state pairs.
        progress: called with the share done.
    """
    how = dict(session or {})
    want = _alphas(reference, frames, how)
    everything = {n.name for n in quantized.nodes if n.op == "DequantizeLinear"}

    def error(floats: Collection[str]) -> float:
        return float(np.abs(_alphas(masked(quantized, reference, floats), frames, how) - want).mean()) * 1e3

    whole = error(())
    found = []
    for index, (name, nodes) in enumerate(units.items()):
        alone = error(everything.difference(nodes))
        progress((index + 0.5) / len(units))
        found.append(Blame(name, alone, whole - error(nodes)))
        progress((index + 1) / len(units))
    return whole, sorted(found, key=lambda b: (-b.gain, b.name))


def refit(quantized: Graph, reference: Graph, fits: Mapping[str, float], frames: Frames, *,
          session: Mapping[str, Any] | None = None, progress: Callable[[float], None] = lambda _share: None,
          ) -> dict[str, float]:
    """By how much the error falls when the grid of one tensor gets another step, by the tensor's name, most first.

    Tensors that share a grid are one, under the name of the one that wants the widest steps, and get those.

    Args:
        quantized, reference, frames, session, progress: as for `blame`.
        fits: by tensor, what its step is multiplied by: `Tensor.fit`.
    """
    if not fits:
        return {}
    how, gains, done = dict(session or {}), dict[str, float](), set[str]()
    want = _alphas(reference, frames, how)

    def error(graph: Graph) -> float:
        return float(np.abs(_alphas(graph, frames, how) - want).mean()) * 1e3

    whole = error(quantized)
    for index, (name, factor) in enumerate(sorted(fits.items(), key=lambda item: -item[1])):
        graph = quantized.copy()
        scales = scales_of(graph, name)
        if done.isdisjoint(s.name for s in scales):
            for scale in scales:
                scale.values = np.asarray(scale.values * np.float32(factor))
            gains[name] = whole - error(graph)
            done |= {s.name for s in scales}
        progress((index + 1) / len(fits))
    return dict(sorted(gains.items(), key=lambda item: (-item[1], item[0])))


def closure_quantizers(quantized: Graph, closures: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """The DequantizeLinear nodes that belong to each closure.

    Args:
        quantized: a graph.
        closures: names of each closure's nodes, by the closure's name, in topological order.
    """
    names = list(closures)
    home = homes(quantized, list(closures.values()))
    units = {name: set[str]() for name in names}
    for node in quantized.nodes:
        if node.op == "DequantizeLinear":
            pair = quantizer_of(node)                  # behind a Clip, too, it belongs to what makes the value
            units[names[home[pair[0].name if pair is not None else node.name]]].add(node.name)
    return units


def tensor_quantizers(quantized: Graph, reference: Graph, closures: Mapping[str, Collection[str]], name: str,
                      ) -> dict[str, set[str]]:
    """The DequantizeLinear nodes of each tensor of the closure called `name`, by the tensor's name in the float graph.

    A layer's bias belongs to its weight. Tensors that share a grid are one unit, under the first one's name: where one
    quantizer of a value that a Split hands on, or that goes round as a state, is bypassed, the next rounds the same.
    """
    twins = {n.name: n for n in reference.nodes}
    known = {v.name for v in reference.values()}
    within = closure_quantizers(quantized, closures)[name]
    units: dict[str, set[str]] = {}
    for node in quantized.nodes:
        if node.name not in within:
            continue
        value, chain = node.outputs[0], [node.outputs[0].name]
        while value.inputs and value.inputs[0].op in ("QuantizeLinear", "DequantizeLinear", "Clip", "Cast") \
                and value.inputs[0].name not in twins:
            value = value.inputs[0].inputs[0]
            chain.append(value.name)
        if isinstance(value, Constant):
            twin = twins.get(node.outputs[0].outputs[0].name) if node.outputs[0].outputs else None
            constants = [v.name for v in twin.inputs if isinstance(v, Constant)] if twin is not None else []
            units.setdefault((constants or [_first_known(node.outputs[0], known)])[0], set()).add(node.name)
        else:
            behind = next((n for n in reversed(chain) if n in known), None) or _first_known(node.outputs[0], known)
            units.setdefault(behind, set()).add(node.name)
    return _on_one_grid(quantized, units)


def _on_one_grid(quantized: Graph, units: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The units with those joined whose quantizers have a scale in common."""
    scales = {n.name: {id(q.inputs[1]) for q in (n, written_by(n)) if q is not None}
              for n in quantized.nodes if n.op == "DequantizeLinear"}
    joined: list[tuple[str, set[str], set[int]]] = []
    for name, nodes in units.items():
        grids = {scale for node in nodes for scale in scales[node]}
        same = [unit for unit in joined if unit[2] & grids]
        joined = [unit for unit in joined if not unit[2] & grids]
        joined.append((min((name, *(u[0] for u in same)), key=list(units).index),
                       nodes.union(*(u[1] for u in same)), grids.union(*(u[2] for u in same))))
    return {name: nodes for name, nodes, _ in joined}


def _first_known(value: Any, known: Collection[str]) -> str:
    """The nearest value behind a part of a form (passes/integer_forms.py) that the float graph has too."""
    todo = [value]
    while todo:
        value = todo.pop(0)
        if value.name in known:
            break
        todo += [o for r in value.outputs for o in r.outputs]
    return str(value.name)


def masked(quantized: Graph, reference: Graph, floats: Collection[str]) -> Graph:
    """A copy of a quantized graph in which these nodes compute in float.

    Args:
        quantized: is left as it is.
        reference: the float graph, with the same names of nodes.
        floats: names of nodes; of a DequantizeLinear among them, the pair that it ends is bypassed.
    """
    graph, twins = quantized.copy(), {n.name: n for n in reference.nodes}
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "DequantizeLinear" or node.name not in floats:
            continue
        result = node.outputs[0]
        quantizer = quantizer_of(node)
        if quantizer is not None and not isinstance(quantizer[0].inputs[0], Constant):
            graph.replace_uses(result, quantizer[0].inputs[0])
            continue
        written = written_by(node)
        if written is not None:
            graph.replace_uses(result, _unrounded(graph, written, node))
            continue
        for reader in list(result.outputs):            # a stored weight, a bias, or a constant operand
            index = next(i for i, v in enumerate(reader.inputs) if v is result)
            twin = twins.get(reader.name)
            if twin is None:
                continue
            if twin.op != reader.op:                   # a number that passes/integer_forms.py put in, exact
                continue
            if index >= len(twin.inputs):              # a bias that came in with the correction of means
                del reader.inputs[index]
            elif isinstance(twin.inputs[index], Constant):
                exact = twin.inputs[index]
                if exact.name not in constants:
                    constants[exact.name] = graph.constant(exact.name, np.asarray(exact.values))
                reader.inputs[index] = constants[exact.name]
    graph.cleanup()
    graph.sort()
    return graph


def _unrounded(graph: Graph, written: Any, read: Any) -> Any:
    """What a form (passes/integer_forms.py) makes of a float value if nothing is rounded: shifted, clipped, scaled."""
    value, shape = written.inputs[0], written.inputs[0].shape
    scales, zeros = zip(*((float(n.inputs[1].values), float(n.inputs[2].values)) for n in (written, read)), strict=True)
    saturates = [("Clip", [0.0, 256.0])] if zeros[0] != zeros[1] else []
    for op, numbers in (("Mul", [1.0 / scales[0]]), ("Add", [zeros[0]]), *saturates, ("Add", [-zeros[1]]),
                        ("Mul", [scales[1]])):
        constants = [graph.constant("number", np.asarray(n, np.float32)) for n in numbers]
        value = graph.add(op, [value, *constants], f"{read.name}_unrounded", {}, shape)
    return value


def _alphas(graph: Graph, frames: Frames, how: Mapping[str, Any]) -> NDArray[np.float32]:
    return np.stack(list(Session(graph, **how).alphas(frames)))

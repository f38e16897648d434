"""Channels of a value multiplied by positive numbers, and all that is tied to it along, so that no output changes.

    conv(x, W) = conv(s * x, W / s)          s one number a channel

x may be scaled where it is made, W where x is read; between the two lie Relu, Resize, pooling and Split, which a factor
passes through, and Add, Concat and gates, which tie it to other values. What meets anything else cannot be scaled,
but for a hardswish, where its gate may be unscaled:

    s * hardswish(x) = s x * hardsigmoid(s x / s)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph

PASSING = frozenset({"Relu", "LeakyRelu", "Resize", "AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool"})
"""Operators of one value that a positive factor a channel passes through."""

Array = NDArray[np.float64]


def leaves(value: Any) -> Iterator[tuple[Any, list[int]]]:
    """What a value of several channels is joined from, through Concats and what factors pass through.

    Yields:
        values that something else makes, or that are inputs, and which channels of `value` they are.
    """
    todo = [(value, list(range(value.shape[1])))]
    while todo:
        part, places = todo.pop(0)
        maker = part.inputs[0] if part.inputs else None
        if maker is not None and maker.op == "Concat" and _joins_channels(maker):
            for operand, (first, last) in zip(maker.inputs, _sections(maker.inputs), strict=True):
                todo.append((operand, places[first:last]))
        elif maker is not None and maker.op == "Resize":
            todo.append((maker.inputs[0], places))
        elif not isinstance(part, Constant):
            yield part, places


class Scaling:
    """Factors for a value and what is tied to it; nothing is changed until `apply`.

    Args:
        graph: that they stand in.
        value: [N,C,H,W].
        factors: [C], positive.
        made: a node that reads the value, which is scaled already: what is made of it there is left to do.
        swish: hardswishes may be written apart.

    Attributes:
        possible: whether all that is tied can be scaled.
        swished: hardswishes that are written apart, and the factors of what they give.
    """

    def __init__(self, graph: Graph, value: Any, factors: Array, made: Any = None, swish: bool = False) -> None:
        self._outputs = {id(v) for v in graph.outputs}
        self._graph = graph
        self._factors: dict[int, tuple[Any, Array]] = {}
        self._todo: list[Any] = []
        self._made: list[tuple[Any, Array]] = []
        self._read: list[tuple[Any, Array]] = []
        self.possible = True
        self._swish = swish
        self.swished: list[tuple[Any, Array]] = []
        self._scaled = (value, made) if made is not None else None
        self._set(value, factors)
        while self._todo and self.possible:
            current = self._todo.pop()
            _, factors = self._factors[id(current)]
            if self._scaled is not None and current is self._scaled[0]:
                self.possible = self._down(self._scaled[1], current, factors) and self.possible
            elif not (factors == 1.0).all():
                self.possible = id(current) not in self._outputs and bool(current.inputs) \
                    and self._up(current, factors) \
                    and all(self._down(reader, current, factors) for reader in current.outputs) and self.possible

    @property
    def readers(self) -> list[Any]:
        """Layers whose weights are unscaled."""
        return [node for node, _ in self._read]

    def factors(self) -> dict[str, Array]:
        """Those of all values that are scaled, by name."""
        return {value.name: factors for value, factors in self._factors.values()}

    def apply(self) -> None:
        """Scale the weights of layers that make these values, and unscale those of layers that read them."""
        assert self.possible
        for node, factors in self._made:
            for index in range(1, len(node.inputs)):
                scale_rows(self._graph, node, index, factors)
        for node, factors in self._read:
            scale_columns(self._graph, node, 1.0 / factors)
        for node, factors in self.swished:
            _write_apart(self._graph, node, 1.0 / factors)

    def _set(self, value: Any, factors: Array) -> bool:
        known = self._factors.get(id(value))
        if known is None:
            self._factors[id(value)] = value, factors
            self._todo.append(value)
        elif not np.allclose(known[1], factors, rtol=1e-9):
            self.possible = False
        return self.possible

    def _up(self, value: Any, factors: Array) -> bool:
        """Scale what makes a value."""
        node = value.inputs[0]
        if node.op == "Conv":
            self._made.append((node, factors))
            return own_constants(node)
        if node.op in PASSING:
            return self._set(node.inputs[0], factors)
        if node.op == "HardSwish" and self._swish:
            self.swished.append((node, factors))
            return len(node.inputs[0].outputs) == 1 and self._set(node.inputs[0], factors)
        if node.op == "Add":
            return all(_as_many(v, factors) and self._set(v, factors) for v in node.inputs)
        if node.op == "Mul":
            full = [v for v in node.inputs if not is_gate(v)]
            return len(full) == 1 and self._set(full[0], factors)
        if node.op == "Split" and node.attrs.get("axis", 0) == 1:
            parts = [factors if v is value else np.ones(v.shape[1]) for v in node.outputs]
            return self._set(node.inputs[0], np.concatenate(parts))
        if node.op == "Concat" and _joins_channels(node):
            return all(self._set(v, factors[first:last]) if not isinstance(v, Constant) else not np.any(v.values)
                       for v, (first, last) in zip(node.inputs, _sections(node.inputs), strict=True))
        return False

    def _down(self, node: Any, value: Any, factors: Array) -> bool:
        """Scale what is made of a value, or unscale the weights that read it."""
        if node.op == "Conv":
            self._read.append((node, factors))
            return value is node.inputs[0] and all(v is not value for v in node.inputs[1:]) and own_constants(node) \
                and node.attrs.get("group", 1) in (1, len(factors))
        if node.op in PASSING:
            return self._set(node.outputs[0], factors)
        if node.op == "HardSwish" and self._swish:
            return len(value.outputs) == 1 and self._set(node.outputs[0], factors)
        if node.op == "Add":
            return _as_many(node.outputs[0], factors) and self._set(node.outputs[0], factors)
        if node.op == "Mul":
            full = [v for v in node.inputs if not is_gate(v)]
            return len(full) == 1 and full[0] is value and self._set(node.outputs[0], factors)
        if node.op == "Split" and node.attrs.get("axis", 0) == 1:
            return all(self._set(v, factors[first:last])
                       for v, (first, last) in zip(node.outputs, _sections(node.outputs), strict=True))
        if node.op == "Concat" and _joins_channels(node) and sum(v is value for v in node.inputs) == 1:
            return self._set(node.outputs[0], np.concatenate([factors if v is value else np.ones(v.shape[1])
                                                              for v in node.inputs]))
        return False


def own_constants(node: Any) -> bool:
    """True where a layer's weight and bias are constants that no other node reads."""
    return all(isinstance(v, Constant) and len(v.outputs) == 1 for v in node.inputs[1:])


def is_gate(value: Any) -> bool:
    """True for one number a channel, computed."""
    return bool(value.inputs) and bool(value.shape) and len(value.shape) == 4 and list(value.shape[2:]) == [1, 1]


def scale_rows(graph: Graph, node: Any, index: int, factors: Array) -> None:
    """Multiply what a convolution's weight or bias, its input `index`, has for each output."""
    values = np.asarray(node.inputs[index].values)
    scaled = values * factors.reshape([-1] + [1] * (values.ndim - 1))
    node.inputs[index] = graph.constant(f"{node.inputs[index].name}_balanced", scaled.astype(np.float32))


def scale_columns(graph: Graph, node: Any, factors: Array) -> None:
    """Multiply the weights that an ordinary or depthwise convolution has for each of its inputs."""
    weight = np.asarray(node.inputs[1].values)
    if node.attrs.get("group", 1) > 1:
        scale_rows(graph, node, 1, np.repeat(factors, weight.shape[0] // factors.size))
        return
    scaled = weight * factors.reshape([1, -1, *[1] * (weight.ndim - 2)])
    node.inputs[1] = graph.constant(f"{node.inputs[1].name}_balanced", scaled.astype(np.float32))


def _write_apart(graph: Graph, node: Any, factors: Array) -> None:
    """A hardswish whose gate sees x multiplied by factors."""
    x = node.inputs[0]
    unscale = graph.constant("balance", factors.reshape(1, -1, 1, 1).astype(np.float32))
    seen = graph.add("Mul", [x, unscale], f"{x.name}_unscaled", shape=x.shape)
    gate = graph.add("HardSigmoid", [seen], f"{x.name}_gate", {"alpha": 1.0 / 6.0, "beta": 0.5}, x.shape)
    node.op, node.attrs, node.inputs = "Mul", {}, [x, gate]


def _joins_channels(node: Any) -> bool:
    return node.attrs.get("axis") in (1, -3) and all(v.shape and len(v.shape) == 4 for v in node.inputs)


def _sections(values: Any) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *(v.shape[1] for v in values)])
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def _as_many(value: Any, factors: Array) -> bool:
    return not isinstance(value, Constant) and bool(value.shape) and len(value.shape) == 4 \
        and value.shape[1] == len(factors)

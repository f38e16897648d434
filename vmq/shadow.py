"""The shadow: the graph as a torch module, node for node, for everything that needs gradients.

Every float constant of the graph is a parameter of the shadow, and so is every zero point. A QuantizeLinear, perhaps
with a Clip of its integers behind it, and the DequantizeLinear that reads it with the same scale and zero point
become one `FakeQuantize` whose parameters are those constants; tied quantizers share them. So there is no plan
beside the graph to keep in step: what was learned is put back by assigning the constants their new values.

Values are asked for by name. Only the nodes between what is given and what is asked for are run, which is also how
a block of the graph runs on its own, and each value is let go after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmq.errors import ModelError
from vmq.fakequant import FakeQuantize, dequantize, grid_scale, grid_zero
from vmq.graph import Constant, Graph
from vmq.layers import quantizer_of, written_by
from vmq.quant import SMALLEST_SCALE
from vmq.shadow_ops import HOST_INPUTS, Call, to_tensor
from vmq.spec import QuantSpec


@dataclass(frozen=True)
class _Step:
    """One node: what it reads ("" for an input left out), what it makes, and the function between them."""

    node: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Any]


class Shadow(nn.Module):
    """A differentiable twin of a graph.

    No parameter requires a gradient until somebody says so: `shadow.parameter(name).requires_grad_()`.

    Args:
        device: where its parameters are, and so where it computes.

    Attributes:
        graph: the graph, whose constants `write_back` assigns.
        device: see above.
        quantizers: the fake quantizer behind each dequantized value, by the value's name. An entry may be replaced
            by any function of a tensor, such as one that learns how weights are rounded.

    Raises:
        ModelError: the graph has an operator, an attribute or a constant that is not supported; names the node.
    """

    def __init__(self, graph: Graph, device: str = "cpu") -> None:
        super().__init__()
        self.graph, self.device = graph, device
        self.quantizers: dict[str, Callable[[Tensor], Tensor]] = {}
        self._constants = {c.name: c for c in graph.constants()}
        self._keys: dict[str, str] = {}               # constants, by name: their parameters and buffers, by name
        self._host: dict[str, Tensor] = {}            # constants that only describe shapes
        self._zeros: dict[str, tuple[str, QuantSpec]] = {}    # zero points: their parameters and grids
        self._scales: set[str] = set()
        tied = _tied_constants(graph)
        for constant in self._constants.values():
            if constant.name not in tied:
                self._register(constant)
        for name, first in tied.items():
            self._keys[name] = self._keys[first]
            if first in self._zeros:
                self._zeros[name] = self._zeros[first]
        self._outputs = tuple(v.name for v in graph.outputs)
        self._steps = [self._step(node) for node in graph.nodes]
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], list[tuple[_Step, tuple[str, ...]]]] = {}
        self._used = [s for s, _ in self._plan(frozenset(v.name for v in graph.inputs), self._outputs)]
        self._fixed = {"", *self._constants}          # values that depend on constants alone
        for step in self._used:
            if self._fixed.issuperset(step.inputs):
                self._fixed.update(step.outputs)

    # -- running ------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of the model, by name."""
        return self.run(inputs, self._outputs)

    def run(self, given: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        """Compute values from other values.

        Args:
            given: values by name: the model's inputs, or what a block reads from outside; nothing before them is run.
                They also stand in for constants of the same name.
            wanted: names of the values to return, results of nodes or anything else in the graph.

        Raises:
            ModelError: a value is needed that is not given, or a node does not work on what it was given.
        """
        wanted = tuple(wanted)
        key = (frozenset(given), wanted)
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        values: dict[str, Tensor] = dict(given)
        for step, done in self._plans[key]:
            arguments = [self._read(name, values) for name in step.inputs]
            results = self._call(step, arguments)
            del arguments
            values.update(zip(step.outputs, results, strict=False))
            for name in done:
                values.pop(name, None)
        return {name: self._read(name, values) for name in wanted}

    def boundary(self, nodes: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The edges of a block: what the nodes of these names read from outside, and what others read of them.

        Quantized weights are no such values: `run` computes them from their constants, in whichever block they stand.
        """
        inner, outer = ([s for s in self._used if (s.node in nodes) == within] for within in (True, False))
        made = {name for s in inner for name in s.outputs} | self._fixed
        read = {name for s in outer for name in s.inputs}.union(self._outputs) - self._fixed
        return (tuple(dict.fromkeys(n for s in inner for n in s.inputs if n not in made)),
                tuple(n for s in inner for n in s.outputs if n in read))

    def fixed_values(self) -> tuple[str, ...]:
        """Values that depend on constants alone and that others are made with, such as quantized weights.

        Over the frames of a clip they are the same: `run({}, shadow.fixed_values())` once, and give them to each frame.
        """
        return tuple(dict.fromkeys(
            n for s in self._used if not self._fixed.issuperset(s.inputs)
            for n in s.inputs if n in self._fixed and n and n not in self._constants))

    def needed(self, given: Collection[str], wanted: Iterable[str]) -> set[str]:
        """Names of all values that are read or made on the way from some values to others."""
        return {n for s, _ in self._plan(frozenset(given), tuple(wanted)) for n in (*s.inputs, *s.outputs)}

    def _plan(self, given: frozenset[str], wanted: Sequence[str]) -> list[tuple[_Step, tuple[str, ...]]]:
        """The steps that lead from what is given to what is wanted, each with the values that it is the last to use."""
        known = given | set(self._constants) | {""}
        needed, chosen = set(wanted) - known, []
        for step in reversed(self._steps):
            if not needed.isdisjoint(step.outputs):
                needed -= set(step.outputs)
                needed |= set(step.inputs) - known
                chosen.append(step)
        if needed:
            raise ModelError(f"value {min(needed)!r} is needed, but is neither given nor computed; give it")
        seen, plan = set(wanted), []
        for step in chosen:                               # from the last to the first
            plan.append((step, tuple({*step.inputs, *step.outputs} - seen)))
            seen |= set(step.inputs)
        return plan[::-1]

    def _read(self, name: str, values: Mapping[str, Tensor]) -> Any:
        if name in values:
            return values[name]
        if name in self._host:
            return self._host[name]
        return getattr(self, self._keys[name]) if name else None

    def _call(self, step: _Step, arguments: list[Any]) -> Sequence[Tensor]:
        devices = {a.device for a in arguments if a is not None}
        if len(devices) > 1 and step.op not in HOST_INPUTS:       # constants and shapes start on the host
            device = next(d for d in devices if d.type != "cpu")
            arguments = [a if a is None else a.to(device) for a in arguments]
        try:
            results = step.run(*arguments)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            if isinstance(error, (ModelError, torch.OutOfMemoryError)):
                raise
            shapes = ", ".join(str(list(a.shape)) for a in arguments if a is not None)
            raise ModelError(f"node {step.node!r} ({step.op}) does not work on {shapes}: "
                             f"{' '.join(str(error).split())[:200]}") from error
        return [results] if isinstance(results, Tensor) else results

    def __deepcopy__(self, memo: Any) -> Shadow:
        raise TypeError("a Shadow is tied to its graph; build another one with Shadow(graph.copy())")

    # -- parameters ---------------------------------------------------------------------------------

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter that stands for a float constant or a zero point of the graph.

        Raises:
            KeyError: there is no such constant.
        """
        parameter = getattr(self, self._zeros[name][0] if name in self._zeros else self._keys[name])
        if not isinstance(parameter, nn.Parameter):
            raise KeyError(name)
        return parameter

    def write_back(self) -> int:
        """Give the graph's constants the values of their parameters; returns how many changed.

        Scales and zero points are written as they are computed with: positive, and integers of their grid.
        """
        changed = 0
        for name, constant in self._constants.items():
            try:
                value = self.parameter(name).detach()
            except KeyError:
                continue
            if name in self._zeros:
                value = grid_zero(value, self._zeros[name][1])
            elif name in self._scales:
                value = grid_scale(value)
            array = value.cpu().numpy().astype(constant.dtype)
            if not np.array_equal(array, np.asarray(constant.values)):
                constant.values, changed = array, changed + 1
        return changed

    def _register(self, constant: Any) -> None:
        """Hold a constant as a parameter, a buffer or a tensor on the host."""
        try:
            tensor = to_tensor(constant.values)
        except TypeError as error:
            raise ModelError(f"constant {constant.name!r} is of type {constant.dtype}, which the differentiable shadow "
                             "does not support; export the model in float32") from error
        key = f"constant_{len(self._keys)}"
        if all(n.op in HOST_INPUTS and n.inputs[0] is not constant for n in constant.outputs):
            self._host[constant.name] = tensor
            return
        self._keys[constant.name], tensor = key, tensor.to(self.device)
        if tensor.is_floating_point():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
            return
        self.register_buffer(key, tensor, persistent=False)
        if np.dtype(constant.dtype).name in _GRIDS and any(
                n.op in _LINEAR and len(n.inputs) > 2 and n.inputs[2] is constant for n in constant.outputs):
            self._zeros[constant.name] = f"{key}_learned", QuantSpec.of(constant.dtype)
            self.register_parameter(f"{key}_learned", nn.Parameter(tensor.float(), requires_grad=False))

    # -- steps --------------------------------------------------------------------------------------

    def _step(self, node: Any) -> _Step:
        read = [bool(o.name) and bool(o.outputs or o.name in self._outputs) for o in node.outputs]
        count = max((i for i, r in enumerate(read, 1) if r), default=1)
        call = Call(node.op, node.name, node.attrs, self.graph.opset, count)
        inputs, outputs = tuple(v.name for v in node.inputs), tuple(v.name for v in node.outputs)
        if node.op not in _LINEAR:
            return _Step(node.name, node.op, inputs, outputs, call.build())
        scale, zero = node.inputs[1], (*node.inputs[2:], None)[0]
        for what, value in (("scale", scale), ("zero point", zero)):
            if value is not None and not isinstance(value, Constant):
                call.refuse(f"a {what} that is computed")
        axis = call.take("axis", 1) if scale.values.size > 1 else None
        call.expect("block_size", 0)
        self._scales.add(scale.name)
        quantize, limits = node, None
        if node.op == "DequantizeLinear":
            fused = quantizer_of(node)
            written = written_by(node)
            if written is not None:
                quantizer = self._fake_quantize(written.inputs[1], written.inputs[2], None, None, call)
                return _Step(node.name, node.op, (written.inputs[0].name,), outputs,
                             self._read_as(quantizer, scale, zero))
            if fused is None:
                return _Step(node.name, node.op, inputs[:1], outputs, self._dequantize(scale, zero, axis))
            quantize, limits = fused
        quantizer = self._fake_quantize(scale, zero, axis, limits, call)
        if node.op == "QuantizeLinear":
            return _Step(node.name, node.op, inputs[:1], outputs, quantizer.steps)
        name = outputs[0]
        self.quantizers[name] = quantizer
        return _Step(node.name, node.op, (quantize.inputs[0].name,), outputs, lambda x: self.quantizers[name](x))

    def _fake_quantize(self, scale: Any, zero: Any, axis: int | None, limits: tuple[int, int] | None, call: Call,
                       ) -> FakeQuantize:
        parameter = self.parameter(scale.name)
        if zero is None:
            call.expect("output_dtype", 0)
            return FakeQuantize(parameter, nn.Parameter(torch.zeros_like(parameter), requires_grad=False),
                                QuantSpec(8, False, axis), limits)
        if zero.name not in self._zeros:
            call.refuse(f"a zero point of type {np.dtype(zero.dtype).name}")
        return FakeQuantize(parameter, self.parameter(zero.name), QuantSpec.of(zero.dtype, axis), limits)

    def _dequantize(self, scale: Any, zero: Any, axis: int | None) -> Callable[[Tensor], Tensor]:
        def run(steps: Tensor) -> Tensor:
            shift = None if zero is None else getattr(self, self._keys[zero.name])
            if zero is not None and zero.name in self._zeros:
                shift = grid_zero(self.parameter(zero.name), self._zeros[zero.name][1])
            return dequantize(steps, self.parameter(scale.name).clamp(min=SMALLEST_SCALE), shift, axis)
        return run

    def _read_as(self, quantizer: FakeQuantize, scale: Any, zero: Any) -> Callable[[Tensor], Tensor]:
        """Integers that are read with another scale and zero point than they were written with, differentiably."""
        def run(x: Tensor) -> Tensor:
            shift = quantizer.grid_zero() + (quantizer.zero - quantizer.zero.detach())     # straight through
            steps = quantizer(x) / quantizer.scale.clamp(min=SMALLEST_SCALE) + shift
            steps = steps + (steps.round() - steps).detach()                                # integers again, exactly
            return dequantize(steps, self.parameter(scale.name).clamp(min=SMALLEST_SCALE),
                              grid_zero(self.parameter(zero.name), self._zeros[zero.name][1]), None)
        return run


_LINEAR = ("QuantizeLinear", "DequantizeLinear")
_GRIDS = ("int4", "uint4", "int8", "uint8", "uint16")


def _tied_constants(graph: Graph) -> dict[str, str]:
    """Constants that must stay equal because a pair of Q and DQ reads one each: name to the name of the first."""
    same: dict[str, str] = {}

    def root(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    for node in graph.nodes:
        fused = quantizer_of(node) if node.op == "DequantizeLinear" else None
        for one, other in zip(fused[0].inputs[1:], node.inputs[1:], strict=True) if fused else ():
            if root(one.name) != root(other.name):
                same[root(other.name)] = root(one.name)
    return {name: root(name) for name in same}

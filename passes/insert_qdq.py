"""Put Q/DQ pairs on the edges that the target's rules name. Ranges come later: every scale is 1 here.

For each value that is computed, what its readers want decides:

    multiply-add (Conv, MatMul, Gemm)   its operand at the layer's activation bits
    carrier (Add, Mul, Concat, ...)     8 bits: no narrower integer kernel exists; 16 where 8 are too few
    Concat, for integer layouts         what its own readers want, if that is one width, and one grid with what it
                                        joins, through movers too: it moves integers
    mover (Split, Reshape, ...)         what its own readers want, under the same scale: nothing is rounded twice
    Softmax, where its kernel is wrong  float, also of what an integer kernel could give
    anything else                       float

A value wanted at several widths is quantized to that of its maker, or else the widest, and from there to the
others, so that the integer kernel that makes it has one quantizer to fuse with. A layer followed by Relu or
Clip is quantized after that. For what comes after the last layer 8 bits are too few, and for products and averages
whose difference is taken: a variance as E[xy] - E[x]E[y] does not survive the rounding of its terms. Nor does what is
divided by, as in a LayerNormalization written out: rounded it may be 0. These stay float, or take the target's wide
integers. Arithmetic on single numbers stays float anywhere: it costs nothing, and a
state that counts frames must not be rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from vmq.errors import ModelError, OptionError
from vmq.graph import Constant, Graph
from vmq.layers import carries, clip_limits, compute_nodes, kinds_of, tail_nodes, weight_axis, weight_of
from vmq.pipeline import Context, Pass, PassResult
from vmq.spec import CARRIER_BITS, KEEPABLE, Bits, Options, QuantSpec
from vmq.states import WEIGHTED, StatePair
from vmq.targets import Target

KEPT_BY_DEFAULT = {"first": 8, "last": 8}
"""As BRECQ and QDrop do: the first and the last layer stay at 8 bits."""

SPECTRAL = frozenset({"Mul", "Add", "Sub", "Div", "AveragePool", "GlobalAveragePool", "ReduceMean"})
"""Operators through which a difference of two activations keeps its operands in float."""

DIVIDING = SPECTRAL | {"Sqrt", "Pow", "Abs", "ReduceL2", "ReduceSum"}
"""Operators through which a divisor keeps its operands in float, back to a Sub."""

FIRST_ONLY = frozenset({"Clip", "ReduceMean", "Resize"})
"""Operators of which only the first input is an activation."""


class InsertQdq(Pass):
    """Put Q/DQ pairs where the target has integer kernels; the float graph is kept as the reference."""

    name: ClassVar[str] = "insert_qdq"

    def requires(self, graph: Graph, context: Context) -> None:
        if not compute_nodes(graph, context.options.target):
            raise ModelError("nothing in the model can be quantized: it has no "
                             f"{', '.join(sorted(context.options.target.compute))} with constant weights")

    def run(self, graph: Graph, context: Context) -> PassResult:
        graph.infer_shapes()
        context.reference = graph.copy()
        work = _placement(graph, context)
        work.run()
        work.tie_states([(s.input, s.output) for s in work.states])
        context.found[self.name] = work.renamed
        return PassResult(modified=work.inserted, notes=tuple(work.notes), report={
            "weights": work.weights, "activations": work.activations, "layers": len(work.bits),
            "wider": work.wider()})


def layer_bits(graph: Graph, context: Context) -> dict[str, Bits]:
    """The widths that the pass would give to the operands of each layer, by the layer's name."""
    return _placement(graph, context).bits


def _placement(graph: Graph, context: Context) -> _Placement:
    closures = context.found["find_closures"]
    chosen = {n: c.bits for c in context.found.get("choose_bits", ()) for n in c.nodes}
    keep, parts = context.options.keep, context.found.get("fold_resizes", {})
    kept = {new: keep[old] for new, old in parts.items() if old in keep}
    return _Placement(graph, replace(context.options, keep={**keep, **kept}), chosen, [s.pair for s in closures.states],
                      {n for s in closures.states for n in s.nodes})


class _Placement:
    def __init__(self, graph: Graph, options: Options, chosen: Mapping[str, Bits], states: Sequence[StatePair],
                 recurrent: set[str]) -> None:
        self.graph, self.options, self.target, self.chosen = graph, options, options.target, chosen
        self.states, state_outputs = states, {s.output for s in states}
        self.state_inputs = {s.input for s in states}
        self.kinds = kinds_of(graph, self.target, state_outputs, recurrent)
        single: set[str] = {n.name for n in graph.nodes if carries(n, self.target)
                            and all(_is_number(v) for v in (*n.inputs, *n.outputs) if v.name)}
        fine = (tail_nodes(graph, self.target, state_outputs) | _differences(graph) | _divisors(graph)) - single
        self.wide_nodes, self.float_nodes = (fine, single) if self.target.wide else (set[str](), fine | single)
        for node in compute_nodes(graph, self.target):
            if node.outputs[0].outputs and all(r.name in fine | single for r in node.outputs[0].outputs):
                self.kinds[node.name].add("last")          # what it gives is not quantized: a refiner's input, too
        self.bits = {name: self._bits_of(name, kinds) for name, kinds in self.kinds.items()
                     if name not in self.float_nodes}
        self.exact_nodes, before = _exact(graph, self.target)
        self.float_nodes |= before - self.wide_nodes
        for what in options.keep:
            if what not in KEEPABLE and what not in self.kinds:
                raise OptionError(f"--keep {what}: no such layer; give one of {', '.join(KEEPABLE)}, or the name of a "
                                  f"{', '.join(sorted(self.target.compute))} node")
        self.constants: dict[tuple[int, int], Any] = {}
        self.joined: dict[str, tuple[Any, Any]] = {}    # scale and zero point that a Concat's operands share, by node
        self.renamed: dict[str, str] = {}      # model outputs whose name went to the value behind their quantizer
        self.notes: list[str] = []
        self.inserted = self.weights = self.activations = 0
        for node in graph.nodes:
            if node.op in self.target.compute and node.name not in self.kinds:
                fixed = node.op == "MatMul" and any(isinstance(v, Constant) for v in node.inputs)
                self.notes.append(f"{node.name}: its weight is "
                                  f"{'no matrix on the right' if fixed else 'computed, not constant'}; stays float")
        for name in sorted(self.float_nodes & set(self.kinds)):
            self.notes.append(f"{name}: averages or products whose difference is taken; stays float")

    def run(self) -> None:
        for value in list(self.graph.values()):
            if not isinstance(value, Constant) and (value.inputs or any(v is value for v in self.graph.inputs)):
                self._activation(value)
        for node in compute_nodes(self.graph, self.target):
            if node.name in self.bits:
                self._weight(node)
        for node in list(self.graph.nodes):
            if self._carries(node) and not (node.op == "Sub" and node.op in self.target.forms):
                for index, value in enumerate(node.inputs[:1] if node.op in FIRST_ONLY else node.inputs):
                    if isinstance(value, Constant) and self._is_float(value):
                        node.inputs[index] = self._pair(value, self._width(node))
        self.graph.sort()

    def tie_states(self, pairs: list[tuple[str, str]]) -> None:
        """Give a state one grid where it goes out and where it comes in: it is not rounded twice between frames."""
        inputs, outputs = ({v.name: v for v in values} for values in (self.graph.inputs, self.graph.outputs))
        for source, target in pairs:
            reads = [n for n in inputs[source].outputs if n.op == "QuantizeLinear"]
            made = outputs[target].inputs[0] if outputs[target].inputs else None
            if len(reads) == 1 and made is not None and made.op == "DequantizeLinear" \
                    and made.inputs[2].dtype == reads[0].inputs[2].dtype:
                for mine, theirs in zip(made.inputs[1:3], reads[0].inputs[1:3], strict=True):
                    if mine is not theirs:
                        self.graph.replace_uses(mine, theirs)

    def wider(self) -> dict[str, str]:
        """What does not have the nominal widths: layers by name, float ones too, and all tensors between carriers."""
        wide = {name: str(bits) for name, bits in self.bits.items() if bits != self._nominal(name)}
        if self.options.bits.activations < CARRIER_BITS:
            wide["tensors between elementwise operators"] = "uint8"
        if self.wide_nodes:
            wide["tensors after the last layer, and of differences of averages"] = f"uint{self.target.wide}"
        return wide | dict.fromkeys(sorted(n.name for n in self.graph.nodes if n.op in WEIGHTED
                                           and n.name not in self.bits), "float32")

    def _nominal(self, name: str) -> Bits:
        return self.chosen.get(name, self.options.bits)

    def _bits_of(self, name: str, kinds: set[str]) -> Bits:
        if self.target.wide and ("last" in kinds or name in self.wide_nodes):
            return Bits(self.options.keep.get(name, self.options.keep.get("last", CARRIER_BITS)), self.target.wide)
        keep = {**KEPT_BY_DEFAULT, **self.options.keep}
        named = [keep[k] for k in (*sorted(kinds), name) if k in keep]
        if not named:
            return self._nominal(name)
        if name in self.options.keep:
            return Bits(self.options.keep[name], self.options.keep[name])
        wide = max(named)
        return Bits(wide, max(wide, self._nominal(name).activations))

    def _wants(self, value: Any) -> set[int]:
        """Widths that the readers of a value want of it."""
        return {width for reader in value.outputs for width in self._wanted_by(reader, value)}

    def _wanted_by(self, reader: Any, value: Any) -> set[int]:
        if reader.name in self.bits:
            operands = self.target.compute[reader.op].activations
            return {self.bits[reader.name].activations} if any(reader.inputs[i] is value for i in operands) else set()
        if reader.name in self.float_nodes:
            return set()
        if self._join_behind(reader) is reader and self._moves_to(self._joins(value), value):
            return {self._join_bits(reader)}
        if (self._carries(reader) and not (reader.op in FIRST_ONLY and reader.inputs[0] is not value)) \
                or (reader.op in self.target.absorbed and reader.name in self.wide_nodes):
            return {self._width(reader)}
        if reader.op in self.target.movers and reader.inputs[0] is value:
            return {width for result in reader.outputs for width in self._wants(result)}
        return set()

    def _width(self, node: Any) -> int:
        """Bits of what an integer kernel gives, and of what one that is no multiply-add reads."""
        if node.op in self.target.absorbed and node.inputs[0].inputs:
            node = node.inputs[0].inputs[0]
        fine = node.name in self.wide_nodes or (node.name in self.bits
                                                and self.bits[node.name].activations == self.target.wide)
        return self.target.wide if self.target.wide and fine else CARRIER_BITS

    def _integer_source(self, value: Any) -> bool:
        """True when an integer kernel produces this value, perhaps with an absorbed activation behind it."""
        if not value.inputs:
            return False
        node = value.inputs[0]
        if self._absorbed(node):
            before = node.inputs[0].inputs
            return node.name in self.wide_nodes or (
                bool(before) and before[0].name in self.bits and len(node.inputs[0].outputs) == 1)
        return node.name in self.bits or self._carries(node)

    def _carries(self, node: Any) -> bool:
        return node.name not in self.float_nodes and carries(node, self.target)

    def _absorbed(self, node: Any) -> bool:
        """True for what the quantizer behind it does as well: a Relu, or a Clip to an interval that holds 0."""
        if node.op != "Clip" or "Clip" not in self.target.absorbed:
            return node.op in self.target.absorbed
        limits = clip_limits(node)
        return limits is not None and limits[0] <= 0.0 <= limits[1]

    def _activation(self, value: Any) -> None:
        if not self._is_float(value):
            return
        is_output = any(o is value for o in self.graph.outputs)
        readers = [r for r in value.outputs if r.name not in self.exact_nodes]
        if value.outputs and not readers and not is_output:
            return
        if len(readers) == 1 and self._absorbed(readers[0]) and value.inputs and value.inputs[0].name in self.bits:
            return                                          # quantized behind the Relu or Clip
        made_in_integers = self._integer_source(value)
        joins = self._joins(value)
        if joins and not made_in_integers and len(joins) < len(readers) and value.name not in self.state_inputs:
            for reader, join in joins:                      # a float value is rounded to the grid of what it joins
                self._replace(value, self._pair(value, self._join_bits(join), self._shared([join])), [reader])
            joined = {id(reader) for reader, _ in joins}
            readers = [r for r in readers if id(r) not in joined]
        by_reader = {id(r): self._wanted_by(r, value) for r in readers}
        wants = set().union(*by_reader.values())
        tied = self._tied_to(value)
        only_output = (readers or is_output) and all(r.name in self.float_nodes for r in readers)
        if self.target.wide and is_output and tied is not None:
            wants.add(QuantSpec.of(tied[1].dtype).bits)
        elif not wants and (not made_in_integers or (only_output and not self.target.wide)):
            return
        made = self._width(value.inputs[0]) if made_in_integers else max(wants)
        asks = {id(r): max(widths) for r in readers if (widths := by_reader[id(r)])}
        if made_in_integers and (is_output or made > CARRIER_BITS or any(asks.get(id(r), made) >= made
                                                                         for r in readers)):
            wants.add(made)
        first, *others = sorted(wants, key=lambda width: (width != made, -width))
        behind = self._pair(value, first, tied)
        if first < CARRIER_BITS:
            moved = [r for r in readers if asks.get(id(r)) == first]
        else:                                               # what reads floats goes on reading those that are at hand
            moved = readers if made_in_integers or self.target.wide else [r for r in readers if id(r) in asks]
        self._replace(value, behind, moved)
        for width in others:
            self.graph.replace_uses(behind, self._pair(behind, width, tied),
                                    [r for r in readers if asks.get(id(r)) == width])

    def _tied_to(self, value: Any) -> Any:
        """A scale and zero point that a value shares, or None.

        What a mover makes has those of what it moves. What only Concats read has theirs: then they move integers.
        """
        if value.inputs and value.inputs[0].op in self.target.movers and value.inputs[0].name not in self.float_nodes:
            source = value.inputs[0].inputs[0]
            if source.inputs and source.inputs[0].op == "DequantizeLinear":
                return source.inputs[0].inputs[1:3]
        if value.inputs and value.inputs[0].op == "Concat" and self.target.integer_layout:
            return self._shared(value.inputs[:1])
        joins = self._joins(value)
        return self._shared([join for _, join in joins]) if self._moves_to(joins, value) else None

    def _moves_to(self, joins: list[tuple[Any, Any]], value: Any) -> bool:
        """True for a value that takes over the grid of the Concats that read it: nothing else does."""
        return bool(joins) and len(joins) == len(value.outputs) and not any(o is value for o in self.graph.outputs) \
            and len({self._join_bits(join) for _, join in joins}) == 1

    def _join_bits(self, join: Any) -> int:
        """The width of what a Concat joins: that which all its readers want of it, or that of carriers."""
        value = join.outputs[0]
        wanted = [self._wanted_by(r, value) for r in value.outputs]
        narrow = all(wanted) and not any(o is value for o in self.graph.outputs)
        widths = set().union(*wanted) if narrow else set()
        return widths.pop() if len(widths) == 1 else CARRIER_BITS

    def _joins(self, value: Any) -> list[tuple[Any, Any]]:
        """Readers of a value that are Concats, or lead to one, which moves integers on one grid; and that Concat."""
        return [(r, join) for r in value.outputs if (join := self._join_behind(r)) is not None]

    def _join_behind(self, node: Any) -> Any:
        """The Concat that a node is, or hands its one result to through movers alone; None if there is none."""
        while node.op in self.target.movers and len(node.outputs) == 1 and len(node.outputs[0].outputs) == 1 \
                and not any(o is node.outputs[0] for o in self.graph.outputs):
            node = node.outputs[0].outputs[0]
        joins = node.op == "Concat" and self.target.integer_layout and self._carries(node)
        return node if joins else None

    def _shared(self, joins: list[Any]) -> tuple[Any, Any]:
        """The scale and zero point that the operands of some Concats share with what they make."""
        shared = next((self.joined[j.name] for j in joins if j.name in self.joined), None) \
            or self._constants(self._join_bits(joins[0]))
        self.joined.update((j.name, shared) for j in joins)
        return shared

    def _pair(self, value: Any, bits: int, tied: Any = None) -> Any:
        """Q and DQ behind a value; returns what DQ gives. Tied to constants of the same width, it shares them."""
        spec = QuantSpec(bits, signed=False)
        scale, zero = tied if tied is not None and tied[1].dtype == spec.dtype else self._constants(bits)
        self.activations += 1
        return self._q_dq(value, scale, zero, spec, {})

    def _constants(self, bits: int) -> tuple[Any, Any]:
        """A scale and a zero point that are still to be found."""
        return (self.graph.constant("scale", np.ones((), np.float32)),
                self.graph.constant("zero", np.zeros((), QuantSpec(bits, signed=False).dtype)))

    def _weight(self, node: Any) -> None:
        weight = weight_of(node, self.target)
        if not isinstance(weight, Constant):
            return
        bits, axis = self.bits[node.name].weights, weight_axis(node)
        key = (id(weight), bits)
        if key not in self.constants:
            spec = QuantSpec(bits, signed=True, axis=axis)
            channels = weight.shape[axis]
            scale = self.graph.constant("scale", np.ones(channels, np.float32))
            zero = self.graph.constant("zero", np.zeros(channels, spec.dtype))
            self.constants[key] = self._q_dq(weight, scale, zero, spec, {"axis": axis})
            self.weights += 1
        node.inputs[self.target.compute[node.op].weight] = self.constants[key]

    def _q_dq(self, value: Any, scale: Any, zero: Any, spec: QuantSpec, attrs: dict[str, Any]) -> Any:
        integers = self.graph.add("QuantizeLinear", [value, scale, zero], f"{value.name}_q", attrs, value.shape,
                                  spec.dtype)
        self.inserted += 1
        return self.graph.add("DequantizeLinear", [integers, scale, zero], f"{value.name}_dq", attrs, value.shape)

    def _replace(self, old: Any, new: Any, users: list[Any]) -> None:
        """Let `users` read `new`; a model output moves along when everything that read it does.

        A single number that is not rounded to integers yet stays as it is: it may be a state that counts.
        """
        counts = _is_number(old) and not self._integer_source(old)
        if not counts and any(o is old for o in self.graph.outputs) and {id(u) for u in users} >= {
                id(u) for u in old.outputs if u.op != "QuantizeLinear"}:
            quantizer, name = [u for u in old.outputs if u.op == "QuantizeLinear"], old.name
            self.graph.replace_uses(old, new)
            self.renamed[old.name] = name
            for node in quantizer:
                node.inputs[0] = old
            return
        self.graph.replace_uses(old, new, users)

    def _is_float(self, value: Any) -> bool:
        return value.dtype is not None and np.dtype(value.dtype) == np.float32


def _exact(graph: Graph, target: Target) -> tuple[set[str], set[str]]:
    """Nodes that read floats in any case, movers that lead to nothing else, and what computes for these alone."""
    exact, before = set[str](), set[str]()
    for node in reversed(graph.nodes):
        readers = [r.name for v in node.outputs for r in v.outputs]
        inside = bool(readers) and not any(o is v for o in graph.outputs for v in node.outputs)
        if node.op in target.exact or (node.op in target.movers and inside and exact.issuperset(readers)):
            exact.add(node.name)
        elif carries(node, target) and inside and (exact | before).issuperset(readers):
            before.add(node.name)
    return exact, before


def _differences(graph: Graph) -> set[str]:
    """Nodes that compute both sides of a difference of two activations, back to where each side was learned."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op != "Sub" or any(isinstance(v, Constant) or not v.inputs for v in node.inputs):
            continue
        sides = [v.inputs[0] for v in node.inputs]
        if not all(_spectral(s) for s in sides):
            continue
        stack = [node]
        while stack:
            current = stack.pop()
            if current.name not in found and _spectral(current):
                found.add(current.name)
                stack += [p for v in current.inputs for p in v.inputs]
    return found


def _divisors(graph: Graph) -> set[str]:
    """Nodes that compute what something is divided by."""
    found: set[str] = set()
    for node in graph.nodes:
        divisors = {"Div": node.inputs[1:], "Reciprocal": node.inputs}.get(node.op, [])
        if node.op == "Pow" and isinstance(node.inputs[1], Constant) and (node.inputs[1].values < 0).any():
            divisors = node.inputs[:1]
        stack = [p for v in divisors for p in v.inputs]
        while stack:
            current = stack.pop()
            if current.name not in found and current.op in DIVIDING:
                found.add(current.name)
                stack += [p for v in current.inputs for p in v.inputs if current.op != "Sub"]
    return found


def _is_number(value: Any) -> bool:
    """True for a tensor of one element."""
    return value.shape is not None and all(d == 1 for d in value.shape)


def _spectral(node: Any) -> bool:
    """True for operators of `SPECTRAL`, products of two activations, and convolutions that only average."""
    if node.op == "MatMul":
        return not any(isinstance(v, Constant) for v in node.inputs)
    averages = node.op == "Conv" and isinstance(node.inputs[1], Constant) \
        and np.ptp(np.asarray(node.inputs[1].values)) == 0.0
    return averages or node.op in SPECTRAL



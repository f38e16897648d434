"""Let recurrent states leave and come in as the integers they are: `--state uint8`.

A state is quantized where it comes in. That quantizer moves to where the state goes out, a frame earlier:

    x' = f(DQ(Q(x)))        becomes        q' = Q(f(DQ(q))),   q = Q(x)

The same bits in every frame, and a quarter of the memory between them. Where the state left as x' = DQ(q') on the same
grid, which insert_qdq sees to, Q is gone as well: nothing but integers passes from frame to frame. The state before
the first frame, 0, is Q(0) now: the zero point. It stands in the metadata with the scale, and `vmq run` feeds it.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import GRIDS_KEY, Session


class ExposeStates(Pass):
    """With --state uint8, hand recurrent states from frame to frame as the integers they are."""

    name: ClassVar[str] = "expose_states"
    retypes: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        states = [state.pair for state in context.found["find_closures"].states]
        if context.options.state != "uint8" or not states:
            return PassResult()
        found = Session(graph, optimize=False, pairs=context.options.pairs).pictures()
        pictures = {found.get(1), found.get(3)}                     # alpha and foreground
        grids, notes = dict[str, dict[str, Any]](), list[str]()
        for pair in states:
            value = next(v for v in graph.inputs if v.name == pair.input)
            target = next(v for v in graph.outputs if v.name == pair.output)
            quantizer = _quantizer_of(value)
            if quantizer is None or target is value or target.name in pictures:
                why = ("what becomes of it is alpha or foreground" if target.name in pictures
                       else "no quantizer to uint8 reads it alone")
                notes.append(f"{pair.input}: {why}; stays float32")
                continue
            scale, zero = quantizer.inputs[1:3]
            _hand_out(graph, target, scale, zero)
            for node in list(value.outputs):
                graph.replace_uses(node.outputs[0], value)
                graph.remove(node)
            value.dtype = np.dtype(np.uint8)
            grids[pair.input] = {"scale": float(scale.values), "zero_point": int(zero.values)}
        graph.cleanup()
        graph.sort()
        if grids:
            graph.metadata[GRIDS_KEY] = json.dumps(grids)
        return PassResult(modified=len(grids), notes=tuple(notes), report={"states": grids})


def _quantizer_of(value: Any) -> Any:
    """The quantizer to uint8 that alone reads a value (several of the same grid count as one), or None."""
    readers = list(value.outputs)
    if not readers or any(r.op != "QuantizeLinear" or r.inputs[0] is not value for r in readers):
        return None
    first = readers[0]
    if first.inputs[1].values.size > 1 or first.inputs[2].dtype != np.uint8:
        return None
    return first if all(_same(r.inputs[1:], first.inputs[1:]) for r in readers) else None


def _same(one: list[Any], other: list[Any]) -> bool:
    return all(isinstance(a, Constant) and isinstance(b, Constant) and a.dtype == b.dtype
               and np.array_equal(a.values, b.values) for a, b in zip(one, other, strict=True))


def _hand_out(graph: Graph, target: Any, scale: Any, zero: Any) -> None:
    """Let the integers of a state be the model's output in its place, under its name."""
    maker = target.inputs[0] if target.inputs else None
    if maker is not None and maker.op == "DequantizeLinear" and _same(maker.inputs[1:], [scale, zero]):
        integers = maker.inputs[0]
    else:
        integers = graph.add("QuantizeLinear", [target, scale, zero], f"{target.name}_q", None, target.shape, np.uint8)
    if not integers.inputs or any(o is integers for o in graph.outputs):
        integers = graph.add("Identity", [integers], f"{target.name}_same", None, target.shape, np.uint8)
    integers.dtype, integers.shape = np.dtype(np.uint8), target.shape
    name, target.name = target.name, graph.unique(f"{target.name}_float")
    integers.name = name
    graph.outputs[:] = [integers if o is target else o for o in graph.outputs]

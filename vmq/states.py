"""Recurrent state: which input comes back as which output, told from topology alone.

A network that carries state over a video is a feed-forward graph with a loop left open: a state input i
and a state output o, of one shape, o computed from i *and* from the frame. Of all (i, o) that could be
such a pair, the right ones are those with the least between them:

    sub(i, o) = the nodes on data paths from i to o;   take the smallest first, each i and o once.

In an LSTM c -> c' is two nodes, so it wins over c -> h'; what is left is h -> h'. "Data" excludes what
only tells a shape, an index or an axis (`data_operands`), so an expanded 1x1x1x1 first state or a size
computed from the frame confuses nothing. What every pair must have:

- o follows from i by data, with the same type and rank, and dimensions that are equal where both are known;
- a driver: another input that o follows from, and that is not itself a state. A feed-forward network of
  one input so has none, and of two inputs that reach the same outputs one always stays the frame;
- an input of 3 channels is taken for a frame. It is a state only if a driver does weighted work for o (a
  convolution or the like) that the input has no influence on: RVM's src -> fgr (same shape, reachable) and a
  pair of images that are stacked and sent through one network are no states;
- an input that is handed out unchanged (`o = Identity(i)`) is a constant that the caller keeps; it never
  changes, and is not a state. (So a delay line, p2' = p1, has to be paired by hand.)

Equal candidates. Of two with equally many nodes between, the one that is not image-like wins, then the
one with the shorter path (h1' = h1 + d before h2' = h2 + d where both read both). If they still are equal
and exclude each other, the one that leaves the rest of the candidates more pairs wins. If that too is
equal, topology does not tell: an error names both. A trimap and a fed-back alpha look the same to topology
(both are taken for a state): `overrides` settles that, and any pair, by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from vmq.errors import ModelError, OptionError
from vmq.graph import Graph, Variable

__all__ = ["WEIGHTED", "DataFlow", "StatePair", "all_operands", "data_operands", "pair_states"]

WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
"""Operators that multiply and accumulate: the ones worth quantizing."""

_IMAGE_CHANNELS = 3

# Operators that read data through some operands only; the rest are shapes, axes, indices, scales. Any
# other operator reads data through all of them. Reduce* is like the first row.
_DATA_OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Resize", "Upsample", "Reshape", "Expand", "Slice", "Tile", "Pad", "Unsqueeze", "Squeeze",
                     "Split", "TopK", "Gather", "GatherElements", "GatherND", "CenterCropPad", "CumSum", "Trilu",
                     "Compress", "Dropout", "QuantizeLinear", "DequantizeLinear"), (0,)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2)),
    **dict.fromkeys(("Shape", "Size", "ConstantOfShape", "EyeLike", "NonZero", "Range", "RandomNormalLike",
                     "RandomUniformLike"), ()),
}
_FLOATS = frozenset(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))
_UNCHANGED = ("Identity", "Cast")


@dataclass(frozen=True)
class StatePair:
    """A state: what the output called `output` gives at one frame, the input called `input` takes at the next."""

    input: str
    output: str


def data_operands(node: Any) -> list[Any]:
    """The values that a node reads as data: no constants, shapes, axes, indices or omitted operands."""
    chosen = (0,) if node.op.startswith("Reduce") else _DATA_OPERANDS.get(node.op, range(len(node.inputs)))
    values = (node.inputs[k] for k in chosen if k < len(node.inputs))
    return [v for v in values if isinstance(v, Variable) and not v.is_empty()]


def all_operands(node: Any) -> list[Any]:
    """The values that a node reads, for whatever purpose: no constants or omitted operands."""
    return [v for v in node.inputs if isinstance(v, Variable) and not v.is_empty()]


class DataFlow:
    """Who feeds whom in a graph: over data alone, or with `all_operands` over every edge.

    Sets of nodes are Python integers: bit k stands for `nodes[k]`, in topological order. That makes
    "on a path from here to there" an AND, at any size of graph.

    Attributes:
        nodes: the graph's nodes.
        index: a node's place, by id(node).
        operands: which values a node reads.
        feeds, users: per node, the places of its direct predecessors and successors, ascending.
        weighted: the set of the nodes that multiply and accumulate.
    """

    def __init__(self, graph: Graph, operands: Callable[[Any], list[Any]] = data_operands) -> None:
        self.operands = operands
        self.nodes: list[Any] = list(graph.nodes)
        self.index: dict[int, int] = {id(n): k for k, n in enumerate(self.nodes)}
        self.feeds: list[list[int]] = []
        self.users: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            self.feeds.append(sorted({self.index[id(p)] for v in operands(node) for p in v.inputs}))
            for p in self.feeds[k]:
                self.users[p].append(k)
        self.weighted = self.mask(k for k, n in enumerate(self.nodes) if n.op in WEIGHTED)

    def producers(self, value: Any) -> int:
        """The node that computes `value`; empty for an input."""
        return self.mask(self.index[id(n)] for n in value.inputs)

    def consumers(self, value: Any) -> int:
        """The nodes that read `value`."""
        return self.mask(self.index[id(n)] for n in value.outputs if any(v is value for v in self.operands(n)))

    def descendants(self, seeds: int) -> int:
        """`seeds` and every node that depends on one of them."""
        found = seeds
        for k in range((seeds & -seeds).bit_length() - 1, len(self.nodes)) if seeds else ():
            if not found >> k & 1 and any(found >> p & 1 for p in self.feeds[k]):
                found |= 1 << k
        return found

    def ancestors(self, seeds: int) -> int:
        """`seeds` and every node that one of them depends on."""
        found = seeds
        for k in range(seeds.bit_length() - 1, -1, -1):
            if found >> k & 1:
                found |= self.mask(self.feeds[k])
        return found

    def between(self, source: Any, target: Any) -> int:
        """The nodes on data paths from value `source` to value `target`."""
        return self.descendants(self.consumers(source)) & self.ancestors(self.producers(target))

    def distance(self, source: Any, target: Any) -> int:
        """The number of nodes on the shortest data path from `source` to `target`.

        Raises:
            ValueError: there is no path.
        """
        if source is target:
            return 0
        inside, goal = self.between(source, target), self.producers(target)
        reached, steps = self.consumers(source) & inside, 1
        while reached and not reached & goal:
            reached = self.mask(u for k in self.members(reached) for u in self.users[k]) & inside
            steps += 1
        if not reached:
            raise ValueError(f"no data path from {source.name!r} to {target.name!r}")
        return steps

    @staticmethod
    def mask(places: Iterable[int]) -> int:
        """The set of nodes at `places`."""
        result = 0
        for k in places:
            result |= 1 << k
        return result

    @staticmethod
    def members(mask: int) -> Iterator[int]:
        """The places of the nodes in `mask`, ascending."""
        while mask:
            low = mask & -mask
            yield low.bit_length() - 1
            mask ^= low

    def names(self, mask: int) -> tuple[str, ...]:
        """The names of the nodes in `mask`, in topological order."""
        return tuple(self.nodes[k].name for k in self.members(mask))


@dataclass(frozen=True)
class _Candidate:
    """A possible pair: places in graph.inputs and graph.outputs, what it is sorted by, who could drive it."""

    input: int
    output: int
    key: tuple[int, bool, int]
    drivers: frozenset[int]

    def excludes(self, other: _Candidate) -> bool:
        return self is not other and (self.input == other.input or self.output == other.output)


def pair_states(graph: Graph, overrides: Mapping[str, str] | None = None) -> tuple[StatePair, ...]:
    """The recurrent states of a graph, in the order of its inputs; empty if it has none.

    Works with free dimensions (they fit anything) as with bound ones, and never looks at names.

    Args:
        graph: the model.
        overrides: pairs that are fixed by hand, {input: output}; {input: ""} says that it is no state.

    Raises:
        ModelError: two candidates are equally good; the message names both.
        OptionError: `overrides` names what is not there, uses an output twice, or joins values of different
            type or shape.
    """
    fixed, closed = _fixed_pairs(graph, overrides or {})
    pairs = dict(fixed)
    candidates = [c for c in _candidates(graph) if c.input not in closed and c.output not in fixed.values()]
    accepted: list[_Candidate] = []
    while candidates:
        best = _best(graph, candidates)
        states = {*pairs, best.input}
        if all(c.drivers - states for c in (*accepted, best)):
            accepted.append(best)
            pairs[best.input] = best.output
            candidates = [c for c in candidates if c is not best and not c.excludes(best)]
        else:                                       # without it every accepted pair keeps its frame
            candidates = [c for c in candidates if c is not best]
    return tuple(StatePair(graph.inputs[i].name, graph.outputs[o].name) for i, o in sorted(pairs.items()))


def _fixed_pairs(graph: Graph, overrides: Mapping[str, str]) -> tuple[dict[int, int], set[int]]:
    """The pairs fixed by hand, as places; and the inputs that are settled by it."""
    inputs = {v.name: k for k, v in enumerate(graph.inputs)}
    outputs = {v.name: k for k, v in enumerate(graph.outputs)}
    fixed: dict[int, int] = {}
    for name, target in overrides.items():
        if name not in inputs:
            raise OptionError(f"--pair {name}={target}: the model has no input {name!r}; it has {_listed(inputs)}")
        if target and target not in outputs:
            raise OptionError(f"--pair {name}={target}: the model has no output {target!r}; it has {_listed(outputs)}")
        if target and not _fits(graph.inputs[inputs[name]], graph.outputs[outputs[target]]):
            raise OptionError(f"--pair {name}={target}: the two differ in type or shape; a state has one of each")
        if target and outputs[target] in fixed.values():
            raise OptionError(f"--pair {name}={target}: output {target!r} already belongs to another input")
        if target:
            fixed[inputs[name]] = outputs[target]
    return fixed, {inputs[name] for name in overrides}


def _candidates(graph: Graph) -> list[_Candidate]:
    """All pairs that types, reachability, drivers and the rule for images allow."""
    flow = DataFlow(graph)
    below = [flow.descendants(flow.consumers(v)) for v in graph.inputs]
    above = [flow.ancestors(flow.producers(v)) for v in graph.outputs]
    ends = [flow.producers(v) for v in graph.outputs]
    handed_out = {id(_origin(v)) for v in graph.outputs}
    found = []
    for i, source in enumerate(graph.inputs):
        if source.dtype is None or np.dtype(source.dtype) not in _FLOATS or id(source) in handed_out:
            continue
        image = source.shape is not None and len(source.shape) == 4 and source.shape[1] == _IMAGE_CHANNELS
        for o, target in enumerate(graph.outputs):
            if not below[i] & ends[o] or not _fits(source, target):
                continue
            drivers = frozenset(j for j in range(len(below)) if j != i and below[j] & ends[o]
                                and (not image or below[j] & above[o] & flow.weighted & ~below[i]))
            if drivers:
                size = (below[i] & above[o]).bit_count()
                found.append(_Candidate(i, o, (size, image, flow.distance(source, target)), drivers))
    return found


def _fits(a: Any, b: Any) -> bool:
    """Whether two values can have one type and shape; what is not known fits anything."""
    if a.dtype is not None and b.dtype is not None and np.dtype(a.dtype) != np.dtype(b.dtype):
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        m == n or not (isinstance(m, int) and isinstance(n, int)) for m, n in zip(a.shape, b.shape, strict=True))


def _origin(value: Any) -> Any:
    """Follow a value back through Identity and Cast."""
    while value.inputs and value.inputs[0].op in _UNCHANGED:
        value = value.inputs[0].inputs[0]
    return value


def _best(graph: Graph, candidates: list[_Candidate]) -> _Candidate:
    """The candidate to take next."""
    least = min(c.key for c in candidates)
    tied = [c for c in candidates if c.key == least]
    left = {c: _most_pairs([r for r in candidates if r is not c and not r.excludes(c)]) for c in tied}
    top = [c for c in tied if left[c] == max(left.values())]
    for c in top:
        if not any(c.excludes(other) for other in top):
            return c
    one, other = ((graph.inputs[c.input].name, graph.outputs[c.output].name)
                  for c in (top[0], next(c for c in top if c.excludes(top[0]))))
    raise ModelError(f"the recurrent state cannot be told from the graph: {one[0]!r} -> {one[1]!r} and "
                     f"{other[0]!r} -> {other[1]!r} fit equally well; pass --pair {one[0]}={one[1]} or "
                     f"--pair {other[0]}={other[1]} (--pair {one[0]}= says it is no state)")


def _most_pairs(candidates: list[_Candidate]) -> int:
    """How many of `candidates` can be taken together, each input and output once (augmenting paths)."""
    taken: dict[int, int] = {}

    def place(source: int, tried: set[int]) -> bool:
        for c in candidates:
            if c.input == source and c.output not in tried:
                tried.add(c.output)
                if c.output not in taken or place(taken[c.output], tried):
                    taken[c.output] = source
                    return True
        return False

    return sum(place(source, set()) for source in sorted({c.input for c in candidates}))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in names)

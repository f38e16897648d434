"""Cut a graph into functional closures: the blocks of reconstruction, none of which bisects a state update.

The recurrent closure of a state (PTQ4VM, arXiv 2506.10840, "functional closures") is

    C(i, o) = nodes on data paths from state input i to state output o
              + what feeds only these, back to the first weighted operator (the W_x convs of an LSTM's gates).

States whose closures overlap, such as h and c of an LSTM, share one. The whole graph is then put in an order in
which everything stands right before its first use (depth first from the outputs, a closure as one piece), and
is cut into intervals of that order. An interval of a topological order is convex, and intervals follow each
other topologically: so are the blocks, whatever the rules below decide. Cuts are not made

- inside a recurrent closure;
- inside a local fork and join, from what follows the last node that all paths to the join share to the join
  itself (residual, squeeze-excite, LR-ASPP, Split and Concat around a GRU), where "local" is at most
  `LOCAL` weighted operators (a closure counts as one): an encoder-decoder skip is not local;
- between a depthwise conv and the weighted operators right behind it, or the pointwise conv right before it that
  feeds it alone and closes no other depthwise conv (an inverted residual without residual);
- between a recurrent block and a block of one ordinary conv that feeds it alone;
- between two ordinary convs larger than 1x1 that follow each other at one resolution, the first feeding the second
  alone (the double conv of U-Nets, RVM's output block), two at a time.

What is not weighted goes with the weighted operator before it, up to the first node that resamples, joins or
cuts tensors, or reads nothing from there; that and the rest go with the weighted operator after it. Types and
topology decide; no name does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import pairs_of
from vmq.states import WEIGHTED, DataFlow, StatePair, all_operands

__all__ = ["LOCAL", "Block", "Closures", "FindClosures", "StateClosure", "find_closures"]

LOCAL = 6
"""A fork and join around at most this many weighted operators stay together. An inverted residual with
squeeze-excite has 5, attention with its projections 6."""

# What opens a block rather than closing one: operators that resample, join, cut or rearrange.
_OPENING = frozenset({
    "AveragePool", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool",
    "GridSample", "MaxPool", "Pad", "Reshape", "Resize", "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze", "Upsample"})


@dataclass(frozen=True)
class StateClosure:
    """A state and the names of the nodes that update it, in topological order."""

    pair: StatePair
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A block of reconstruction: the names of its nodes, in topological order."""

    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Closures:
    """How a graph falls apart.

    Attributes:
        states: one entry a state, in the order of the model's inputs; states that share a closure name the
            same nodes.
        blocks: every node of the graph in exactly one block; in topological order, and no path leaves a block
            and comes back to it.
    """

    states: tuple[StateClosure, ...]
    blocks: tuple[Block, ...]

    @property
    def recurrent(self) -> tuple[tuple[str, ...], ...]:
        """The recurrent closures, each once. (States paired by hand may have no path, and so no closure.)"""
        return tuple(dict.fromkeys(s.nodes for s in self.states if s.nodes))

    def with_new(self, graph: Graph, places: Mapping[str, str]) -> Closures:
        """The same blocks and closures with new nodes in them.

        Args:
            graph: sorted, with the new nodes.
            places: for each new node's name that of an old one; they come to stand in the same blocks and closures.
        """
        def grown(nodes: tuple[str, ...]) -> tuple[str, ...]:
            inside = set(nodes) | {new for new, old in places.items() if old in nodes}
            return tuple(n.name for n in graph.nodes if n.name in inside)

        return Closures(tuple(replace(s, nodes=grown(s.nodes)) for s in self.states),
                        tuple(replace(b, nodes=grown(b.nodes)) for b in self.blocks))

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types, as passes report it."""
        return {"states": [{"input": s.pair.input, "output": s.pair.output, "nodes": len(s.nodes)}
                           for s in self.states],
                "closures": [list(nodes) for nodes in self.recurrent],
                "blocks": [{"name": b.name, "nodes": list(b.nodes)} for b in self.blocks]}


class FindClosures(Pass):
    """Pair the states, and cut the graph into blocks that contain whole state updates."""

    name: ClassVar[str] = "find_closures"
    changes: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Leave a `Closures` in `context.found`."""
        found = find_closures(graph, pairs_of(graph, context.options.pairs))
        context.found[self.name] = found
        return PassResult(
            notes=() if found.states else ("no recurrent state found: the model is feed-forward",),
            report=found.to_json())


def find_closures(graph: Graph, pairs: Sequence[StatePair]) -> Closures:
    """The recurrent closures of `pairs`, and the blocks of the whole graph."""
    flow = DataFlow(graph)
    every = DataFlow(graph, all_operands)
    masks = _recurrent(graph, flow, every, pairs)
    whole = _acyclic(every, set(masks))
    order = _order(graph, every, whole)
    glued = _Order(flow, order)
    for mask in whole:
        glued.keep(flow.members(mask))
    _keep_forks(graph, flow, glued, whole, {p.input for p in pairs})
    _keep_depthwise(flow, glued, whole)
    pieces = _joined_blocks(flow, _intervals(graph, every, glued, whole), whole)
    return Closures(
        tuple(StateClosure(pair, flow.names(mask)) for pair, mask in zip(pairs, masks, strict=True)),
        tuple(Block(f"block{k:02d}", flow.names(piece)) for k, piece in enumerate(pieces)))


# -- recurrent closures -----------------------------------------------------------------------------------


def _recurrent(graph: Graph, flow: DataFlow, every: DataFlow, pairs: Sequence[StatePair]) -> list[int]:
    """The closure of each pair; the same one for pairs whose closures overlap."""
    sources = {v.name: v for v in graph.inputs}
    targets = {v.name: v for v in graph.outputs}
    ends = [(flow.consumers(sources[p.input]), flow.producers(targets[p.output])) for p in pairs]
    cores = [flow.descendants(first) & flow.ancestors(last) for first, last in ends]
    while True:                                     # overlapping ones become all paths between their ends
        joined = []
        for core in cores:
            group = [k for k, other in enumerate(cores) if other & core]
            first = last = 0
            for k in group:
                first, last = first | ends[k][0], last | ends[k][1]
            joined.append(core | flow.descendants(first) & flow.ancestors(last))
        if joined == cores:
            break
        cores = joined
    outputs = {id(v) for v in graph.outputs}
    fed = {core: _with_feeders(flow, every, core, outputs) for core in sorted(set(cores))}
    return [fed[core] for core in cores]


def _with_feeders(flow: DataFlow, every: DataFlow, core: int, outputs: set[int]) -> int:
    """`core` and the nodes that are read as data, and only in it, back to the first weighted operator."""
    found = core
    for k in range(core.bit_length() - 1, -1, -1):
        node, users = every.nodes[k], every.users[k]
        if found >> k & 1 or not flow.users[k] or any(id(v) in outputs for v in node.outputs):
            continue
        behind_weighted = all(every.nodes[u].op in WEIGHTED for u in users) and bool(all_operands(node))
        if not behind_weighted and all(found >> u & 1 for u in users):
            found |= 1 << k
    return found


def _acyclic(every: DataFlow, masks: set[int]) -> list[int]:
    """`masks` grown and merged until no path leaves one and comes back, directly or through others."""
    groups = sorted(m for m in masks if m)
    while True:
        for group in groups:
            grown = _reach(every.descendants, group, groups) & _reach(every.ancestors, group, groups)
            if grown != group:
                groups = sorted({grown, *(g for g in groups if not g & grown)})
                break
        else:
            return groups


def _reach(step: Any, seed: int, groups: list[int]) -> int:
    """What `step` reaches from `seed`, where reaching a part of a group is reaching all of it."""
    reached: int = step(seed)
    while True:
        touched = reached
        for group in groups:
            touched |= group if group & reached else 0
        if touched == reached:
            return reached
        reached = step(touched)


# -- order and cuts ---------------------------------------------------------------------------------------


def _order(graph: Graph, every: DataFlow, groups: list[int]) -> list[int]:
    """All nodes, each right before its first use as far as possible, and each of `groups` in one piece."""
    piece = {k: members for group in groups for members in [list(every.members(group))] for k in members}
    waits: dict[int, list[int]] = {}                # what stands before a piece, in the order of its operands

    def before(k: int) -> list[int]:
        members = piece.get(k, [k])
        if members[0] not in waits:
            inside = set(members)
            producers = (every.index[id(p)] for m in members for v in all_operands(every.nodes[m]) for p in v.inputs)
            waits[members[0]] = [p for p in dict.fromkeys(producers) if p not in inside]
        return waits[members[0]]

    order: list[int] = []
    done: set[int] = set()
    for start in [*(k for v in graph.outputs for k in every.members(every.producers(v))), *range(len(every.nodes))]:
        stack = [(start, 0)]
        while stack:
            k, step = stack.pop()
            if k in done:
                continue
            if step < len(before(k)):
                stack += [(k, step + 1), (before(k)[step], 0)]
            else:
                order += piece.get(k, [k])
                done.update(piece.get(k, [k]))
    return order


class _Order:
    """The order of the nodes, and where it may not be cut."""

    def __init__(self, flow: DataFlow, order: list[int]) -> None:
        self.order = order
        self.place = {k: p for p, k in enumerate(order)}
        self.joined = [False] * len(order)          # place p and p - 1 stay together
        self._weighted = [0]
        for k in order:
            self._weighted.append(self._weighted[-1] + (flow.nodes[k].op in WEIGHTED))

    def keep(self, nodes: Iterable[int], limit: int | None = None) -> None:
        """Forbid cuts between the first and the last of `nodes`, if it is not over `limit` weighted operators."""
        places = [self.place[k] for k in nodes]
        first, last = min(places), max(places)
        if limit is None or self._weighted[last + 1] - self._weighted[first] <= limit:
            self.joined[first + 1:last + 1] = [True] * (last - first)

    def runs(self) -> list[list[int]]:
        """The nodes in order, in lists of what stays together."""
        runs: list[list[int]] = []
        for place, k in enumerate(self.order):
            if self.joined[place]:
                runs[-1].append(k)
            else:
                runs.append([k])
        return runs


def _keep_forks(graph: Graph, flow: DataFlow, order: _Order, groups: list[int], states: set[str]) -> None:
    """Keep local forks and joins whole."""
    closure = {k: g for g in groups for k in flow.members(g)}
    for join, fork in enumerate(_dominators(graph, flow, states)):
        if fork is None or fork < 0 or flow.feeds[join] == [fork]:
            continue
        inside, stack = {join}, [join]
        units = set[int]()
        while stack and len(units) <= LOCAL:
            k = stack.pop()
            if k in closure:
                units.add(closure[k])
            elif flow.nodes[k].op in WEIGHTED:
                units.add(-k - 1)
            new = [p for p in flow.feeds[k] if p != fork and p not in inside]
            inside.update(new)
            stack += new
        if len(units) <= LOCAL:
            spare = sum((g & flow.weighted).bit_count() for g in units if g > 0)
            order.keep(inside, limit=LOCAL + spare)


def _dominators(graph: Graph, flow: DataFlow, states: set[str]) -> list[int | None]:
    """For each node the last node that all data paths to it share; -1 if there is none but the model's inputs.

    Paths that begin at a state or at constants do not count; None for a node that has no others.
    """
    frames = {id(v) for v in graph.inputs if v.name not in states}
    above: list[int | None] = []
    depth: list[int] = []
    for k, node in enumerate(flow.nodes):
        paths = [p for p in flow.feeds[k] if above[p] is not None]
        common: int | None
        if any(id(v) in frames for v in flow.operands(node)):
            common = -1
        elif not paths:
            common = None
        else:
            common = paths[0]
            for other in paths[1:]:
                while common != other:
                    if common == -1 or other == -1:
                        common = other = -1
                    elif depth[common] >= depth[other]:
                        common = _known(above[common])
                    else:
                        other = _known(above[other])
        above.append(common)
        depth.append(depth[common] + 1 if common is not None and common >= 0 else 1)
    return above


def _known(node: int | None) -> int:
    assert node is not None
    return node


def _keep_depthwise(flow: DataFlow, order: _Order, groups: list[int]) -> None:
    """Keep depthwise convs with the weighted operators right behind, and the expansion right before them."""
    recurrent = set(flow.members(_union(groups)))
    closing: set[int] = set()
    for k, node in enumerate(flow.nodes):
        if not _is_depthwise(node) or k in recurrent:
            continue
        near = [p for p in _nearest_weighted(flow, k, flow.users) if p not in recurrent]
        closing.update(near)
        for behind in near:
            order.keep((k, behind), limit=LOCAL)
        for ahead in _nearest_weighted(flow, k, flow.feeds):
            if (_is_pointwise(flow.nodes[ahead]) and ahead not in closing and ahead not in recurrent
                    and _nearest_weighted(flow, ahead, flow.users) == [k]):
                order.keep((ahead, k), limit=LOCAL)


def _nearest_weighted(flow: DataFlow, start: int, edges: list[list[int]]) -> list[int]:
    """The weighted operators that can be reached from `start` along `edges` over others that are not weighted."""
    seen, found, stack = {start}, set(), [start]
    while stack:
        for k in edges[stack.pop()]:
            if flow.nodes[k].op in WEIGHTED:
                found.add(k)
            elif k not in seen:
                seen.add(k)
                stack.append(k)
    return sorted(found)


def _is_depthwise(node: Any) -> bool:
    weight = node.inputs[1].shape if node.op == "Conv" else None
    return weight is not None and node.attrs.get("group", 1) > 1 and weight[1] == 1


def _is_pointwise(node: Any) -> bool:
    weight = node.inputs[1].shape if node.op == "Conv" else None
    return weight is not None and node.attrs.get("group", 1) == 1 and all(n == 1 for n in weight[2:])


def _intervals(graph: Graph, every: DataFlow, order: _Order, groups: list[int]) -> list[int]:
    """The blocks: one for each run with a weighted operator or a closure, the other runs shared out."""
    heavy = every.weighted | _union(groups)
    moving = every.descendants(_union(every.consumers(v) for v in graph.inputs))
    blocks: list[int] = []
    waiting = 0                                     # runs that go with what comes next
    fixed = 0                                       # constants in the making, which do so too, but cut nothing
    for run in order.runs():
        if not every.mask(run) & moving:
            fixed |= every.mask(run)
            continue
        first = next(k for k in run if moving >> k & 1)
        mask, fixed = every.mask(run) | fixed, 0
        if mask & heavy:
            blocks.append(waiting | mask)
            waiting = 0
        elif not waiting and blocks and every.nodes[first].op not in _OPENING and any(
                blocks[-1] >> p & 1 for p in every.feeds[first]):
            blocks[-1] |= mask
        else:
            waiting |= mask
    if blocks:
        blocks[-1] |= waiting | fixed
    elif waiting | fixed:
        blocks.append(waiting | fixed)
    return blocks


def _joined_blocks(flow: DataFlow, blocks: list[int], groups: list[int]) -> list[int]:
    """Join each recurrent block with the block of one ordinary conv before it that feeds it alone; then pairs."""
    recurrent = _union(groups)

    def plain(block: int) -> Any:
        """The block's only weighted operator, if that is an ordinary one."""
        weighted = [flow.nodes[k] for k in flow.members(block & flow.weighted)]
        alone = len(weighted) == 1 and not block & recurrent and not _is_depthwise(weighted[0])
        return weighted[0] if alone else None

    def into_recurrent(first: int, second: int) -> bool:
        return bool(second & recurrent) and plain(first) is not None

    def double_conv(first: int, second: int) -> bool:
        convs = plain(first), plain(second)
        return (all(c is not None and c.op == "Conv" and not _is_pointwise(c) for c in convs)
                and all(n == 1 for n in convs[1].attrs.get("strides", ()))
                and not any(flow.nodes[k].op in _OPENING for k in flow.members(second)))

    for fits in (into_recurrent, double_conv):
        result: list[int] = []
        for block in blocks:
            if result and fits(result[-1], block) and _feeds_alone(flow, result[-1], block):
                result[-1] |= block
            else:
                result.append(block)
        blocks = result
    return blocks


def _feeds_alone(flow: DataFlow, first: int, second: int) -> bool:
    """Whether what the weighted operators of `first` lead to is read in `second`, and nowhere else."""
    after = flow.descendants(first & flow.weighted) & first
    readers = flow.mask(u for k in flow.members(after) for u in flow.users[k])
    return bool(readers & second) and not readers & ~(first | second)


def _union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result

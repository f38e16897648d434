"""Give every quantizer its scale and zero point.

The float reference runs over all calibration clips frame after frame with its own recurrent state, so that warm
states are seen as often as they occur. Of every tensor the extremes and a bounded number of samples are kept,
whatever the number of frames; the range is the one with the smallest mean of |error|^p (vmq/quant.py). Where an
elementwise function alone reads a tensor (hardswish, sigmoid, ...), the error is that of the function's result.
Weights get one scale per output channel by the same search, and one with which products are exact
(passes/limit_weights.py).

Scales are short numbers. Those of tensors that are added to each other, and of their sums, are odd multiples of a
power of 2, u: no sum lies in the middle between two steps, where kernels round to even on x86 and otherwise on Arm.

    p u a + q u b = (n + 1/2) r u    would be    2 (p a + q b) = (2 n + 1) r,    an even number and an odd one
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet

from passes.limit_weights import LARGEST, pair_reach
from vmq import processes
from vmq.errors import PassError
from vmq.graph import Constant, Graph
from vmq.layers import dead_below, float_source, summed_pairs
from vmq.pipeline import Context, Pass, PassResult
from vmq.quant import FUNCTIONS, search_range, search_weight_scale
from vmq.runtime import Session
from vmq.spec import QuantSpec

MANTISSA = 12
"""Significant bits of a scale."""
COARSEST = 100
"""A scale that is fewer units than this stays as it is."""
LEAST = 64
"""Samples of a tensor that are kept of a frame, at least, ..."""
FRAMES = 2048
"""... on so many frames; of longer footage every second frame's are kept, or every third's, and so on."""


class CalibrateRanges(Pass):
    """Find scales and zero points: the reference runs recurrently over the clips, each range is searched."""

    name: ClassVar[str] = "calibrate_ranges"

    def requires(self, graph: Graph, context: Context) -> None:
        if not context.clips or not any(len(c) for c in context.clips):
            raise PassError("there are no calibration frames; give --calib, or leave it out for the built-in clips")
        if context.reference is None:
            raise PassError("there is no float reference; run insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        assert context.reference is not None
        recipe = context.options.recipe
        groups: dict[int, list[Any]] = {}
        for node in graph.nodes:
            if node.op == "QuantizeLinear":
                groups.setdefault(id(node.inputs[1]), []).append(node)
        sources = {id(n): float_source(n.inputs[0]) for nodes in groups.values() for n in nodes}
        renamed: dict[str, str] = context.found["insert_qdq"]
        called = {k: renamed.get(s.name, s.name) for k, s in sources.items() if not isinstance(s, Constant)}
        names = list(dict.fromkeys(called.values()))
        ranges: Ranges = context.found.get(self.name) or Ranges()
        missing = [n for n in names if n not in ranges.observed]
        if missing:
            ranges.observed |= _observe(context.reference, missing, context, recipe.samples)

        pairs = context.options.target.adds_pairs
        def key(nodes: list[Any]) -> tuple[Any, ...]:
            reader, spec = _reader(nodes[0]), QuantSpec.of(nodes[0].inputs[2].dtype, nodes[0].attrs.get("axis"))
            return (spec, *(called.get(id(n), sources[id(n)].name) for n in nodes),
                    *((reader.op, str(reader.attrs)) if reader else ()))

        def search(nodes: list[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
            node = nodes[0]
            source, spec, reader = sources[id(node)], key(nodes)[0], _reader(node)
            if spec.signed:
                weight, eight = np.asarray(source.values), spec.bits == 8
                scale = search_weight_scale(weight, spec, norm=recipe.range_norm, steps=recipe.range_steps,
                                            limits=(-LARGEST, LARGEST) if eight else None)
                for layer in (r for d in node.outputs[0].outputs for r in d.outputs[0].outputs if eight and pairs):
                    if (added := summed_pairs(layer)) is not None:
                        scale = np.maximum(scale, pair_reach(weight, added) / LARGEST)
                return short(scale), np.zeros(scale.shape, spec.dtype)
            seen = [_Seen.of_constant(s) if isinstance(s, Constant) else ranges.observed[called[k]] for k, s in {
                id(n): sources[id(n)] for n in nodes}.items()]
            through = partial(FUNCTIONS[reader.op], **reader.attrs) if reader else None
            scale, zero = search_range(np.concatenate([s.samples for s in seen]), min(s.low for s in seen),
                                       max(s.high for s in seen), spec, norm=recipe.range_norm,
                                       steps=recipe.range_steps, through=through)
            return short(scale), np.asarray(zero).astype(spec.dtype)

        fresh = {k: nodes for nodes in groups.values() if (k := key(nodes)) not in ranges.searched}
        own, found = processes.mine(list(fresh.values())), list[tuple[NDArray[Any], NDArray[Any]]]()
        for nodes in own:
            found.append(search(nodes))
            context.progress("searching ranges", len(found) / len(own))
        ranges.searched |= zip(fresh, processes.together(found), strict=True)
        for nodes in groups.values():
            nodes[0].inputs[1].values, nodes[0].inputs[2].values = ranges.searched[key(nodes)]
        avoid_halves(graph)
        frames = sum(len(c) for c in context.clips)
        return PassResult(modified=len(groups), report={
            "frames": frames, "clips": [c.name for c in context.clips], "quantizers": len(groups)})


class Ranges:
    """What was seen of tensors, and the ranges found for them: graphs that quantize one network can share it.

    Attributes:
        observed: what was seen of each tensor, by its name in the float graph.
        searched: scale and zero point, by grid, names of the tensors and the function that reads them.
    """

    def __init__(self) -> None:
        self.observed: dict[str, _Seen] = {}
        self.searched: dict[tuple[Any, ...], tuple[NDArray[Any], NDArray[Any]]] = {}


class _Seen:
    """Extremes and a bounded number of samples of one tensor."""

    def __init__(self, per_frame: int) -> None:
        self.low, self.high, self._per_frame, self._kept = np.inf, -np.inf, per_frame, list[NDArray[np.float32]]()

    def add(self, values: NDArray[Any], *seed: int, keep: bool = True) -> None:
        """Keep some values of a frame: where they stand depends on the seed and the tensor's size alone."""
        flat = values.ravel()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if not keep:
            return
        if flat.size > self._per_frame:
            flat = flat[np.random.default_rng((*seed, flat.size)).integers(0, flat.size, self._per_frame)]
        self._kept.append(flat.astype(np.float32))

    @property
    def samples(self) -> NDArray[np.float32]:
        return np.concatenate(self._kept)

    @classmethod
    def of_all(cls, parts: Sequence[_Seen]) -> _Seen:
        """What was seen in one clip after the other."""
        seen = cls(0)
        seen.low, seen.high = min(p.low for p in parts), max(p.high for p in parts)
        seen._kept = [values for p in parts for values in p._kept]
        return seen

    @classmethod
    def of_constant(cls, constant: Any) -> _Seen:
        seen = cls(1 << 62)
        seen.add(np.asarray(constant.values, np.float32))
        return seen


def _observe(reference: Graph, names: list[str], context: Context, samples: int) -> dict[str, _Seen]:
    """Run the reference over all clips and watch the tensors called `names`."""
    total = sum(len(c) for c in context.clips)
    per_frame = max(LEAST, samples // total)
    every = -(-per_frame * total // max(samples, LEAST * FRAMES))
    session = Session(reference, pairs=context.options.pairs, extra=names, device=context.options.device)
    inputs = {v.name for v in reference.inputs}
    floors = {v.name: floor for v in reference.values()
              if v.name in set(names) and (floor := dead_below(v)) is not None}
    starts = np.cumsum([0, *(len(c) for c in context.clips)])

    def watch(number: int) -> dict[str, _Seen]:
        seen = {name: _Seen(per_frame) for name in names}
        session.reset(session.told(context.clips[number]))
        for place, frame in enumerate(context.clips[number].frames(), int(starts[number])):
            fed = session.feeds(frame)
            outputs = session.step(frame)
            for name in names:
                values = fed[name] if name in inputs else outputs[name]
                if not np.isfinite(values).all():
                    raise PassError(f"{name} becomes NaN or infinite in frame {place} of the calibration, in float "
                                    "already; check the model and the clip")
                if name in floors:
                    values = np.maximum(values, floors[name])
                seen[name].add(values, context.options.seed, place, keep=place % every == 0)
            context.progress("running the calibration clips", (place + 1) / total)
        return seen

    clips = processes.together([watch(k) for k in processes.mine(range(len(context.clips)))])
    return {name: _Seen.of_all([seen[name] for seen in clips if seen[name].low < np.inf]) for name in names}


def short(scale: NDArray[Any]) -> NDArray[np.float32]:
    """A scale in `MANTISSA` bits: differences and quarters of its multiples are exact in float32."""
    part, exponent = np.frexp(np.asarray(scale, np.float32))
    return np.ldexp(np.rint(np.ldexp(part, MANTISSA)), exponent - MANTISSA).astype(np.float32)


def avoid_halves(graph: Graph) -> None:
    """Let scales of what is added to each other be odd multiples of a power of 2, of `MANTISSA` bits at most."""
    scales: dict[str, Any] = {}
    joined = DisjointSet()
    for node in [n for n in graph.nodes if n.op in ("Add", "Sub")]:
        y = node.outputs[0]
        y = y.outputs[0].outputs[0] if [r.op for r in y.outputs] == ["Relu"] else y
        around = [*(v.inputs[0] for v in node.inputs if v.inputs), *(r for r in y.outputs if r.op == "QuantizeLinear")]
        if len(around) == 3 and all(n.op in ("QuantizeLinear", "DequantizeLinear") and n.inputs[1].values.size == 1
                                    and float_source(n.inputs[0]).inputs for n in around):
            for scale in (n.inputs[1] for n in around):
                scales[scale.name] = scale
                joined.add(scale.name)
                joined.merge(scale.name, around[0].inputs[1].name)
    for names in joined.subsets():
        together = [scales[n] for n in names]
        unit = np.ldexp(1.0, int(np.frexp(max(float(s.values) for s in together))[1]) - MANTISSA)
        for scale in together:
            odd = 2 * np.floor(np.asarray(scale.values, np.float64) / unit / 2) + 1
            if odd > COARSEST:
                scale.values = (odd * unit).astype(np.float32)


def _reader(node: Any) -> Any:
    """A node of the elementwise function that alone reads what a quantizer hands on, if there is one."""
    readers = [r for dequantize in node.outputs[0].outputs for r in dequantize.outputs[0].outputs]
    if not readers or any((r.op, r.attrs) != (readers[0].op, readers[0].attrs) for r in readers):
        return None
    return readers[0] if readers[0].op in FUNCTIONS else None

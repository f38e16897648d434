"""Give every quantizer its scale and zero point.

The float reference runs over all calibration clips frame after frame with its own recurrent state, so that warm
states are seen as often as they occur. Of every tensor the extremes and a fixed number of samples are kept,
whatever the number of frames; the range is the one with the smallest mean of |error|^p (vmq/quant.py). Where an
elementwise function alone reads a tensor (hardswish, sigmoid, ...), the error is that of the function's result.
Weights get one scale per output channel by the same search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq.errors import PassError
from vmq.graph import Constant, Graph
from vmq.layers import float_source
from vmq.pipeline import Context, Pass, PassResult
from vmq.quant import FUNCTIONS, search_range, search_weight_scale
from vmq.runtime import Session
from vmq.spec import QuantSpec

MANTISSA = 12
"""Significant bits of a scale."""


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
        observed = _observe(context.reference, names, context, recipe.samples)

        limits = context.options.target.weight_range
        for index, nodes in enumerate(groups.values()):
            node = nodes[0]
            source, spec = sources[id(node)], QuantSpec.of(node.inputs[2].dtype, node.attrs.get("axis"))
            if spec.signed:
                scale = search_weight_scale(np.asarray(source.values), spec, norm=recipe.range_norm,
                                            steps=recipe.range_steps, limits=limits if spec.bits == 8 else None)
                zero = np.zeros(scale.shape, np.int32)
            else:
                seen = [_Seen.of_constant(s) if isinstance(s, Constant) else observed[called[k]] for k, s in {
                    id(n): sources[id(n)] for n in nodes}.items()]
                scale, zero = search_range(np.concatenate([s.samples for s in seen]), min(s.low for s in seen),
                                           max(s.high for s in seen), spec, norm=recipe.range_norm,
                                           steps=recipe.range_steps, through=_reader(node))
            node.inputs[1].values = _short(scale)
            node.inputs[2].values = np.asarray(zero).astype(spec.dtype)
            context.progress("searching ranges", (index + 1) / len(groups))
        frames = sum(len(c) for c in context.clips)
        return PassResult(modified=len(groups), report={
            "frames": frames, "clips": [c.name for c in context.clips], "quantizers": len(groups)})


class _Seen:
    """Extremes and a bounded number of samples of one tensor."""

    def __init__(self, per_frame: int) -> None:
        self.low, self.high, self._per_frame, self._kept = np.inf, -np.inf, per_frame, list[NDArray[np.float32]]()

    def add(self, values: NDArray[Any], *seed: int) -> None:
        """Keep some values of a frame: where they stand depends on the seed and the tensor's size alone."""
        flat = values.ravel()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if flat.size > self._per_frame:
            flat = flat[np.random.default_rng((*seed, flat.size)).integers(0, flat.size, self._per_frame)]
        self._kept.append(flat.astype(np.float32))

    @property
    def samples(self) -> NDArray[np.float32]:
        return np.concatenate(self._kept)

    @classmethod
    def of_constant(cls, constant: Any) -> _Seen:
        seen = cls(1 << 62)
        seen.add(np.asarray(constant.values, np.float32))
        return seen


def _observe(reference: Graph, names: list[str], context: Context, samples: int) -> dict[str, _Seen]:
    """Run the reference over all clips and watch the tensors called `names`."""
    total = sum(len(c) for c in context.clips)
    session = Session(reference, pairs=context.options.pairs, extra=names, device=context.options.device)
    inputs = {v.name for v in reference.inputs}
    seen = {name: _Seen(max(64, samples // total)) for name in names}
    done = 0
    for clip in context.clips:
        session.reset()
        for frame in clip.frames():
            fed = session.feeds(frame)
            outputs = session.step(frame)
            for name in names:
                values = fed[name] if name in inputs else outputs[name]
                if not np.isfinite(values).all():
                    raise PassError(f"{name} becomes NaN or infinite in frame {done} of the calibration, in float "
                                    "already; check the model and the clip")
                seen[name].add(values, context.options.seed, done)
            done += 1
            context.progress("running the calibration clips", done / total)
    return seen


def _short(scale: NDArray[Any]) -> NDArray[np.float32]:
    """A scale in `MANTISSA` bits: differences and quarters of its multiples are exact in float32.

    So are halves between two steps, and every runtime rounds them to the same side.
    """
    part, exponent = np.frexp(np.asarray(scale, np.float32))
    return np.ldexp(np.rint(np.ldexp(part, MANTISSA)), exponent - MANTISSA).astype(np.float32)


def _reader(node: Any) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
    """The elementwise function that alone reads what a quantizer hands on, if there is one."""
    readers = [r for dequantize in node.outputs[0].outputs for r in dequantize.outputs[0].outputs]
    if not readers or any((r.op, r.attrs) != (readers[0].op, readers[0].attrs) for r in readers):
        return None
    function = FUNCTIONS.get(readers[0].op)
    return None if function is None else partial(function, **readers[0].attrs)

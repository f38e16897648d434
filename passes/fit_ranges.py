"""Choose the ranges of what layers read by what these make of the rounding.

The range with the least error of the values themselves (passes/calibrate_ranges.py) is not the one with the least
error behind the next layer: a channel that reaches far may hardly be read, and takes most of 16 levels, or of 256.
With x what the float network has there, and y its layers:

    (s, z) = arg min  sum over the layers of  |y(Q(x)) - y(x)|^2 / |y(x)|^2

summed over channels, frames and positions, both less their means where a layer's bias makes up for it
(passes/correct_biases.py). What else reads x, such as an Add, counts with |Q(x) - x|^2 / |x|^2; what hands x on to a
quantizer of the same scale does not count. Scales are tried first, then zero points, then scales next to the best.
Each grid is searched by itself, on crops that the float network sees in warm states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.calibrate_ranges import avoid_halves, short
from vmq import processes
from vmq.crops import Crops, crop_graph, warm_sequence
from vmq.errors import PassError
from vmq.fakequant import FakeQuantize, fake_quantize
from vmq.graph import Constant, Graph
from vmq.lanes import LANES, Lanes
from vmq.layers import float_source, never_negative
from vmq.learning import assign
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session
from vmq.shadow import Shadow
from vmq.states import WEIGHTED

SEQUENCES, FRAMES = 12, 2
"""Sequences that are looked at, and frames of each."""
BIASED = ("Conv", "Gemm")
"""Layers whose means are mended afterwards."""
FACTORS = tuple(2.0 ** (k / 8) for k in range(-16, 8))
"""What a scale is multiplied by: a quarter to nearly twice."""
SHIFTS = (-3, -2, -1, 0, 1, 2, 3)
"""By how many sixteenths of the grid a zero point is moved; that of what is never negative stays at the lower end."""
FINER = tuple(2.0 ** (k / 24) for k in (-4, -2, -1, 0, 1, 2, 4))
"""What the scale is multiplied by at last."""


class FitRanges(Pass):
    """Choose the ranges of what layers read by what these make of the rounding."""

    name: ClassVar[str] = "fit_ranges"

    def requires(self, graph: Graph, context: Context) -> None:
        if context.reference is None:
            raise PassError("there is no float reference; run insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        assert context.reference is not None
        if not context.options.recipe.fit_ranges:
            return PassResult()
        device, seed = context.options.device, context.options.seed
        session = Session(context.reference, optimize=False, pairs=context.options.pairs)
        exact = Shadow(crop_graph(context.reference, session.frame_input), device)
        shadow = Shadow(crop_graph(graph, session.frame_input), device)
        crops = Crops.for_graph(exact.graph, session.frame_input, context.footage or context.clips, seed)
        with Lanes(device) as lanes:
            sequences = lanes.map(lambda k: warm_sequence(k, crops, FRAMES, exact, session), range(SEQUENCES))
            frames = [{name: values[t] for name, values in sequence.items()}
                      for sequence in sequences for t in range(len(sequence[session.frame_input]))]
            grids = _grids(shadow, exact, context.found["insert_qdq"])
            _fit(grids, exact, frames, lanes, context)
        shadow.write_back()
        names = {name for grid in grids for name in grid.names}
        for constant in shadow.graph.constants():
            if constant.name in names and constant.dtype == np.float32:
                constant.values = short(constant.values)
        changed = assign(graph, shadow.graph, names)
        avoid_halves(graph)
        return PassResult(modified=changed, report={"grids": len(grids), "frames": len(frames)})


@dataclass(frozen=True)
class _Grid:
    """A grid of an activation.

    Attributes:
        quantizer: one of those that round to it; they share scale and zero point.
        names: the constants that these are.
        fixed: the zero point stays.
        readers: the float value that is rounded, and the float layer that reads it; None: something else.
    """

    quantizer: FakeQuantize
    names: tuple[str, str]
    fixed: bool
    readers: list[tuple[str, Any]]

    def choices(self, factors: Sequence[float], shifts: Sequence[int]) -> list[tuple[float, float]]:
        """Scales and zero points around those that it has."""
        scale, zero, spec = float(self.quantizer.scale), float(self.quantizer.grid_zero()), self.quantizer.spec
        unit = (spec.qmax + 1) // 16
        return [(scale * f, zero + d * unit) for f in factors for d in ((0,) if self.fixed else shifts)
                if spec.qmin <= zero + d * unit <= spec.qmax]


def _grids(shadow: Shadow, exact: Shadow, renamed: Mapping[str, str]) -> list[_Grid]:
    """The grids of 4 and 8 bits that layers with constant weights read."""
    def name_of(value: Any) -> str:
        source = float_source(value)
        return renamed.get(source.name, source.name)

    twins = {v.name: node for node in exact.graph.nodes for v in node.outputs}
    tied: dict[str, list[tuple[Any, FakeQuantize]]] = {}
    for node in shadow.graph.nodes:
        quantizer = shadow.quantizers.get(node.outputs[0].name)
        if isinstance(quantizer, FakeQuantize) and not quantizer.spec.signed and quantizer.spec.bits <= 8 \
                and not isinstance(float_source(node.outputs[0]), Constant):
            tied.setdefault(node.inputs[1].name, []).append((node, quantizer))
    grids = []
    for scale, members in tied.items():
        readers, others = list[tuple[str, Any]](), dict[str, None]()
        for value in (node.outputs[0] for node, _ in members):
            for reader in value.outputs:
                twin = twins.get(name_of(reader.outputs[0]))
                if reader.op in WEIGHTED and reader.inputs[0] is value and twin is not None and twin.op == reader.op \
                        and isinstance(twin.inputs[1], Constant):
                    readers.append((twin.inputs[0].name, twin))
                elif not all(r.op == "QuantizeLinear" and r.inputs[1].name == scale
                             for v in reader.outputs for r in v.outputs):
                    others[name_of(value)] = None
        if readers:
            node, quantizer = members[0]
            grids.append(_Grid(quantizer, (node.inputs[1].name, node.inputs[2].name),
                               any(never_negative(n.outputs[0]) for n, _ in members),
                               [*readers, *((name, None) for name in others)]))
    return grids


@torch.no_grad()
def _fit(grids: Sequence[_Grid], exact: Shadow, frames: Sequence[Mapping[str, Tensor]], lanes: Lanes,
         context: Context) -> None:
    """Give all grids their best scales and zero points."""
    stages = ((FACTORS, (0,)), ((1.0,), SHIFTS), (FINER, (0,)))
    for number, (factors, shifts) in enumerate(stages if grids else ()):
        tried = [grid.choices(factors, shifts) for grid in grids]
        for grid, choices, lost in zip(grids, tried, _errors(exact, grids, tried, frames, lanes), strict=True):
            scale, zero = choices[int(np.argmin(lost))]
            grid.quantizer.scale.fill_(scale)
            grid.quantizer.zero.fill_(zero)
        context.progress("fitting ranges to layers", (number + 1) / len(stages))


def _errors(exact: Shadow, grids: Sequence[_Grid], tried: Sequence[Sequence[tuple[float, float]]],
            frames: Sequence[Mapping[str, Tensor]], lanes: Lanes) -> list[NDArray[np.float64]]:
    """What each choice for each grid loses, summed over its readers."""
    inputs = {v.name for v in exact.graph.inputs}
    wanted = tuple(dict.fromkeys(name for g in grids for name, _ in g.readers if name not in inputs))

    def measure(frame: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
        """Sums of what each reader sees and of its error with each choice, [1 + choices, 3, channels]."""
        values = {**frame, **exact.run(frame, wanted)}
        found = []
        for grid, choices in zip(grids, tried, strict=True):
            spec, limits = grid.quantizer.spec, grid.quantizer.limits
            for name, layer in grid.readers:
                x, result = values[name], name if layer is None else layer.outputs[0].name
                y = exact.run({name: x}, (result,))[result]
                rows = [_sums(y, layer)]
                for scale, zero in choices:
                    rounded = fake_quantize(x, x.new_tensor(scale), x.new_tensor(zero), spec, limits)
                    rows.append(_sums(exact.run({name: rounded}, (result,))[result] - y, layer))
                found.append(np.stack(rows))
        return found

    totals: list[NDArray[np.float64]] = []
    at_once = LANES * processes.count()
    for start in range(0, len(frames), at_once):
        for part in lanes.map(measure, frames[start:start + at_once]):
            totals = [a + b for a, b in zip(totals, part, strict=True)] if totals else part
    errors, left = [], iter(totals)
    for grid, choices in zip(grids, tried, strict=True):
        lost = np.zeros(len(choices))
        for _, layer in grid.readers:
            whole, *rest = _power(next(left), biased=layer is not None and layer.op in BIASED)
            lost += np.array(rest) / whole if whole > 0.0 else 0.0
        errors.append(lost)
    return errors


def _sums(y: Tensor, layer: Any) -> NDArray[np.float64]:
    """Positions, sums and sums of squares, [3, channels]."""
    rows = y.movedim(1 if layer is not None and layer.op == "Conv" else -1, 0).flatten(1).double()
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)]).cpu().numpy()


def _power(sums: NDArray[np.float64], *, biased: bool) -> NDArray[np.float64]:
    """Mean squares summed over channels, less those of the means where biases can change these: [rows]."""
    count, first, second = sums[:, 0], sums[:, 1], sums[:, 2]
    found: NDArray[np.float64] = (second / count - (first / count) ** 2 * biased).clip(0.0).sum(1)
    return found

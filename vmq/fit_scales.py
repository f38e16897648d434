"""Scales and zero points of 4-bit activations, chosen by what the layers that read them make of the rounding.

The range with the least error of the values themselves (passes/calibrate_ranges.py) is not the one with the least
error behind the next layer: a channel that reaches far may hardly be read, and then most of 16 levels are spent on it.
With x what the float network has there, and y its layers:

    (s, z) = arg min  sum over the layers of  |y(Q(x)) - y(x)|^2 / |y(x)|^2

summed over channels, frames and positions, both less their means where a layer has a bias that can make up for it.
Scales are tried first, then zero points, then scales next to the best. Each grid is searched by itself, on the float
network's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmq import processes
from vmq.fakequant import FakeQuantize, fake_quantize
from vmq.gptq import bias_of
from vmq.graph import Constant
from vmq.lanes import LANES, Lanes
from vmq.layers import never_negative
from vmq.shadow import Shadow
from vmq.states import WEIGHTED

FACTORS = tuple(2.0 ** (k / 8) for k in range(-16, 8))
"""What a scale is multiplied by: a quarter to nearly twice."""
SHIFTS = (-3, -2, -1, 0, 1, 2, 3)
"""What a zero point is moved by; that of values that are never negative stays the lower end of the grid."""
FINER = tuple(2.0 ** (k / 24) for k in (-4, -2, -1, 0, 1, 2, 4))
"""What the scale is multiplied by at last."""


@dataclass(frozen=True)
class _Grid:
    """A 4-bit grid.

    Attributes:
        quantizer: one of those that round to it; they share scale and zero point.
        names: the constants that these are.
        fixed: the zero point stays.
        readers: the float value that is rounded, and the float layer that reads it.
    """

    quantizer: FakeQuantize
    names: tuple[str, str]
    fixed: bool
    readers: list[tuple[str, Any]]

    def choices(self, factors: Sequence[float], shifts: Sequence[int]) -> list[tuple[float, float]]:
        """Scales and zero points around those that it has."""
        scale, zero, spec = float(self.quantizer.scale), float(self.quantizer.grid_zero()), self.quantizer.spec
        return [(scale * f, zero + d) for f in factors for d in ((0,) if self.fixed else shifts)
                if spec.qmin <= zero + d <= spec.qmax]


@torch.no_grad()
def fit_scales(shadow: Shadow, exact: Shadow, sources: Mapping[str, str], frames: Sequence[Mapping[str, Tensor]],
               lanes: Lanes) -> set[str]:
    """Choose the grids of all 4-bit activations that layers with constant weights read.

    Args:
        shadow: the quantized network; its parameters change.
        exact: the float one.
        sources: what each value of the quantized graph is called in the float one.
        frames: inputs of the float network, by name.
        lanes: to compute in.

    Returns:
        The constants, scales and zero points, that were chosen.
    """
    grids = _grids(shadow, exact, sources)
    for factors, shifts in ((FACTORS, (0,)), ((1.0,), SHIFTS), (FINER, (0,))) if grids else ():
        tried = [grid.choices(factors, shifts) for grid in grids]
        for grid, choices, lost in zip(grids, tried, _errors(exact, grids, tried, frames, lanes), strict=True):
            scale, zero = choices[int(np.argmin(lost))]
            grid.quantizer.scale.fill_(scale)
            grid.quantizer.zero.fill_(zero)
    return {name for grid in grids for name in grid.names}


def _grids(shadow: Shadow, exact: Shadow, sources: Mapping[str, str]) -> list[_Grid]:
    twins = {v.name: node for node in exact.graph.nodes for v in node.outputs}
    tied: dict[str, list[tuple[Any, FakeQuantize]]] = {}
    for node in shadow.graph.nodes:
        quantizer = shadow.quantizers.get(node.outputs[0].name)
        if isinstance(quantizer, FakeQuantize) and quantizer.spec.bits == 4 and not quantizer.spec.signed:
            tied.setdefault(node.inputs[1].name, []).append((node, quantizer))
    grids = []
    for members in tied.values():
        readers = []
        for node, _ in members:
            for layer in node.outputs[0].outputs:
                twin = twins.get(sources[layer.outputs[0].name])
                if layer.op in WEIGHTED and layer.inputs[0] is node.outputs[0] and twin is not None \
                        and twin.op == layer.op and isinstance(twin.inputs[1], Constant):
                    readers.append((twin.inputs[0].name, twin))
        if readers:
            node, quantizer = members[0]
            grids.append(_Grid(quantizer, (node.inputs[1].name, node.inputs[2].name),
                               any(never_negative(n.outputs[0]) for n, _ in members), readers))
    return grids


def _errors(exact: Shadow, grids: Sequence[_Grid], tried: Sequence[Sequence[tuple[float, float]]],
            frames: Sequence[Mapping[str, Tensor]], lanes: Lanes) -> list[NDArray[np.float64]]:
    """What each choice for each grid loses, summed over its layers."""
    inputs = {v.name for v in exact.graph.inputs}
    wanted = tuple(dict.fromkeys(name for g in grids for name, _ in g.readers if name not in inputs))

    def measure(frame: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
        """Sums of each layer's result and of its error with each choice, [1 + choices, 3, channels]."""
        values = {**frame, **exact.run(frame, wanted)}
        found = []
        for grid, choices in zip(grids, tried, strict=True):
            spec, limits = grid.quantizer.spec, grid.quantizer.limits
            for name, layer in grid.readers:
                x, result = values[name], layer.outputs[0].name
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
            whole, *rest = _power(next(left), biased=bias_of(layer) is not None)
            lost += np.array(rest) / whole if whole > 0.0 else 0.0
        errors.append(lost)
    return errors


def _sums(y: Tensor, layer: Any) -> NDArray[np.float64]:
    """Positions, sums and sums of squares of a layer's result, [3, channels]."""
    rows = y.movedim(-1 if layer.op in ("MatMul", "Gemm") else 1, 0).flatten(1).double()
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)]).cpu().numpy()


def _power(sums: NDArray[np.float64], *, biased: bool) -> NDArray[np.float64]:
    """Mean squares summed over channels, less those of the means where biases can change these: [rows]."""
    count, first, second = sums[:, 0], sums[:, 1], sums[:, 2]
    found: NDArray[np.float64] = (second / count - (first / count) ** 2 * biased).clip(0.0).sum(1)
    return found

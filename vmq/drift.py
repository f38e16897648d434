"""Do the recurrent states of a quantized network stay with those of its float self, frame after frame?

    error(t)      = sqrt(mean (h'_t - h_t)^2 / mean over all frames of h^2)      h' the quantized state, h the float one
    saturated(t)  = share of h'_t on the first or last step of its quantizer

Tanh puts states on their bounds in float already, so the share of float values that belong on these two steps, and not
beyond them, goes along: what counts is what the quantized network has more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.quant import dequantize
from vmq.runtime import state_grids
from vmq.states import StatePair

SATURATED = 0.02
"""A state saturates where so much more of it is at the ends of its range than of the float one."""


class StateErrors:
    """Watches the states of two networks.

    Args:
        graph: the quantized network.
        pairs: its states.
    """

    def __init__(self, graph: Graph, pairs: Sequence[StatePair]) -> None:
        outputs = {v.name: v for v in graph.outputs}
        self.names = [p.input for p in pairs]
        self.grids = state_grids(graph)
        self.ranges = {p.input: grid_range(*self.grids[p.input]) if p.input in self.grids
                       else state_range(outputs[p.output]) for p in pairs}
        self._rows: dict[str, list[tuple[float, float, float, float]]] = {n: [] for n in self.names}

    def add(self, ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> None:
        """Take in a frame: states by the names of their inputs, of any shape."""
        for name, rows in self._rows.items():
            state, exact, bounds = ours[name], theirs[name].astype(np.float64), self.ranges[name]
            if name in self.grids:
                state = dequantize(state, *self.grids[name])
            at = at_exact = 0.0
            if bounds is not None:
                low, high, half = *bounds[:2], bounds[2] / 2
                at = float(np.mean((state < low + half) | (state > high - half)))
                at_exact = float(np.mean((np.abs(exact - low) < half) | (np.abs(exact - high) < half)))
            rows.append((float(np.mean((state - exact) ** 2)), float(np.mean(exact ** 2)), at, at_exact))

    def error(self, name: str) -> NDArray[np.float64]:
        """Error of a state in every frame, relative to the float state."""
        off, power, _, _ = np.asarray(self._rows[name]).T
        return np.sqrt(off / max(float(power.mean()), 1e-12))

    def saturated(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Share of a state on its first and last step in every frame: the quantized one's, the float one's."""
        _, _, at, at_exact = np.asarray(self._rows[name]).T
        return at, at_exact


def state_range(output: Any) -> tuple[float, float, float] | None:
    """A state's smallest and largest value and its step; None if it does not come out of one quantizer."""
    node = output.inputs[0] if output.inputs else None
    while node is not None and node.op == "Identity":
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if node is None or node.op != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[1].values.size > 1:
        return None
    kind = np.dtype(node.inputs[2].dtype)
    low, high = (-128, 127) if kind == np.int8 else (0, 255)
    maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if maker is not None and maker.op == "Clip" and all(isinstance(v, Constant) for v in maker.inputs[1:]):
        low, high = (int(np.asarray(v.values)) for v in maker.inputs[1:])
    return grid_range(float(np.asarray(node.inputs[1].values)), int(np.asarray(node.inputs[2].values)), low, high)


def grid_range(scale: float, zero: int, low: int = 0, high: int = 255) -> tuple[float, float, float]:
    """What the first and the last step of a grid stand for, and how far apart its steps are."""
    return (low - zero) * scale, (high - zero) * scale, scale

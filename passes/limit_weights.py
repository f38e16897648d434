"""Keep 8-bit weights within the integers that kernels multiply exactly.

Some kernels add two products of 8-bit integers in 16 bits, which saturate at 32,767. Arm's do with -128 * -128 twice:
-127 is the smallest weight. x86 without VNNI multiplies uint8 by int8 so, and 255 * 127 twice does not fit:

    a w + b v  for a, b in 0..255 fits if    max(w, 0) + max(v, 0) <= 128    and    max(-w, 0) + max(-v, 0) <= 128

for weights w, v whose products are added (`summed_pairs` in vmq/layers.py). That is much less than to give up a bit of
every weight: two large ones are seldom neighbours. calibrate_ranges chooses scales with which pairs keep to `LARGEST`;
here are moved only weights that learning left beyond the ends: of a pair the larger one, to where the sum fits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.layers import summed_pairs
from vmq.pipeline import Context, Pass, PassResult

LARGEST = 127
"""Largest magnitude of an 8-bit weight; in ranges of two neighbours of one sign together, too."""
PAIR = 128
"""Largest sum of the magnitudes of two neighbours of one sign."""


class LimitWeights(Pass):
    """Move 8-bit weights to within the integers that kernels multiply exactly."""

    name: ClassVar[str] = "limit_weights"

    def run(self, graph: Graph, context: Context) -> PassResult:
        moved = tensors = 0
        for node in [n for n in graph.nodes if n.op == "QuantizeLinear" and isinstance(n.inputs[0], Constant)
                     and n.inputs[2].dtype == np.int8]:
            count = _limit(graph, node, context.options.target.adds_pairs)
            moved += count
            tensors += bool(count)
        return PassResult(modified=tensors, report={"weights": moved})


def pair_reach(weight: NDArray[Any], pairs: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
    """Of each output of a layer, the largest sum of the magnitudes of two paired weights of one sign.

    Args:
        weight: any shape.
        pairs: as `summed_pairs` gives them.

    Returns:
        [outputs]; 0 where there are no pairs.
    """
    one, other = (weight.ravel()[places] for places in pairs)
    return np.max([np.maximum(sign * one, 0) + np.maximum(sign * other, 0) for sign in (1, -1)],
                  axis=(0, 2), initial=0.0)


def _limit(graph: Graph, node: Any, adds_pairs: bool) -> int:
    """Move what is beyond the ends in the constant that a quantizer reads; returns how many integers changed."""
    weight, scale = (np.asarray(v.values) for v in node.inputs[:2])
    if scale.ndim:
        shape = [1] * weight.ndim
        shape[node.attrs["axis"]] = -1
        scale = scale.reshape(shape)
    found = np.rint(weight / scale)
    steps = np.clip(found, -LARGEST, LARGEST)
    layers = [r for d in node.outputs[0].outputs for r in d.outputs[0].outputs] if adds_pairs else []
    for pairs in filter(None, map(summed_pairs, layers)):
        while _pull_in(steps.reshape(-1), *pairs):
            pass
    moved = steps != found
    if moved.any():
        values = np.where(moved, steps * scale, weight).astype(np.float32)
        node.inputs[0] = graph.constant(f"{node.inputs[0].name}_limited", values)
    return int(moved.sum())


def _pull_in(steps: NDArray[Any], firsts: NDArray[np.int64], seconds: NDArray[np.int64]) -> bool:
    """Shorten the larger weight of every pair that is too large, in place; False when there is none."""
    one, other = steps[firsts], steps[seconds]
    over = np.where(one * other > 0, np.maximum(np.abs(one + other) - PAIR, 0), 0)
    larger = np.where(np.abs(one) >= np.abs(other), firsts, seconds)[over > 0]
    steps[larger] -= np.sign(steps[larger]) * over[over > 0]
    return bool(over.any())

"""Give the channels of what 4-bit convolutions read ranges that fit one grid.

An activation has one scale for all its channels. Where the largest takes values a hundred times those of the others,
as in front of depthwise convolutions, 16 levels leave the others next to none: in RVM half the channels that the
first inverted residuals read are rounded to noise louder than they are. A channel may be multiplied by s if the weights
that read it are divided by s:

    conv(x, W) = conv(s * x, W / s)          s one number a channel

- in front of a depthwise convolution that costs nothing, as its weights have a scale a channel: all channels
  get the same range;
- elsewhere what activations gain, weights lose: s ~ sqrt(w / r), with r and w the largest magnitudes of a channel and
  of the weights that read it (Xiao et al. 2023, SmoothQuant, eq. 4 with alpha 0.5).

s goes into the weights that make x where nothing or a Relu stands between; into the gate where x is gated; otherwise
a Mul by a constant is put on the edge, where channels differ enough to be worth it. Such a constant is chosen on an
8-bit grid, so that it is exact when it is quantized itself. Nothing is done at 8 bits, where it does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq import processes
from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session

FRAMES = 16
"""Frames that ranges are measured on, spread over the clips."""
WARM_UP = 2
"""Frames at the start of each clip that only warm the state up."""
SPREAD = 64.0
"""No channel is multiplied by more than this relative to the largest."""
WORTH = 0.4
"""A Mul is put in where the median channel has less than this share of the largest one's range."""
NEGATIVE = 2.0
"""Negative values count for so much: what lies below zero takes levels from all channels."""


class BalanceChannels(Pass):
    """Scale channels in front of 4-bit convolutions so that one grid fits them all, and unscale their weights."""

    name: ClassVar[str] = "balance_channels"

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not context.options.recipe.balance or context.options.bits.activations == 8 or not context.clips:
            return PassResult()
        convs = [n for n in graph.nodes if _suits(n)]
        ranges = processes.first(lambda: _ranges(graph, context, {n.inputs[0].name for n in convs}))
        folded = gated = inserted = 0
        for conv in convs:
            value, weight = conv.inputs[0], np.asarray(conv.inputs[1].values, np.float64)
            reach = ranges[value.name]
            reach = np.maximum(reach, reach.max() / SPREAD)
            if reach.max() <= 0.0:
                continue
            depthwise = conv.attrs.get("group", 1) > 1
            if depthwise:
                scale = reach.max() / reach
            else:
                column = np.abs(weight).max(axis=(0, *range(2, weight.ndim)))
                scale = np.sqrt(np.maximum(column, column.max() / SPREAD) / reach)
            scale = scale / scale.max()
            maker = value.inputs[0]
            before = maker.inputs[0].inputs[0] if maker.op == "Relu" and maker.inputs[0].inputs else maker
            alone = len(value.outputs) == 1
            if alone and before.op == "Conv" and _constant_weights(before) and len(maker.inputs[0].outputs) == 1:
                scale = scale / np.exp(np.log(scale).mean())
                for index in (1, 2):
                    if index < len(before.inputs):
                        constant = before.inputs[index]
                        values = np.asarray(constant.values) * scale.reshape([-1] + [1] * (constant.values.ndim - 1))
                        before.inputs[index] = graph.constant(f"{constant.name}_balanced", values.astype(np.float32))
                folded += 1
            else:
                scale = np.maximum(np.rint(255.0 * scale), 1.0) / 255.0
                gate = next((v for v in maker.inputs if _is_gate(v)), None) if maker.op == "Mul" and alone else None
                if gate is not None:
                    maker.inputs[list(maker.inputs).index(gate)] = _times(graph, gate, scale)
                    gated += 1
                elif np.median(reach) < WORTH * reach.max():
                    conv.inputs[0] = _times(graph, value, scale)
                    inserted += 1
                else:
                    continue
            divisor = scale.reshape([-1, *[1] * (weight.ndim - 1)] if depthwise else [1, -1, *[1] * (weight.ndim - 2)])
            if depthwise and weight.shape[0] != scale.size:
                divisor = np.repeat(divisor, weight.shape[0] // scale.size, axis=0)
            conv.inputs[1] = graph.constant(f"{conv.inputs[1].name}_balanced", (weight / divisor).astype(np.float32))
        return PassResult(modified=folded + gated + inserted,
                          report={"folded": folded, "gated": gated, "inserted": inserted})


def _suits(node: Any) -> bool:
    """An ordinary or depthwise convolution of something computed that is no Concat, with constant weights."""
    if node.op != "Conv" or not isinstance(node.inputs[1], Constant):
        return False
    value = node.inputs[0]
    if not value.inputs or value.inputs[0].op == "Concat":
        return False
    channels = value.shape[1] if value.shape else None
    return isinstance(channels, int) and node.attrs.get("group", 1) in (1, channels) and channels > 1


def _constant_weights(node: Any) -> bool:
    """Weights and bias that are constant and read by this node alone."""
    return all(isinstance(v, Constant) and len(v.outputs) == 1 for v in node.inputs[1:])


def _is_gate(value: Any) -> bool:
    """One number a channel, computed."""
    return bool(value.inputs) and bool(value.shape) and len(value.shape) == 4 and list(value.shape[2:]) == [1, 1]


def _times(graph: Graph, value: Any, scale: NDArray[np.float64]) -> Any:
    factors = graph.constant("balance", scale.reshape(1, -1, 1, 1).astype(np.float32))
    return graph.add("Mul", [value, factors], f"{value.name}_balanced", shape=value.shape)


def _ranges(graph: Graph, context: Context, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Largest magnitude of every channel of some values, averaged over frames."""
    wanted = [v.name for v in graph.values() if v.name in set(names)]
    session = Session(graph, pairs=context.options.pairs, extra=wanted, device=context.options.device)
    sums: dict[str, NDArray[np.float64]] = {}
    clips = list(context.clips)[::max(1, len(context.clips) // 4)][:4]
    for clip in clips:
        session.reset(session.told(clip))
        for index, frame in enumerate(clip.frames(0, WARM_UP + FRAMES // len(clips))):
            outputs = session.step(frame)
            if index < min(WARM_UP, len(clip) - 1):
                continue
            for name in wanted:
                axes = (0, *range(2, outputs[name].ndim))
                reach = np.maximum(outputs[name].max(axes), -NEGATIVE * outputs[name].min(axes)).astype(np.float64)
                sums[name] = sums.get(name, 0.0) + reach
    return sums
